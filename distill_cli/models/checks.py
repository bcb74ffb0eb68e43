"""What a network wants, held against what the rest of its folder gives; and one call without weights or arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill_cli.errors import DistillError, reason

if TYPE_CHECKING:
    from distill_cli.models.model import Model

UNMET = {
    "time_cond_proj_dim": "a guidance scale as a condition, as latent consistency models have it",
    "addition_embed_type": "further conditions beside the text, such as SDXL's sizes",
    "class_embed_type": "a class condition of another kind than labels",
    "encoder_hid_dim_type": "text projected by a layer of another kind",
    "class_embeddings_concat": "class conditions beside the text",
}
"""Options of diffusers' networks that ask for inputs which are not given here."""


def _refuse_unmet(config: Any, where: str) -> None:
    for key, wanted in UNMET.items():
        if config.get(key):
            raise DistillError(f"{where}: {key} is {json.dumps(config[key])}: the network wants {wanted}", "such models are not read yet")


def _refuse_size(config: Any, where: str) -> None:
    size = config["sample_size"]
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size,)
    if not all(type(side) is int and side > 0 for side in sides):
        raise DistillError(f"{where}: sample_size is {json.dumps(size)}, a whole number above 0 or two of them are expected")


def _refuse_channels(config: Any, where: str) -> None:
    made, given = config.get("out_channels", config["in_channels"]), config["in_channels"]
    if made != given:
        why = ": its variance is learned too, which is not read" if made == 2 * given else ""
        raise DistillError(
            f"{where}: {given} channels go in and {made} come out{why}", "the network must have as many output as input channels"
        )


def _call(network: Any, where: str, shape: tuple[int, ...], expected: tuple[int, ...], call: Callable[[Any, Tensor], Any]) -> None:
    """Call a network of the same configuration on the meta device, which computes nothing, with an input (2, *shape).

    Raises DistillError where it fails, or answers in another shape than (2, *expected).
    """
    try:
        with torch.device("meta"), torch.no_grad():
            out = call(type(network).from_config(network.config), torch.empty(2, *shape))
    except Exception as error:  # a network raises anything for what does not fit it
        raise DistillError(f"{where}: the network does not take {shape} ({reason(error)})", "look at its config.json") from error
    if tuple(out.shape) != (2, *expected):
        raise DistillError(
            f"{where}: the network makes {tuple(out.shape[1:])} of {shape}, {expected} is expected", "look at its config.json"
        )


def rehearse(model: Model, where: str, **condition: Any) -> None:
    """Call the model's network as a denoiser does."""
    _call(model.unet, where, model.shape, model.shape, lambda unet, x: unet(x, torch.ones(2), **condition, return_dict=False)[0])


def rehearse_pixels(model: Model, where: str) -> None:
    """Raise DistillError where a pixel model's network does not take its own pictures."""
    labels = torch.zeros(2, dtype=torch.long, device="meta") if model.unet.config.get("num_class_embeds") else None
    rehearse(model, where, class_labels=labels)


def check_pixels(model: Model, folder: Path) -> None:
    """Raise DistillError where a pixel model wants what it would not get, or makes what is no picture."""
    where, config, count = f"{folder / 'unet'}", model.unet.config, len(model.conditioner.classes)
    _refuse_unmet(config, where)
    if config.get("sample_size") is None:
        raise DistillError(f"{where}: does not say its sample_size, so how large its pictures are is not known", "add it to config.json")
    _refuse_size(config, where)
    if config["in_channels"] not in (1, 3):
        raise DistillError(f"{where}: pictures of {config['in_channels']} channels", "grey (1) and colour (3) are read")
    _refuse_channels(config, where)
    known = config.get("num_class_embeds") or 0
    labels = [*range(count), *([] if model.conditioner.null_label is None else [model.conditioner.null_label])]
    if max(labels, default=0) >= max(known, 1) or bool(known) != bool(count):
        raise DistillError(f"{where}: {known} labels are known to the network, and {len(labels)} to {folder / 'distill.json'}")
    rehearse_pixels(model, where)


def check_vae(vae: Any, where: str) -> None:
    """Raise DistillError where latents are more than a multiple of what is encoded, or pictures are not in colour."""
    odd = [key for key in ("latents_mean", "latents_std", "shift_factor") if vae.config.get(key)]
    if odd:
        raise DistillError(
            f"{where}: {odd[0]} is {json.dumps(vae.config[odd[0]])}: latents that are moved too, not only scaled, are not read"
        )
    if not (type(vae.config["scaling_factor"]) in (int, float) and 0 < vae.config["scaling_factor"] < float("inf")):
        raise DistillError(f"{where}: scaling_factor is {json.dumps(vae.config['scaling_factor'])}, a number above 0 is expected")
    if vae.config["in_channels"] != 3 or vae.config["out_channels"] != 3:
        raise DistillError(
            f"{where}: pictures of {vae.config['in_channels']} and {vae.config['out_channels']} channels", "colour pictures are read"
        )


def check_latents(model: Model, folder: Path) -> None:
    """Raise DistillError where the parts of a latent text-to-image model do not fit together."""
    where, config, latent, text = f"{folder / 'unet'}", model.unet.config, model.latent, model.text
    assert latent is not None
    assert text is not None
    channels, encoder, words = latent.vae.config["latent_channels"], text.encoder.config, text.tokenizer.get_vocab()
    _refuse_unmet(config, where)
    _refuse_size(config, where)
    if config.get("num_class_embeds"):
        raise DistillError(f"{where}: num_class_embeds is {config['num_class_embeds']}: the network wants class labels beside the text")
    if channels != config["in_channels"]:
        raise DistillError(f"{folder}: the autoencoder has {channels} channels, the network {config['in_channels']}")
    _refuse_channels(config, where)
    word = max(words, key=lambda word: (words[word] >= encoder.vocab_size, -words[word]))
    if words[word] >= encoder.vocab_size:
        more = f"{folder / 'tokenizer'}: {word!r} is word {words[word]}, the text encoder knows {encoder.vocab_size}, from 0"
        raise DistillError(more, "resize the encoder's embeddings, or take the word out of the tokenizer")
    width = config["cross_attention_dim"]
    if any(each != encoder.hidden_size for each in (width if isinstance(width, list | tuple) else [width])):
        raise DistillError(f"{where}: reads text of width {width}, {folder / 'text_encoder'} makes {encoder.hidden_size}")
    rehearse(model, where, encoder_hidden_states=torch.empty(2, text.length, encoder.hidden_size, device="meta"))
    picture = (3, *(latent.factor * size for size in model.shape[1:]))
    _call(latent.vae, f"{folder / 'vae'}", model.shape, picture, lambda vae, z: vae.decode(z, return_dict=False)[0])

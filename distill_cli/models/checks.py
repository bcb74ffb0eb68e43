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


def _call(
    fresh: Callable[[], Any], where: str, shape: tuple[int, ...], expected: tuple[int, ...], call: Callable[[Any, Tensor], Any]
) -> None:
    """Call what `fresh` makes on the meta device, which computes nothing, with an input (2, *shape).

    Raises DistillError where it fails, or answers in another shape than (2, *expected).
    """
    try:
        with torch.device("meta"), torch.no_grad():
            out = call(fresh(), torch.empty(2, *shape))
    except Exception as error:  # a network raises anything for what does not fit it
        raise DistillError(f"{where}: the network does not take {shape} ({reason(error)})", "look at its config.json") from error
    if tuple(out.shape) != (2, *expected):
        raise DistillError(
            f"{where}: the network makes {tuple(out.shape[1:])} of {shape}, {expected} is expected", "look at its config.json"
        )


def rehearse(model: Model, where: str) -> None:
    """Raise DistillError where the model's network does not take what a denoiser gives it."""
    condition = model.conditioner.example(2, "meta")
    beside = sorted(set(condition.parts) - model.backbone.inputs)
    if beside:
        raise DistillError(f"{where}: the network takes no {beside[0]}, which the model's {model.conditioner.summary} come as")
    _call(model.backbone.fresh, where, model.shape, model.shape, lambda network, x: network(x, torch.ones(2), condition))


def check_pixels(model: Model, folder: Path) -> None:
    """Raise DistillError where a pixel model wants what it would not get, or makes what is no picture."""
    where, config, count = f"{folder / model.backbone.part}", model.net.config, len(model.conditioner.classes)
    model.backbone.check(where)
    if config["in_channels"] not in (1, 3):
        raise DistillError(f"{where}: pictures of {config['in_channels']} channels", "grey (1) and colour (3) are read")
    known = config.get("num_class_embeds") or 0
    labels = count + model.conditioner.has_null
    if labels > known or bool(known) != bool(count):
        raise DistillError(f"{where}: {known} labels are known to the network, and {labels} to {folder / 'distill.json'}")
    rehearse(model, where)


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


def check_latents(model: Model, tokenizer: Any, folder: Path) -> None:
    """Raise DistillError where the parts of a latent text-to-image model do not fit together."""
    where, parts = f"{folder / model.backbone.part}", model.parts()
    config, encoder, vae = model.net.config, parts["text_encoder"].config, parts["vae"].config
    words = tokenizer.get_vocab()
    if vae["latent_channels"] != config["in_channels"]:
        raise DistillError(f"{folder}: the autoencoder has {vae['latent_channels']} channels, the network {config['in_channels']}")
    model.backbone.check(where)
    word = max(words, key=lambda word: (words[word] >= encoder.vocab_size, -words[word]))
    if words[word] >= encoder.vocab_size:
        more = f"{folder / 'tokenizer'}: {word!r} is word {words[word]}, the text encoder knows {encoder.vocab_size}, from 0"
        raise DistillError(more, "resize the encoder's embeddings, or take the word out of the tokenizer")
    width = config["cross_attention_dim"]
    if any(each != encoder.hidden_size for each in (width if isinstance(width, list | tuple) else [width])):
        raise DistillError(f"{where}: reads text of width {width}, {folder / 'text_encoder'} makes {encoder.hidden_size}")
    rehearse(model, where)
    picture = (3, *(model.codec.factor * size for size in model.shape[1:]))
    _call(model.codec.fresh, f"{folder / 'vae'}", model.shape, picture, lambda codec, z: codec.raw(z))

"""Checks of a model folder: whether its parts fit together, and one call of each network without weights or arithmetic."""

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


def _call(where: str, shape: tuple[int, ...], expected: tuple[int, ...], call: Callable[[Tensor], Any]) -> None:
    """Call a network on the meta device, which computes nothing, with (2, *shape); raise DistillError unless it makes (2, *expected)."""
    hint = "look at its config.json"
    try:
        with torch.device("meta"), torch.no_grad():
            out = call(torch.empty(2, *shape))
    except Exception as error:  # networks raise errors of any class for inputs that do not fit
        raise DistillError(f"{where}: the network does not take {shape} ({reason(error)})", hint) from error
    if tuple(out.shape) != (2, *expected):
        raise DistillError(f"{where}: the network makes {tuple(out.shape[1:])} of {shape}, {expected} is expected", hint)


def rehearse(model: Model, where: str) -> None:
    """Raise DistillError if the model's network does not take the inputs that a denoiser gives it."""
    condition = model.conditioner.example(2, "meta")
    beside = sorted(set(condition.parts) - model.backbone.inputs)
    if beside:
        raise DistillError(f"{where}: the network takes no {beside[0]}, which the model's {model.conditioner.summary} come as")
    _call(where, model.shape, model.shape, lambda x: model.backbone.fresh()(x, torch.ones(2), condition))


def check_labelled(model: Model, folder: Path) -> None:
    """Raise DistillError if a model without text needs unsupported inputs, makes no data of its kind, or has other labels."""
    where, config, count = f"{folder / model.backbone.part}", model.net.config, len(model.conditioner.classes)
    model.backbone.check(where)
    model.codec.check(model.shape, where)
    known = config.get("num_class_embeds") or 0
    labels = count + model.conditioner.has_null
    if labels > known or bool(known) != bool(count):
        raise DistillError(f"{where}: {known} labels are known to the network, and {labels} to {folder / 'distill.json'}")
    rehearse(model, where)


def check_vae(vae: Any, where: str) -> None:
    """Raise DistillError if latents are shifted as well as scaled, or pictures are not in colour."""
    config = vae.config
    for key in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(key):
            moved = f"{key} is {json.dumps(config[key])}: latents that are moved too, not only scaled, are not read"
            raise DistillError(f"{where}: {moved}")
    scale, into, out = config["scaling_factor"], config["in_channels"], config["out_channels"]
    if not (type(scale) in (int, float) and 0 < scale < float("inf")):
        raise DistillError(f"{where}: scaling_factor is {json.dumps(scale)}, a number above 0 is expected")
    if (into, out) != (3, 3):
        raise DistillError(f"{where}: pictures of {into} and {out} channels", "colour pictures are read")


def check_latents(model: Model, tokenizer: Any, folder: Path) -> None:
    """Raise DistillError if the parts of a latent text-to-image model do not fit together."""
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
    _call(f"{folder / 'vae'}", model.shape, picture, lambda z: model.codec.fresh().raw(z))

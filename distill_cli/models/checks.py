"""Checks of a model folder: whether its parts fit together, and one call of each network without weights or arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill_cli.errors import DistillError, reason
from distill_cli.models.codec import VAECodec
from distill_cli.models.embeddings import NAMES

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
    condition = model.example(2, "meta")
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


def check_vae(vae: Any, where: str, numbers: tuple[str, ...] = ("scaling_factor",)) -> None:
    """Raise DistillError if a pipeline has no place for how latents are normalized, or pictures are not in colour.

    `numbers`: the options of the configuration by which the pipeline scales latents, and moves them.
    """
    config = vae.config
    for key in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(key) and key not in numbers:
            more = f"{key} is {json.dumps(config[key])}: latents that are moved too, not only scaled, are not read"
            raise DistillError(f"{where}: {more}")
    for key in numbers:
        value = config.get(key)
        if type(value) not in (int, float) or not math.isfinite(value) or (key == "scaling_factor" and value <= 0):
            number = "a number above 0" if key == "scaling_factor" else "a number"
            raise DistillError(f"{where}: {key} is {json.dumps(value)}, {number} is expected")
    into = config["in_channels"]
    out = config.get("out_channels", into)
    if (into, out) != (3, 3):
        raise DistillError(f"{where}: pictures of {into} and {out} channels", "colour pictures are read")


def check_latents(model: Model, folder: Path) -> None:
    """Raise DistillError if the parts of a latent text-to-image model do not fit together."""
    where, text, codec = f"{folder / model.backbone.part}", model.text, model.codec
    config = model.net.config
    assert text is not None
    assert isinstance(codec, VAECodec)
    if codec.channels != config["in_channels"]:
        raise DistillError(f"{folder}: the autoencoder has {codec.channels} channels, the network {config['in_channels']}")
    model.backbone.check(where)
    for (name, tokenizer), encoder in zip(text.tokenizers().items(), text.parts().values(), strict=True):
        words, known = tokenizer.get_vocab(), encoder.config.vocab_size
        word = max(words, key=lambda word: (words[word] >= known, -words[word]))
        if words[word] >= known:
            more = f"{folder / name}: {word!r} is word {words[word]}, the text encoder knows {known}, from 0"
            raise DistillError(more, "resize the encoder's embeddings, or take the word out of the tokenizer")
    for part, key in model.backbone.widths.items():
        width, made = config[key], text.shapes[part][-1]
        if any(each != made for each in (width if isinstance(width, list | tuple) else [width])):
            makers = " and ".join(str(folder / name) for name in text.readers)
            raise DistillError(f"{where}: reads {NAMES.get(part, part)} of width {width}, {makers} makes {made}")
    rehearse(model, where)
    picture = (3, *(model.codec.factor * size for size in model.shape[1:]))
    _call(f"{folder / 'vae'}", model.shape, picture, lambda z: model.codec.fresh().raw(z))

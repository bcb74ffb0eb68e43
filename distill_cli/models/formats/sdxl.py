"""Stable Diffusion XL as StableDiffusionXLPipeline: a UNet on latents, an autoencoder, two CLIP text encoders.

The scheduler and the students are as those of Stable Diffusion 1 and 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from distill_cli.errors import DistillError
from distill_cli.models import sdxl
from distill_cli.models.checks import check_latents, check_vae
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats import stable_diffusion
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.model import Model
from distill_cli.models.parts import load_network, quiet, read_json
from distill_cli.models.sources.hub import PARTS as WEIGHTS
from distill_cli.models.text import Reader, load_tokenizer

PIPELINES = ("StableDiffusionXLPipeline",)
DEFAULT_SIZE = 128
"""Width of latents in diffusers' pipeline for a network without sample_size."""
PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder": "CLIPTextModel",
}
HINT = "the base model of Stable Diffusion XL is read, which has both text encoders"
PLAIN = ", add_watermarker=False"
"""Without it diffusers writes a watermark into pictures where the package invisible-watermark is installed."""

scheduler_of = stable_diffusion.scheduler_of


def reads(index: dict[str, Any]) -> bool:
    """Whether model_index.json names this pipeline."""
    return index.get("_class_name") in PIPELINES


def fits(model: Model) -> bool:
    """Whether a model has this pipeline's parts."""
    return set(model.parts()) == set(PARTS)


def save(model: Model, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder. A square size becomes the network's own; another one stands in distill.json and in the card."""
    quiet()
    text = model.text
    assert text is not None
    if model.size is not None and len(set(model.size)) == 1:
        model.net.register_to_config(sample_size=model.size[0])
    index = {
        "_class_name": PIPELINES[0],
        **{name: ["transformers" if name.startswith("text_encoder") else "diffusers", kind] for name, kind in PARTS.items()},
        **{name: ["transformers", "CLIPTokenizer"] for name in text.tokenizers()},
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": text.usual is None,
    }

    def parts(temporary: Path) -> None:
        shared.write_parts(model, temporary, PARTS, dtype)

    shared.write(model, folder, index, scheduler_of(model), parts, in_diffusers(model))


def in_diffusers(model: Model) -> InDiffusers:
    """The pipeline uses the folder's scheduler."""
    return stable_diffusion.in_diffusers(model, PIPELINES[0], PLAIN)


def load(
    folder: Path, name: str, given: Callable[[Any, str], Any] | None = None, changes: Mapping[str, Any] = MappingProxyType({})
) -> Model:
    """The model in a folder, in float32, evaluation mode, on the CPU. Without distill.json it has the defaults of diffusers' pipeline.

    `given` and `changes` are those of a single file, as for Stable Diffusion 1 and 2.
    """
    import diffusers
    import transformers

    index = read_json(folder / "model_index.json")
    stable_diffusion.check_parts(folder, index, PARTS, HINT)
    zeros = index.get("force_zeros_for_empty_prompt", True)
    if type(zeros) is not bool:
        raise DistillError(f"{folder / 'model_index.json'}: force_zeros_for_empty_prompt is {json.dumps(zeros)}, true or false is expected")
    levels = stable_diffusion.levels_of(folder, index, changes)
    tokenizers = {part: load_tokenizer(folder / part.replace("text_encoder", "tokenizer")) for part in ("text_encoder", "text_encoder_2")}
    make = given or (lambda kind, part: load_network(kind, folder / part, WEIGHTS[part]))
    made = {
        part: make(getattr(transformers if part in tokenizers else diffusers, PARTS[part]), part)
        for part in reversed(PARTS)  # the largest last, to keep the peak of memory low
    }
    check_vae(made["vae"], str(folder / "vae"))
    readers = {part: Reader(tokenizer, made[part], int(tokenizer.model_max_length)) for part, tokenizer in tokenizers.items()}
    check_text(readers, made["unet"].config, folder)
    notes = stable_diffusion.sized(made["unet"], DEFAULT_SIZE, folder)
    parts = sdxl.SDXLUNet(made["unet"]), sdxl.SDXLPrompts(readers, zeros), sdxl.codec_of(made["vae"])
    model = stable_diffusion.assembled(folder, name, levels, *parts, sdxl.SAMPLER, given is None)
    model = model.with_size(model.size)
    model.notes += notes
    if index.get("image_encoder") not in (None, [None, None]):
        model.notes += ("image_encoder is left out",)
    check_latents(model, folder)
    return model


def check_text(readers: Mapping[str, Reader], config: Any, folder: Path) -> None:
    """Raise DistillError for encoders that read fewer tokens than they get, or a network that is told other things than text and sizes."""
    lengths = {part: reader.length for part, reader in readers.items()}
    for part, reader in readers.items():
        if reader.encoder.config.max_position_embeddings < reader.length:
            knows = f"{folder / part}: it reads {reader.encoder.config.max_position_embeddings} tokens"
            raise DistillError(f"{knows}, its tokenizer makes {reader.length} (model_max_length)")
    if len(set(lengths.values())) > 1:
        said = " and ".join(map(str, lengths.values()))
        raise DistillError(f"{folder}: its tokenizers make {said} tokens (model_max_length), which cannot stand side by side")
    added, kind = config.projection_class_embeddings_input_dim, config.addition_embed_type
    if kind != "text_time":
        raise DistillError(f"{folder / 'unet'}: addition_embed_type is {json.dumps(kind)}, not text_time", HINT)
    pooled, each = readers["text_encoder_2"].encoder.config.projection_dim, config.addition_time_embed_dim
    if added != pooled + 6 * (each or 0):
        makes = f"the pooled text has {pooled} numbers and each of six sizes {each}"
        raise DistillError(f"{folder / 'unet'}: projection_class_embeddings_input_dim is {added}, but {makes}", HINT)

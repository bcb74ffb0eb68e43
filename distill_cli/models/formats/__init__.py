"""Formats: diffusers' pipeline folders, which models are read from and written to. One file and one line in FORMATS for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from distill_cli.errors import DistillError
from distill_cli.files import write_atomic
from distill_cli.models.formats import (
    consistency,
    ddpm,
    edm,
    flow,
    latent_consistency,
    latent_flow,
    lora,
    plane,
    sd3,
    sdxl,
    stable_diffusion,
)
from distill_cli.models.formats.card import InDiffusers, card
from distill_cli.models.formats.extra import EXTRA, extra_of
from distill_cli.models.formats.transformer import TRANSFORMERS
from distill_cli.models.model import Model
from distill_cli.models.parts import read_json


class Format(Protocol):
    """The interface of a module of this package."""

    @property
    def PIPELINES(self) -> tuple[str, ...]:  # noqa: N802 - a constant of a module
        """Pipeline classes that model_index.json may name."""

    def reads(self, index: dict[str, Any]) -> bool:
        """Whether the format reads a folder with this model_index.json."""

    def load(self, folder: Path, name: str) -> Model:
        """The model in a folder: float32, evaluation mode, on the CPU. Raises DistillError for anything unexpected."""

    def fits(self, model: Model) -> bool:
        """Whether the format can hold this model."""

    def save(self, model: Model, folder: Path, dtype: torch.dtype) -> None:
        """Write the folder, complete or absent."""

    def in_diffusers(self, model: Model) -> InDiffusers:
        """How plain diffusers samples the folder, and whether it makes the same pictures."""


FORMATS: tuple[Format, ...] = (
    *(lora, plane, consistency, edm, flow, ddpm, latent_flow, latent_consistency, stable_diffusion, sdxl, sd3),
    *TRANSFORMERS,
)
PIPELINES = tuple(dict.fromkeys(name for known in FORMATS for name in known.PIPELINES))


def format_of(model: Model) -> Format:
    """The format that a model is written in."""
    return next(known for known in FORMATS if known.fits(model))


def load(folder: Path, name: str) -> Model:
    """The model in a pipeline folder, called `name`."""
    index = read_json(folder / "model_index.json")
    found = next((known for known in FORMATS if known.reads(index)), None)
    if found is None:
        kind = index.get("_class_name")
        raise DistillError(f"{folder}: a {kind} folder, which this version does not read", f"it reads {', '.join(PIPELINES)}")
    return found.load(folder, name)


def save(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `model` to `folder`, which is complete or absent; an older one is replaced. Weights are stored as `dtype`.

    A LoRA that no pipeline loads, or that is to be merged, is written as whole weights.
    """
    known = format_of(model)
    known.save(model if known is lora else model.whole(), Path(folder), dtype)


def pipelines_of(model: Model) -> tuple[str, ...]:
    """The pipelines of a model's format; of a LoRA those of its base."""
    known: Format = lora.base_of(model) or format_of(model)
    return known.PIPELINES


def save_sampler(model: Model, folder: Path) -> None:
    """Write a model's sampler into its folder's distill.json, and into the card if this package wrote it."""
    ours = (folder / EXTRA).exists()
    write_atomic(folder / EXTRA, extra_of(model).model_dump_json(indent=2) + "\n")
    if ours:
        write_atomic(folder / "README.md", card(model, format_of(model).in_diffusers(model)))

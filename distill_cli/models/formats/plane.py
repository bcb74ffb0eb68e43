"""Models of points of the plane: a PlaneMLP, and the scheduler of a pixel model with the same noise levels.

The folder is laid out as diffusers' are, but no pipeline of diffusers knows points: it opens with this package alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from distill_cli.models.formats import consistency, ddpm, flow
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.model import Model
from distill_cli.models.plane import Plane, PlaneCodec

PIPELINES = ("PlanePipeline",)
LIBRARIES = {"PlaneMLP": "distill_cli.models.plane"}
LEVELS: dict[type, Any] = {EDMSchedule: consistency, TableSchedule: ddpm, FlowSchedule: flow}
"""The formats of pixel models that write and read the scheduler of each schedule."""


def reads(index: dict[str, Any]) -> bool:
    """Whether model_index.json names this pipeline."""
    return index.get("_class_name") in PIPELINES


def fits(model: Model) -> bool:
    """Whether the model works on points."""
    return isinstance(model.backbone, Plane)


def load(folder: Path, name: str) -> Model:
    """The model in a folder."""
    known = {scheduler: each for each in LEVELS.values() for scheduler in each.SCHEDULERS}
    config, path = shared.scheduler_of(folder, tuple(known))
    levels = known[config["_class_name"]].levels(config, path)
    return shared.read_labelled(folder, name, levels, Plane.part, LIBRARIES, Plane, PlaneCodec())


def save(model: Model, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder."""
    scheduler = LEVELS[type(model.denoiser.schedule)].scheduler(model)
    shared.write_labelled(model, folder, dtype, PIPELINES[0], scheduler, in_diffusers(model), LIBRARIES)


def in_diffusers(model: Model) -> InDiffusers:
    """diffusers has no pipeline for points."""
    return InDiffusers(differs="no pipeline of diffusers makes points; the folder opens with distill alone")

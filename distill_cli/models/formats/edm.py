"""NVlabs' EDM networks: an EDMUNet whose time input is ln(sigma) / 4, with EDMEulerScheduler, which has the same times.

No pipeline of diffusers puts the two together; the folder calls itself DDPMPipeline because an index must name one.
docs/published-teachers.md has the loop that samples it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill_cli.errors import DistillError
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.formats.consistency import edm_of, numbers
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler

PIPELINES = ("DDPMPipeline",)
SCHEDULER = "EDMEulerScheduler"
TIME_INPUT = "ln sigma / 4"
DEFAULT_GRID = 1000
"""EDMEulerScheduler's default, which counts as not given."""


def reads(index: dict[str, Any]) -> bool:
    """Whether model_index.json names this pipeline with EDM's scheduler."""
    return index.get("_class_name") in PIPELINES and index.get("scheduler") == ["diffusers", SCHEDULER]


def fits(model: Model) -> bool:
    """Whether the model's network takes ln(sigma) / 4 as its time."""
    return model.denoiser.time_input == TIME_INPUT


def load(folder: Path, name: str) -> Model:
    """The model in a folder. Without distill.json it is a teacher."""
    config, path = shared.scheduler_of(folder, (SCHEDULER,))
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise DistillError(f"{path}: prediction_type {config['prediction_type']!r} with EDM's scalings", "epsilon is read")
    schedule, scales = edm_of(config, path, DEFAULT_GRID)
    levels = shared.Levels(schedule, scales, ("edm", "consistency"), (TIME_INPUT, "250 ln sigma"), Sampler())
    return shared.read_labelled(folder, name, levels)


def save(model: Model, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder."""
    import diffusers

    scheduler = diffusers.EDMEulerScheduler(**numbers(model))
    shared.write_labelled(model, folder, dtype, PIPELINES[0], scheduler, in_diffusers(model))


def in_diffusers(model: Model) -> InDiffusers:
    """No pipeline of diffusers samples an EDMUNet."""
    return InDiffusers(differs="no pipeline samples an EDMUNet; docs/published-teachers.md has the loop that does")

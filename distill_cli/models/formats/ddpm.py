"""eps, v and x0 models of pixels over a table of betas, as DDPMPipeline (DDIMPipeline is read too)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill_cli.diffusion.denoiser import Scales
from distill_cli.models import schedulers
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler
from distill_cli.models.schedulers import PIXEL_SCHEDULERS as SCHEDULERS
from distill_cli.models.schedulers import config_of, table_of

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
SNIPPET = """from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("FOLDER")
pipeline(num_inference_steps={steps}).images[0].save("picture.png")
"""


def reads(index: dict[str, Any]) -> bool:
    """Whether model_index.json names one of these pipelines."""
    return index.get("_class_name") in PIPELINES


def fits(model: Model) -> bool:
    """Whether the model works on pixels, at the times of a table."""
    return model.denoiser.time_input == "t" and set(model.parts()) == {"unet"}


def levels(config: dict[str, Any], path: Path) -> shared.Levels:
    """The times of a scheduler's configuration. Without distill.json the model is a teacher, sampled by 50 steps of DDIM."""
    schedule, prediction = table_of(config, str(path))
    notes = schedulers.assumed(config, str(path))
    return shared.Levels(schedule, Scales(), (prediction,), ("t",), Sampler(solver="ddim", steps=50), notes)


def load(folder: Path, name: str) -> Model:
    """The model in a folder."""
    return shared.read_labelled(folder, name, levels(*shared.scheduler_of(folder, SCHEDULERS)))


def scheduler(model: Model) -> Any:
    """diffusers' scheduler for the model."""
    schedule: Any = model.denoiser.schedule
    return schedulers.make(config_of(schedule, model.denoiser.parameterisation), "DDPMScheduler")


def save(model: Model, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder."""
    shared.write_labelled(model, folder, dtype, PIPELINES[0], scheduler(model), in_diffusers(model))


def in_diffusers(model: Model) -> InDiffusers:
    """The pipeline takes DDPM's ancestral steps, which only for one step are the student's, and passes no classes."""
    if model.conditioner.classes:
        return InDiffusers(differs="DDPMPipeline tells the network no class")
    snippet, sampler = SNIPPET.format(steps=model.sampler.steps), model.sampler
    one = sampler.answers == "endpoint" and sampler.steps == 1 and sampler.times[0] == model.denoiser.schedule.t_max
    return InDiffusers(snippet, "" if one else "DDPMPipeline goes DDPM's ancestral steps")

"""Flow-matching models of pixels, as DDPMPipeline with a scheduler of flow matching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill_cli.diffusion.denoiser import Scales
from distill_cli.models import flow_matching
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler

PIPELINES = ("DDPMPipeline",)
SCHEDULERS = tuple(flow_matching.SINCE)
SNIPPET = """{seed}from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("FOLDER")
{seeded}pipeline(num_inference_steps={steps}).images[0].save("picture.png")
"""


def reads(index: dict[str, Any]) -> bool:
    """Whether model_index.json names this pipeline with a scheduler of flow matching."""
    named = index.get("scheduler")
    return index.get("_class_name") in PIPELINES and isinstance(named, list) and named[-1] in SCHEDULERS


def fits(model: Model) -> bool:
    """Whether the model works on pixels, at the times of flow matching."""
    return model.denoiser.time_input == flow_matching.TIME_INPUT and set(model.parts()) == {"unet"}


def levels(config: dict[str, Any], path: Path) -> shared.Levels:
    """The times of a scheduler's configuration. Without distill.json the model is a teacher, sampled by 50 of Euler's steps."""
    schedule = flow_matching.schedule_of(config, str(path))
    usual = Sampler(solver="euler", steps=schedule.usual_steps)
    return shared.Levels(schedule, Scales(), ("flow",), (flow_matching.TIME_INPUT,), usual)


def load(folder: Path, name: str) -> Model:
    """The model in a folder."""
    return shared.read_labelled(folder, name, levels(*shared.scheduler_of(folder, SCHEDULERS)))


scheduler = flow_matching.scheduler_of


def save(model: Model, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder."""
    shared.write_labelled(model, folder, dtype, PIPELINES[0], scheduler(model), in_diffusers(model))


def in_diffusers(model: Model) -> InDiffusers:
    """The pipeline takes the scheduler's own times, and passes no classes."""
    if model.conditioner.classes:
        return InDiffusers(differs="DDPMPipeline tells the network no class")
    sampler = model.sampler
    ours = sampler.times_for(model.denoiser.schedule, sampler.solver, sampler.steps)
    theirs = scheduler(model)
    theirs.set_timesteps(sampler.steps)
    same = torch.allclose(theirs.sigmas[:-1].double(), ours, rtol=0, atol=1e-6)
    differs = flow_matching.differs(model) or ("" if same else "DDPMPipeline takes the scheduler's times, and no list of others")
    return InDiffusers(SNIPPET.format(steps=sampler.steps, **flow_matching.seeding(model)), differs)

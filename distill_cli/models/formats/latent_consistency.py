"""Latent consistency models that are told their guidance scale: Stable Diffusion's parts as LatentConsistencyModelPipeline."""

from __future__ import annotations

from functools import partial
from typing import Any

from distill_cli.models.formats import stable_diffusion
from distill_cli.models.model import Model

PIPELINES = ("LatentConsistencyModelPipeline",)


def reads(index: dict[str, Any]) -> bool:
    """Whether model_index.json names this pipeline."""
    return index.get("_class_name") in PIPELINES


def fits(model: Model) -> bool:
    """Whether a model has the pipeline's parts, and a network of few steps that is told the scale."""
    return stable_diffusion.fits(model) and model.sampler.guidance == "told" and model.sampler.answers == "endpoint"


load = stable_diffusion.load
save = partial(stable_diffusion.save, pipeline=PIPELINES[0])
in_diffusers = partial(stable_diffusion.in_diffusers, pipeline=PIPELINES[0])

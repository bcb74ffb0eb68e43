"""Trains a CLIP model: of pictures and their captions, or of noised data for guidance."""

from __future__ import annotations

from distill_cli.methods.clip.clean import Contrast
from distill_cli.methods.clip.config import CLIPConfig
from distill_cli.methods.clip.noisy import NoisyContrast
from distill_cli.training.job import Job
from distill_cli.training.objective import Objective


def open(config: CLIPConfig, job: Job) -> Objective:
    """Read the captioned pictures, and the model whose noise is learned."""
    if not config.noisy:
        return Contrast(config, job.images(config))
    model = job.teacher(config.model, config.device)
    return NoisyContrast(config, job.images(config, model), model)

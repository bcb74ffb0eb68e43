"""Trains a small classifier: of clean pictures for `distill evaluate`, or of noised data for guidance."""

from __future__ import annotations

from distill_cli.methods.classifier.clean import Classification
from distill_cli.methods.classifier.config import ClassifierConfig
from distill_cli.methods.classifier.noisy import NoisyClassification
from distill_cli.training.job import Job
from distill_cli.training.objective import Objective


def open(config: ClassifierConfig, job: Job) -> Objective:
    """Read the images, and the model whose noise is learned."""
    if not config.noisy:
        return Classification(config, job.images(config))
    model = job.teacher(config.model, config.device)
    return NoisyClassification(config, job.images(config, model), model)

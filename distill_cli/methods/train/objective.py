"""Teachers from images: of pixels (denoising.py), or of the latents of captioned pictures (text_to_image.py)."""

from __future__ import annotations

from distill_cli.methods.train.config import TrainConfig
from distill_cli.methods.train.denoising import Denoising
from distill_cli.methods.train.text_to_image import TextToImage
from distill_cli.training.job import Job
from distill_cli.training.objective import Objective


def open(config: TrainConfig, job: Job) -> Objective:
    images = job.images(config)
    return Denoising(config, images) if config.vae is None else TextToImage(config, images)

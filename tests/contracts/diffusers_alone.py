"""The pictures that plain diffusers makes of a folder, by its pipeline's name; what only our sampler does is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_cli.diffusion.noise import Draws


def consistency(pipeline: Any, model: Any, draws: Draws, labels: Tensor) -> Tensor:
    classes = labels.tolist() if pipeline.unet.config.num_class_embeds else None
    made = pipeline(
        batch_size=len(labels), class_labels=classes, num_inference_steps=model.sampling.steps, latents=draws.normal("prior", model.shape),
        output_type="pt",
    )  # fmt: skip
    return torch.as_tensor(made.images)


def stable_diffusion(pipeline: Any, model: Any, draws: Draws, labels: Tensor) -> Tensor:
    prompts = [model.text.prompts[k] for k in labels.tolist()]
    made = pipeline(
        prompts, latents=draws.normal("prior", model.shape), num_inference_steps=model.sampling.steps,
        guidance_scale=model.sampling.guidance_scale, output_type="pt",
    )  # fmt: skip
    return made.images


BY_PIPELINE = {"ConsistencyModelPipeline": consistency, "StableDiffusionPipeline": stable_diffusion}


def pictures(folder: Path, model: Any, draws: Draws, labels: Tensor) -> Tensor | None:
    """(B, C, H, W) in [-1, 1], of the noise of `draws`; None where diffusers has no way to make them."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    how = BY_PIPELINE.get(type(pipeline).__name__)
    return None if how is None else how(pipeline, model, draws, labels) * 2 - 1

"""The pictures that plain diffusers makes of a folder, by its pipeline's name; what only our sampler does is left out."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from distill_cli.diffusion.noise import Draws


def asked(model: Any) -> Any:
    """How a model is sampled."""
    return getattr(model, "sampler", None) or model.sampling


def consistency(pipeline: Any, model: Any, draws: Draws, labels: Tensor) -> Tensor:
    classes = labels.tolist() if pipeline.unet.config.num_class_embeds else None
    made = pipeline(
        batch_size=len(labels), class_labels=classes, num_inference_steps=asked(model).steps, latents=draws.normal("prior", model.shape),
        output_type="pt",
    )  # fmt: skip
    return torch.as_tensor(made.images)


def stable_diffusion(pipeline: Any, model: Any, draws: Draws, labels: Tensor) -> Tensor:
    prompts = [model.text.prompts[k] for k in labels.tolist()]
    made = pipeline(
        prompts, latents=draws.normal("prior", model.shape), num_inference_steps=asked(model).steps,
        guidance_scale=asked(model).guidance_scale, output_type="pt",
    )  # fmt: skip
    return made.images


def ddpm(pipeline: Any, model: Any, draws: Draws, labels: Tensor) -> Tensor | None:
    """The pipeline takes no noise, so it is given it from behind; it takes no classes at all."""
    if pipeline.unet.config.num_class_embeds:
        return None
    module = import_module(type(pipeline).__module__)
    with patch.object(module, "randn_tensor", lambda *_, **__: draws.normal("prior", model.shape)):
        made = pipeline(batch_size=len(labels), num_inference_steps=asked(model).steps, output_type="np")
    return torch.from_numpy(made.images).permute(0, 3, 1, 2)


BY_PIPELINE = {"ConsistencyModelPipeline": consistency, "DDPMPipeline": ddpm, "StableDiffusionPipeline": stable_diffusion}


def pictures(folder: Path, model: Any, draws: Draws, labels: Tensor) -> Tensor | None:
    """(B, C, H, W) in [-1, 1], of the noise of `draws`; None where diffusers has no way to make them."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    how = BY_PIPELINE.get(type(pipeline).__name__)
    made = None if how is None else how(pipeline, model, draws, labels)
    return None if made is None else made * 2 - 1

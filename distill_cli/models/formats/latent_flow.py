"""Flow-matching models of latents with Stable Diffusion's parts: a StableDiffusionPipeline folder that this package alone samples.

StableDiffusionPipeline scales its latents by methods of the scheduler that FlowMatchEulerDiscreteScheduler does not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.errors import DistillError
from distill_cli.models import flow_matching
from distill_cli.models.backbones import backbone_of
from distill_cli.models.checks import check_latents, check_vae
from distill_cli.models.codec import VAECodec
from distill_cli.models.conditioners import PromptConditioner
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats import stable_diffusion
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.formats.extra import read_extra
from distill_cli.models.model import Model
from distill_cli.models.parts import load_network
from distill_cli.models.sources.hub import PARTS as WEIGHTS
from distill_cli.models.text import load_tokenizer

PIPELINES = stable_diffusion.PIPELINES


def reads(index: dict[str, Any]) -> bool:
    """Whether model_index.json names this pipeline with a scheduler of flow matching."""
    scheduler = index.get("scheduler")
    return index.get("_class_name") in PIPELINES and isinstance(scheduler, list) and scheduler[-1] in flow_matching.SINCE


def fits(model: Model) -> bool:
    """Whether a model has this pipeline's parts, and the times of flow matching."""
    return model.denoiser.time_input == flow_matching.TIME_INPUT and stable_diffusion.fits(model)


def load(folder: Path, name: str) -> Model:
    """The model in a folder that this package wrote. Raises DistillError for other folders, which no pipeline samples."""
    import diffusers
    import transformers

    config, path = shared.scheduler_of(folder, tuple(flow_matching.SINCE))
    schedule = flow_matching.schedule_of(config, str(path))
    extra = read_extra(folder, schedule, ("flow",), (flow_matching.TIME_INPUT,))
    if extra is None:
        raise DistillError(f"{path}: {config['_class_name']} in a {PIPELINES[0]}, which cannot use it", "is it of another pipeline?")
    kinds = {"text_encoder": transformers.CLIPTextModel, "vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel}
    encoder, vae, unet = (load_network(kind, folder / part, WEIGHTS[part]) for part, kind in kinds.items())
    check_vae(vae, str(folder / "vae"))
    denoiser = NetworkDenoiser(backbone_of(unet), schedule, "flow", Scales(), flow_matching.TIME_INPUT).eval().requires_grad_(False)
    conditioner = PromptConditioner(load_tokenizer(folder / "tokenizer"), encoder)
    model = Model(denoiser, conditioner, extra.lineage, extra.sampler, VAECodec(vae), recipe=extra.recipe)
    check_latents(model, folder)
    return model


def save(model: Model, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder."""
    stable_diffusion.write(model, folder, dtype, flow_matching.scheduler_of(model), in_diffusers(model))


def in_diffusers(model: Model) -> InDiffusers:
    """No pipeline of diffusers samples the folder."""
    named = type(flow_matching.scheduler_of(model)).__name__
    return InDiffusers(differs=f"StableDiffusionPipeline asks the scheduler for init_noise_sigma, which {named} does not have")

"""Stable Diffusion's parts with random weights, and its architecture without weights (Rombach et al. 2112.10752)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from distill_cli.config import NetworkConfig, TextConfig, VAENetworkConfig
from distill_cli.config.base import Solver
from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.schedule import NoiseSchedule, TableSchedule
from distill_cli.models.backbones import backbone_of
from distill_cli.models.checks import check_vae
from distill_cli.models.codec import VAECodec
from distill_cli.models.conditioners import PromptConditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.parts import load_network
from distill_cli.models.sampler import Sampler
from distill_cli.models.schedulers import PREDICTION_TYPES, STABLE_DIFFUSION
from distill_cli.models.text import create_encoder, make_tokenizer

UNETS: dict[str, dict[str, Any]] = {
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sd21": dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
}
TEXTS: dict[str, dict[str, Any]] = {
    "sd15": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768),
    "sd21": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, projection_dim=512),
}
SAMPLED = {"sd15": ("eps", "pndm"), "sd21": ("v", "ddim")}
"""Prediction of each network, and the solver of its scheduler."""
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)


def create(
    *,
    vae: Any,
    tokenizer: Any,
    pixels: int,
    network: NetworkConfig,
    text: TextConfig,
    scheduler: dict[str, Any] | None,
    parameterisation: str,
    lineage: Lineage,
    guidance_scale: float,
    solver: Solver = "ddim",
    seed: int = 0,
    schedule: NoiseSchedule | None = None,
) -> Model:
    """A latent text-to-image model with random weights from `seed`, for this autoencoder.

    Its schedule is the table of the diffusers `scheduler` configuration, or `schedule` where solvers need no scheduler of diffusers.
    """
    import diffusers

    codec = VAECodec(vae)
    channels = tuple(network.channels)
    latents = codec.vae.config.latent_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(
            sample_size=pixels // codec.factor,
            in_channels=latents,
            out_channels=latents,
            block_out_channels=channels,
            layers_per_block=network.layers,
            down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in network.attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(network.attention)),
            norm_num_groups=network.groups,
            attention_head_dim=tuple(max(1, width // network.head) for width in channels),  # diffusers takes it as the number of heads
            cross_attention_dim=text.width,
            dropout=network.dropout,
        )
    config = None if scheduler is None else {**scheduler, "prediction_type": PREDICTION_TYPES[parameterisation]}
    schedule = schedule or TableSchedule.from_config(config or {})
    denoiser = NetworkDenoiser(backbone_of(unet), schedule, parameterisation, Scales(), schedule.time_input)
    conditioner = PromptConditioner(tokenizer, create_encoder(text, tokenizer, seed))
    return Model(denoiser, conditioner, lineage, Sampler(solver=solver, steps=50, guidance_scale=guidance_scale), codec, config)


def load_vae(name: str | Path) -> Any:
    """The AutoencoderKL in a folder, or in a run of `distill vae`, float32, on the CPU."""
    import diffusers

    folder = Path(name)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    vae = load_network(diffusers.AutoencoderKL, folder)
    check_vae(vae, str(folder))
    return vae


def tiny() -> Model:
    """Stable Diffusion's parts, 64x64 pictures, with random weights, made in memory: for smoke runs."""
    from distill_cli.data.shapes import TRAINED
    from distill_cli.models import autoencoder

    tokenizer = make_tokenizer((thing.caption for thing in TRAINED), 16)
    return create(
        vae=autoencoder.create(64, 3, VAENetworkConfig(channels=[8, 8, 8, 8], groups=4), 0).vae.eval().requires_grad_(False),
        tokenizer=tokenizer,
        pixels=64,
        network=NetworkConfig(channels=[16, 16], attention=[False, True], groups=4, head=8),
        text=TextConfig(width=16, layers=1, heads=2),
        scheduler={
            "_class_name": "PNDMScheduler",
            **STABLE_DIFFUSION,
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "clip_sample": False,
        },
        parameterisation="eps",
        lineage=Lineage(name="tiny-sd", licence="Apache-2.0", data="shapes"),
        guidance_scale=7.5,
        solver="pndm",
    )


def sketch(name: str) -> Model:
    """The architecture of version `name` on the meta device, without weights or vocabulary."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**UNETS[name])
        vae = diffusers.AutoencoderKL(**VAE, sample_size=UNETS[name]["sample_size"] * 8)
        encoder = CLIPTextModel(CLIPTextConfig(**TEXTS[name]))
    prediction, solver = SAMPLED[name]
    denoiser = NetworkDenoiser(backbone_of(unet), TableSchedule.from_config(STABLE_DIFFUSION), prediction, Scales(), "t")
    conditioner = PromptConditioner(SimpleNamespace(model_max_length=77), encoder)
    sampler = Sampler(solver=solver, steps=50, guidance_scale=7.5)
    return Model(denoiser, conditioner, Lineage(name=name), sampler, VAECodec(vae), dict(STABLE_DIFFUSION))

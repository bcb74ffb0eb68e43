"""The cost of a model before it runs: its networks without weights, and the arithmetic of one evaluation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.schedule import TableSchedule
from distill_cli.models.backbones import backbone_of
from distill_cli.models.codec import VAECodec
from distill_cli.models.conditioners import PromptConditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler
from distill_cli.models.schedulers import STABLE_DIFFUSION
from distill_cli.models.sources.hub import HUB, short_name, to_download

RATE = 150e12
"""FLOP/s that plans assume: about half of an A100's data sheet in bf16. A guess, not a measurement."""
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


def sketch(name: str) -> Model:
    """A hub model for plans: its published architecture on the meta device, without weights or vocabulary."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**UNETS[name])
        vae = diffusers.AutoencoderKL(**VAE, sample_size=UNETS[name]["sample_size"] * 8)
        encoder = CLIPTextModel(CLIPTextConfig(**TEXTS[name]))
    prediction, solver = SAMPLED[name]
    denoiser = NetworkDenoiser(backbone_of(unet), TableSchedule.from_config(STABLE_DIFFUSION), prediction, Scales(), "t")
    conditioner = PromptConditioner(SimpleNamespace(model_max_length=77), encoder)
    lineage, sampler = Lineage(name=name, licence=HUB[name].licence), Sampler(solver=solver, steps=50, guidance_scale=7.5)
    return Model(denoiser, conditioner, lineage, sampler, VAECodec(vae), dict(STABLE_DIFFUSION))


def sketched(name: str, wanted: bool) -> tuple[Model | None, dict[str, str]]:
    """The sketch of a hub model that is not downloaded yet, if `wanted`, and the plan's line about the download."""
    known = short_name(name) if wanted else ""
    download = to_download(name) if known else ""
    return (sketch(known), {"download": download}) if download else (None, {})


def counted(call: Any) -> int:
    """FLOP of a call on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def evaluation(model: Model) -> int:
    """FLOP of one network evaluation for one image: multiplications and additions in matrix products."""
    return counted(lambda: model.backbone.fresh()(torch.empty(1, *model.shape), torch.ones(1), model.example(1, "meta")))


def decoding(model: Model) -> int:
    """FLOP of decoding one image."""
    return counted(lambda: model.codec.fresh().raw(torch.empty(1, *model.shape)))


def time_of(flop: float) -> str:
    """FLOP in the words of a plan."""
    return f"{amount(flop)}, {flop / RATE / 3600:,.3g} GPU-hours at {amount(RATE)}/s (a guess at an A100 in bf16)"


def amount(number: float, unit: str = "FLOP") -> str:
    """FLOP or bytes, three digits with their unit."""
    number = float(f"{max(number, 1):.3g}")
    exponent = max(1, min(6, int(math.log10(number) // 3)))
    return f"{number / 1000**exponent:.3g} {' kMGTPE'[exponent]}{unit}"

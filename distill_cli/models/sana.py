"""SANA (Xie et al. 2410.10629): linear attention on latents of a 32-fold autoencoder, prompts by Gemma 2."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor

from distill_cli.diffusion.condition import Condition
from distill_cli.models.family import Family, Transformer
from distill_cli.models.language import GEMMA_2B, TINY, Wording
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler


class SanaTransformer(Transformer):
    """diffusers' SanaTransformer2DModel; its time is 1000 t times an option of its configuration."""

    blocks = ("SanaTransformerBlock",)
    lora = ("to_q", "to_k", "to_v", "to_out.0")
    widths: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "caption_channels"}
    unmet: ClassVar[Mapping[str, str]] = {"guidance_embeds": "a guidance scale inside, as a distilled model does"}
    halves = True

    @property
    def resizes(self) -> bool:  # type: ignore[override]
        return self.net.config.interpolation_scale is None

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        time = time * self.net.config.timestep_scale
        return self.net(x, timestep=time, **condition.parts, return_dict=False)[0][:, : x.shape[1]]


def instruction() -> str:
    """What Gemma reads before a prompt: the model was trained with it."""
    from diffusers import SanaPipeline

    lines: list[str] = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


FAMILY = Family(
    pipelines=("SanaPipeline",),
    since={"diffusers": "0.32", "transformers": "4.42"},
    text_encoder="Gemma2Model",
    vae="AutoencoderDC",
    transformer="SanaTransformer2DModel",
    backbone=SanaTransformer,
    tokenizers=("GemmaTokenizer",),
    wording=Wording(length=300, before=instruction, kept=True, lower=True, right=True),
    sampler=Sampler(solver="dpm++", steps=20, guidance_scale=4.5),
    shift=3.0,
    numbers=("scaling_factor",),
    moving=None,
    ends="training",
    multistep=True,
    called={"use_resolution_binning": False},
)
LAYERS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
VAE = dict(encoder_block_types=LAYERS, decoder_block_types=LAYERS, upsample_block_type="interpolate", downsample_block_type="Conv",
           scaling_factor=0.41407)  # fmt: skip
SMALL = dict(num_attention_heads=36, num_layers=28, num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152)
TRANSFORMERS: dict[str, dict[str, Any]] = {"sana": {}, "sana-600m": SMALL}
"""What differs from diffusers' defaults, by diffusers' scripts/convert_sana_to_diffusers.py."""


def tiny() -> Model:
    """SANA's parts, 64x64 pictures, made in memory: for smoke runs."""
    vae = dict(
        latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock", scaling_factor=0.41407,
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4, encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4,
    )  # fmt: skip
    net = dict(in_channels=4, out_channels=4, sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_channels=16,
               num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16)  # fmt: skip
    return FAMILY.tiny("tiny-sana", TINY | dict(num_hidden_layers=2), vae, net)


def sketch(name: str) -> Model:
    return FAMILY.sketch(name, GEMMA_2B, VAE, TRANSFORMERS[name])

"""FLUX.2 klein (Black Forest Labs, 2026): tokens of 2x2 latents with four coordinates, prompts by three layers of Qwen 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.shift import Shift
from distill_cli.models.codec import PatchedCodec
from distill_cli.models.family import TINY_VAE, Family, Transformer
from distill_cli.models.language import QWEN3_4B, TINY, Wording
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler


class Flux2Transformer(Transformer):
    """diffusers' Flux2Transformer2DModel on latents that are packed already (models/codec.py); its time is t."""

    inputs = frozenset({"encoder_hidden_states"})
    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    lora = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    )
    widths: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "joint_attention_dim"}
    unmet: ClassVar[Mapping[str, str]] = {"guidance_embeds": "a guidance scale inside, as a distilled model does"}
    usual = 64
    comfyui = ""

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        height, width = x.shape[2:]
        text = condition.parts["encoder_hidden_states"]
        zero, rows, columns, words = (torch.arange(n, device=x.device) for n in (1, height, width, text.shape[1]))
        places = dict(img_ids=torch.cartesian_prod(zero, rows, columns, zero), txt_ids=torch.cartesian_prod(zero, zero, zero, words))
        out = self.net(x.flatten(2).mT, text, time / 1000, **places, return_dict=False)[0]
        return out.mT.unflatten(2, (height, width))

    def features(self, answer: Any, x: Tensor, condition: Condition) -> Tensor:
        """The tokens of the picture; the block answers with those of the text before them."""
        return answer[1]


FAMILY = Family(
    pipelines=("Flux2KleinPipeline",),
    since={"diffusers": "0.37", "transformers": "4.51"},
    text_encoder="Qwen3ForCausalLM",
    vae="AutoencoderKLFlux2",
    transformer="Flux2Transformer2DModel",
    backbone=Flux2Transformer,
    tokenizers=("Qwen2Tokenizer",),
    wording=Wording(length=512, layers=(9, 18, 27), chat={"enable_thinking": False}, masked=False),
    sampler=Sampler(solver="euler", steps=50, guidance_scale=4.0),
    shift=3.0,
    codec=PatchedCodec,
    numbers=(),
    moving=Shift("tokens and steps"),
    dynamic=True,
    distilled=("is_distilled",),
)
TRANSFORMER = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False)
"""By diffusers' scripts/convert_flux2_to_diffusers.py."""


def tiny() -> Model:
    """FLUX.2 klein's parts, 64x64 pictures, made in memory: for smoke runs."""
    net = dict(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=48,
               timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False)  # fmt: skip
    kept = ("block_out_channels", "layers_per_block", "norm_num_groups", "sample_size", "down_block_types", "up_block_types")
    vae = {key: TINY_VAE[key] for key in kept} | dict(latent_channels=4)
    return FAMILY.tiny("tiny-klein", TINY | dict(num_hidden_layers=28), vae, net).with_size((4, 4))


def sketch(name: str) -> Model:
    return FAMILY.sketch(name, QWEN3_4B, {}, TRANSFORMER)

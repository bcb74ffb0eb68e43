"""Z-Image (2511.22699): text and picture in one sequence, prompts by Qwen 3, time from noise (0) to data (1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_cli.diffusion.condition import Condition
from distill_cli.models.family import FLUX_VAE, TINY_VAE, Family, Transformer
from distill_cli.models.language import MASK, QWEN3_4B, TINY, Wording, lengths_of, planned
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler


class ZImageTransformer(Transformer):
    """diffusers' ZImageTransformer2DModel on lists of pictures and texts; its time is 1 - t, and its answer x0 - noise."""

    blocks, stack = ("ZImageTransformerBlock",), "layers"
    lora = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    widths: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "cap_feat_dim"}
    unmet: ClassVar[Mapping[str, str]] = {"siglip_feat_dim": "pictures as a condition"}
    usual = 128
    comfyui = "ModelSamplingAuraFlow"

    @property
    def most(self) -> float:
        return self.multiple * min(self.net.config.axes_lens[1:])

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        text, mask = condition.parts["encoder_hidden_states"], condition.parts[MASK]
        texts = [each[:count] for each, count in zip(text, lengths_of(mask), strict=True)]
        place = self.net.rope_embedder
        if place.freqs_cis is not None and planned(mask) | planned(place.freqs_cis[0]):  # a plan's table has no numbers
            place.freqs_cis = None
        answers = self.net(list(x[:, :, None]), (1000 - time) / 1000, texts, return_dict=False)[0]
        return -torch.stack(answers)[:, :, 0]

    @property
    def width(self) -> int:
        return self.net.dim

    def features(self, answer: Any, x: Tensor, condition: Condition) -> Tensor:
        """The tokens of the picture, which stand first."""
        return answer[:, : self.tokens((x.shape[1], x.shape[2], x.shape[3]))]


FAMILY = Family(
    pipelines=("ZImagePipeline",),
    since={"diffusers": "0.39", "transformers": "4.51"},
    text_encoder="Qwen3Model",
    vae="AutoencoderKL",
    transformer="ZImageTransformer2DModel",
    backbone=ZImageTransformer,
    tokenizers=("Qwen2Tokenizer",),
    wording=Wording(length=512, layers=(-2,), chat={"enable_thinking": True}),
    sampler=Sampler(solver="euler", steps=50, guidance_scale=6.0),
    shift=6.0,
    less=1.0,
    turbo=(3.0, "Z-Image-Turbo"),
)


def tiny() -> Model:
    """Z-Image's parts, 64x64 pictures, made in memory: for smoke runs."""
    net = dict(
        dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[576, 64, 64]
    )
    return FAMILY.tiny("tiny-z-image", TINY | dict(num_hidden_layers=3), TINY_VAE, net).with_size((8, 8))


def sketch(name: str) -> Model:
    """By public copies of the published transformer/config.json."""
    return FAMILY.sketch(name, QWEN3_4B, FLUX_VAE, dict(axes_lens=[1536, 512, 512]))

"""Lumina-Image 2.0 (Qin et al. 2503.21758): text and picture in one sequence, prompts by Gemma 2, time from noise (0) to data (1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill_cli.diffusion.condition import Condition
from distill_cli.models.family import FLUX_VAE, TINY_VAE, Family, Transformer
from distill_cli.models.language import GEMMA_2B, MASK, TINY, Wording, lengths_of
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler


class Positions(nn.Module):
    """In the place of the network's `rope_embedder`, which asks a mask for numbers: so plans, which have no data, are counted too."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.theta, self.dims, self.patch = inner.theta, inner.axes_dim, inner.patch_size

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int], list[int]]:
        """Patches (B, N, CPP), rotations of text, picture and both, complex, and how long text and both are."""
        height, width, texts = x.shape[2] // self.patch, x.shape[3] // self.patch, lengths_of(mask)
        with x.device:
            row, column = (each.flatten() for each in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
            words = [torch.stack([torch.arange(n), *[torch.zeros(n, dtype=torch.long)] * 2], 1) for n in texts]
            places = [torch.stack([torch.full_like(row, n), row, column], 1) for n in texts]
        both = [torch.cat(pair) for pair in zip(words, places, strict=True)]
        every = (self.rotations(x, words, mask.shape[1]), self.rotations(x, places), self.rotations(x, both))
        patches = x.unflatten(3, (width, self.patch)).unflatten(2, (height, self.patch)).permute(0, 2, 4, 3, 5, 1)
        return patches.flatten(3).flatten(1, 2), *every, texts, [len(each) for each in both]

    def rotations(self, x: Tensor, places: list[Tensor], most: int = 0) -> Tensor:
        """(B, N, D) of tokens at three coordinates each, filled up to the longest."""
        filled = nn.utils.rnn.pad_sequence(places, batch_first=True).double()
        filled = nn.functional.pad(filled, (0, 0, 0, max(0, most - filled.shape[1])))
        steps = [torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim for dim in self.dims]
        angles = torch.cat([filled[..., k, None] * self.theta**-step for k, step in enumerate(steps)], -1)
        return torch.polar(torch.ones_like(angles), angles)


class Lumina2Transformer(Transformer):
    """diffusers' Lumina2Transformer2DModel; its time is 1 - t, and its answer x0 - noise."""

    blocks, stack = ("Lumina2TransformerBlock",), "layers"
    lora = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
    widths: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "cap_feat_dim"}

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        if not isinstance(net.rope_embedder, Positions):
            net.rope_embedder = Positions(net.rope_embedder)

    @property
    def most(self) -> float:
        return self.multiple * min(self.net.config.axes_lens[1:])

    def tokens(self, shape: tuple[int, int, int]) -> int:
        """The pipeline takes the channels for tokens."""
        return shape[0]

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return -self.net(x, timestep=1 - time / 1000, **condition.parts, return_dict=False)[0]

    @property
    def width(self) -> int:
        return self.net.config.hidden_size

    def features(self, answer: Any, x: Tensor, condition: Condition) -> Tensor:
        """The tokens of the picture, which stand behind those of each text."""
        count = x.shape[2] * x.shape[3] // self.multiple**2
        rows = (condition.parts[MASK] > 0).sum(1)[:, None] + torch.arange(count, device=answer.device)
        return answer.gather(1, rows[..., None].expand(-1, -1, answer.shape[-1]))


def system_prompt() -> str:
    """What Gemma reads before a prompt: the model was trained with it."""
    from diffusers import Lumina2Pipeline

    nothing: Any = dict.fromkeys(("transformer", "scheduler", "vae", "text_encoder", "tokenizer"))
    return f"{Lumina2Pipeline(**nothing).system_prompt} <Prompt Start> "


FAMILY = Family(
    pipelines=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
    since={"diffusers": "0.33", "transformers": "4.42"},
    text_encoder="Gemma2Model",
    vae="AutoencoderKL",
    transformer="Lumina2Transformer2DModel",
    backbone=Lumina2Transformer,
    tokenizers=("GemmaTokenizer",),
    wording=Wording(length=256, layers=(-2,), before=system_prompt, right=True),
    sampler=Sampler(solver="euler", steps=30, guidance_scale=4.0, rule="renormed rows"),
    shift=6.0,
)


def tiny() -> Model:
    """Lumina's parts, 64x64 pictures, made in memory: for smoke runs."""
    net = dict(sample_size=8, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
               axes_dim_rope=(4, 4, 4), axes_lens=(300, 64, 64), cap_feat_dim=16)  # fmt: skip
    return FAMILY.tiny("tiny-lumina2", TINY | dict(num_hidden_layers=3), TINY_VAE, net)


def sketch(name: str) -> Model:
    """By public copies of the published transformer/config.json."""
    return FAMILY.sketch(name, GEMMA_2B, FLUX_VAE, dict(cap_feat_dim=2304))

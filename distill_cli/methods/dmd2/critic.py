"""The discriminator of DMD2 (Yin et al. 2405.14867, section 4.3): a head on features of a denoiser, from noisy images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.errors import UsageError
from distill_cli.models.backbones import Backbone

WIDTH = 256
NUDGE = 0.01
"""Standard deviation of the noise on real images by which R1's gradient is measured (Lin et al. 2501.08316, section 3.3)."""


class Head(nn.Module):
    """A number for each sample from features (B, N, width) of N places: layers at each place, whose answers are averaged."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B,) logits, above 0 for what looks real; in float32, because R1 compares logits that are near to each other."""
        with torch.autocast(features.device.type, enabled=False):
            inner = F.silu(self.inner(self.norm(features.float())))
            return self.outer(inner.mean(1))[:, 0]


@contextmanager
def tapped(backbone: Backbone) -> Iterator[list[Tensor]]:
    """A list that gets the features (B, N, width) of the backbone's calls inside the body."""
    found: list[Tensor] = []
    asked: list[Any] = []

    def ask(module: nn.Module, inputs: Any) -> None:
        asked[:] = inputs

    def keep(module: nn.Module, inputs: Any, answer: Any) -> None:
        x, _, condition = asked
        found.append(backbone.features(answer, x, condition))

    layer, _ = backbone.middle()
    handles = [backbone.register_forward_pre_hook(ask), layer.register_forward_hook(keep)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def features_of(denoiser: NetworkDenoiser, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """The estimate of x0 (B, C, H, W), and the features (B, N, width) that it went through."""
    backbone: Any = denoiser.network
    with tapped(backbone) as found:
        estimate = denoiser(x, t, condition)
    return estimate, found[0]


class Critic(nn.Module):
    """The fake score with a discriminator's head on its own features, or on given ones of another denoiser."""

    def __init__(self, denoiser: NetworkDenoiser, seed: int) -> None:
        super().__init__()
        backbone: Any = denoiser.network
        with torch.device(next(denoiser.parameters()).device):
            self.denoiser, self.head = denoiser, Head(backbone.middle()[1], seed)

    def forward(self, x: Tensor, t: Tensor, condition: Condition = NOTHING, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The estimate of x0 (B, C, H, W), and the logits of its own features (B,), or of those that are given."""
        if features is not None:
            return self.denoiser(x, t, condition), self.head(features)
        estimate, features = features_of(self.denoiser, x, t, condition)
        return estimate, self.head(features)


def check(compile_mode: str, backbone: Backbone) -> None:
    """Raise UsageError where a compiled graph would hide the layer that the discriminator reads."""
    inside = type(backbone.middle()[0]).__name__ in backbone.blocks
    if compile_mode == "whole" or (compile_mode == "blocks" and inside):
        raise UsageError(f"compile {compile_mode}: not with gan, whose discriminator reads inside what is compiled", "compile=none")

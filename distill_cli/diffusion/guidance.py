"""Guidance wraps a denoiser and is again a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_cli.diffusion.condition import GUIDANCE_SCALE, NOTHING, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import expand


class Guided:
    """Classifier-free guidance (Ho & Salimans 2207.12598): uncond + scale (cond - uncond).

    Where a paper's weight is w = scale - 1, convert before. `null` is the null condition of one sample. Without a `scale`, each sample's
    own is the part GUIDANCE_SCALE of the condition.
    Both come from one call of twice the batch, or from two `calls` of half the memory.
    The same combination of noise predictions gives the same x0, so it does not matter which of them is combined.
    """

    def __init__(self, denoiser: Denoiser, scale: float | None, null: Condition, calls: int = 1) -> None:
        self.denoiser, self.scale, self.null, self.calls = denoiser, scale, null, calls

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        scale: float | Tensor | None = self.scale
        if scale is None:
            told, condition = condition.parted(GUIDANCE_SCALE)
            scale = expand(told, x)
        cond, uncond = self.both(x, t, condition)
        return uncond + scale * (cond - uncond)

    def both(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional estimate."""
        if not condition:
            raise ValueError("guidance needs a condition")
        self.null = self.null.to(x.device)  # copied once
        null = self.null.like(condition)
        if self.calls == 1:
            cond, uncond = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), Condition.cat([condition, null])).chunk(2)
            return cond, uncond
        return self.denoiser(x, t, condition), self.denoiser(x, t, null)


class Told:
    """A denoiser that is told its guidance scale, as one that is not: it is always told the same."""

    def __init__(self, denoiser: Denoiser, scale: float) -> None:
        self.denoiser, self.scale = denoiser, scale

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        return self.denoiser(x, t, condition.plus(GUIDANCE_SCALE, torch.full((len(x),), self.scale, device=x.device)))


def scales(span: tuple[float, float], draws: Draws) -> Tensor:
    """(B,) float32 guidance scales on the CPU, each sample's own, even in a range."""
    low, high = span
    return (low + (high - low) * draws.uniform("guidance")).float()


def guided(denoiser: Denoiser, scale: float | None, null: Condition | None, calls: int = 1) -> Denoiser:
    """`denoiser` under guidance; the denoiser itself where scale is 1 (no second evaluation)."""
    if scale == 1 or null is None:
        return denoiser
    return Guided(denoiser, scale, null, calls)

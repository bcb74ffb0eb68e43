"""Guidance wraps a denoiser and is again a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_cli.diffusion.denoiser import Condition, Denoiser


class Guided:
    """Classifier-free guidance (Ho & Salimans 2207.12598): uncond + scale (cond - uncond).

    Where a paper's weight is w = scale - 1, convert before. `null` is the null condition of one sample, (...).
    The same combination of noise predictions gives the same x0, so it does not matter which of them is combined.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null: Tensor) -> None:
        self.denoiser, self.scale, self.null = denoiser, scale, null

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        if condition is None:
            raise ValueError("guidance needs a condition")
        null = self.null.to(condition.device, condition.dtype).expand_as(condition)
        both = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null]))
        cond, uncond = both.chunk(2)
        return uncond + self.scale * (cond - uncond)


def guided(denoiser: Denoiser, scale: float, null: Tensor | None) -> Denoiser:
    """`denoiser` under guidance; the denoiser itself where scale is 1 (no second evaluation)."""
    if scale == 1 or null is None:
        return denoiser
    return Guided(denoiser, scale, null)

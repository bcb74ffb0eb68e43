"""Guidance wraps a denoiser and is again a denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distill_cli.config.base import GuidanceRule
from distill_cli.diffusion.condition import GUIDANCE_SCALE, NOTHING, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.losses import wide
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import NoiseSchedule, expand
from distill_cli.diffusion.transfer import sent


class Guidance(ABC):
    """A denoiser under guidance, which also tells the conditional estimate that it began with."""

    @abstractmethod
    def estimates(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The conditional and the guided estimate, (B, C, H, W) each."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        return self.estimates(x, t, condition)[1]


def estimates(denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """The conditional and the guided estimate; without guidance both are the same."""
    if isinstance(denoiser, Guidance):
        return denoiser.estimates(x, t, condition)
    estimate = denoiser(x, t, condition)
    return estimate, estimate


def _renormed(x: Tensor, cond: Tensor, led: Tensor) -> Tensor:
    """x_t - x0 of `led`, as long as that of `cond` in each row of pixels. In flow matching it is t times the flow, so t does not matter."""
    own, other = x - cond, x - led
    ratio = own.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return x - other * ratio


RULES: dict[GuidanceRule, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda x, cond, led: led,
    "renormed rows": _renormed,  # Lumina2Pipeline's cfg_normalization
}
"""Rule -> (x_t, the conditional estimate, uncond + scale (cond - uncond)) -> the guided estimate, each (B, C, H, W)."""


class Guided(Guidance):
    """Classifier-free guidance (Ho & Salimans 2207.12598): uncond + scale (cond - uncond).

    Where a paper's weight is w = scale - 1, convert before. `null` is the null condition of one sample. Without a `scale`, each sample's
    own is the part GUIDANCE_SCALE of the condition.
    Both come from one call of twice the batch, or from two `calls` of half the memory.
    The same combination of noise predictions gives the same x0, so it does not matter which of them is combined.
    `rule`: what a family's pipeline does with the combination.
    """

    def __init__(self, denoiser: Denoiser, scale: float | None, null: Condition, calls: int = 1, rule: GuidanceRule = "plain") -> None:
        self.denoiser, self.scale, self.null, self.calls, self.rule = denoiser, scale, null, calls, RULES[rule]

    def estimates(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        scale: float | Tensor | None = self.scale
        if scale is None:
            told, condition = condition.parted(GUIDANCE_SCALE)
            scale = expand(told, x)
        cond, uncond = self.both(x, t, condition)
        return cond, self.rule(x, cond, uncond + scale * (cond - uncond))

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


class Unconditional(Guidance):
    """The denoiser under its null condition, whatever it is asked for: classifier-free guidance of scale 0."""

    def __init__(self, denoiser: Denoiser, null: Condition) -> None:
        self.denoiser, self.null = denoiser, null

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        self.null = self.null.to(x.device)
        return self.denoiser(x, t, self.null.like(condition))

    def estimates(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        return self.denoiser(x, t, condition), self(x, t, condition)


def guided(denoiser: Denoiser, scale: float | None, null: Condition | None, calls: int = 1, rule: GuidanceRule = "plain") -> Denoiser:
    """`denoiser` under classifier-free guidance; itself at scale 1, and the unconditional one at scale 0 (no second evaluation)."""
    if scale == 1 or null is None:
        return denoiser
    return Unconditional(denoiser, null) if scale == 0 else Guided(denoiser, scale, null, calls, rule)


class Guide(Protocol):
    """What leads a denoiser besides its own condition: the gradient of log p(what is asked for | x_t) by x_t, or another one's."""

    scale: float
    """The factor of the gradient."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The denoiser's estimate of x0 and the gradient at x_t = x, (B, C, H, W) each.

        What is asked for is a part of the condition whose name begins with GUIDE; zeros ask for nothing, and have no gradient.
        """


class Steered(Guidance):
    """D(x_t) + scale sigma^2/alpha gradient: the estimate whose score is the denoiser's plus scale times a guide's gradient.

    Dhariwal & Nichol 2105.05233, section 4.1: the score is (alpha D - x_t) / sigma^2. Without signal (alpha = 0) the term is left out.
    """

    def __init__(self, denoiser: Denoiser, schedule: NoiseSchedule, guide: Guide) -> None:
        self.denoiser, self.schedule, self.guide = denoiser, schedule, guide

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        return self._steer(self.denoiser, x, t, condition)

    def _steer(self, denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        estimate, gradient = self.guide(denoiser, x, t, condition)
        t = sent(t, x.device, torch.promote_types(x.dtype, torch.float32))
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        factor = torch.where(a > 0, s * s / a.clamp(min=torch.finfo(a.dtype).tiny), 0)
        return estimate + self.guide.scale * expand(factor, x) * gradient

    def estimates(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        first: list[Tensor] = []

        def once(x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
            cond, base = estimates(self.denoiser, x, t, condition)
            first.append(cond.detach())
            return base

        out = self._steer(once, x, t, condition)
        return first[0], out


def steered(denoiser: Denoiser, schedule: NoiseSchedule, guides: Sequence[Guide]) -> Denoiser:
    """`denoiser` led by each of the guides."""
    for guide in guides:
        denoiser = Steered(denoiser, schedule, guide)
    return denoiser


def gradient_of(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient (B, C, H, W) of `score`, (B, C, H, W) -> (B,), at x: in float32 or better, under torch.no_grad and autocast too.

    Samples must not depend on each other in `score`.
    """
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = wide(x.detach()).requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(x).sum(), x)
    return gradient

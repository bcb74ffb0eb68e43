"""Shifts of flow matching that depend on the size of a picture: diffusers' "dynamic shifting" (Esser et al. 2403.03206, section 5.3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from distill_cli.errors import DistillError

Rule = Literal["tokens", "tokens and steps"]


@dataclass(frozen=True)
class Shift:
    """The shift of a picture of so many `tokens`; the numbers are those of a scheduler's configuration."""

    rule: Rule = "tokens"
    tokens: int = 256
    base_tokens: int = 256
    most_tokens: int = 4096
    base: float = 0.5
    most: float = 1.15
    kind: Literal["exponential", "linear"] = "exponential"
    usual_steps: int = 50
    """The number of steps by which training is shifted, where the shift depends on it."""

    def of(self, steps: int | None = None) -> float:
        """The shift of a solver of so many steps; None: that of training."""
        mu = MU[self.rule](self, steps or self.usual_steps)
        shift = math.exp(mu) if self.kind == "exponential" else mu
        if shift <= 0:
            raise DistillError(f"a shift by size that is {shift:.3g} for {self.tokens} tokens", "look at base_shift and max_shift")
        return shift

    def sized(self, tokens: int) -> Shift:
        return replace(self, tokens=tokens)


def _line(shift: Shift, steps: int) -> float:
    """From `base` at `base_tokens` to `most` at `most_tokens`, and on beyond both."""
    slope = (shift.most - shift.base) / (shift.most_tokens - shift.base_tokens)
    return shift.base + slope * (shift.tokens - shift.base_tokens)


def _empirical(shift: Shift, steps: int) -> float:
    """FLUX.2's: two lines over the tokens, of 10 and of 200 steps, and a line between them over the steps."""
    many = 0.00016927 * shift.tokens + 0.45666666
    if shift.tokens > 4300:
        return many
    few = 8.73809524e-05 * shift.tokens + 1.89833333
    return many + (few - many) * (200 - steps) / 190


MU: dict[Rule, Callable[[Shift, int], float]] = {"tokens": _line, "tokens and steps": _empirical}
"""mu by a rule: the pipelines' `calculate_shift`, and Flux2KleinPipeline's `compute_empirical_mu`."""

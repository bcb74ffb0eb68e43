"""The gradient of distribution matching in its two parts, and the times at which each is taken."""

from __future__ import annotations

from torch import Tensor, finfo

from distill_cli.diffusion.schedule import NoiseSchedule, expand


def matching_part(x: Tensor, fake: Tensor, cond: Tensor, guided: Tensor) -> Tensor:
    """(fake - cond) / mean |x - guided| of each sample: pulls the student's images to where the conditional teacher finds more of them.

    x: the student's images; `fake`, `cond`, `guided`: estimates of x0 at the same noisy x by fake score, conditional and guided teacher;
    all (B, C, H, W), float32 or better. At equal times the two parts add up to the gradient of DMD (Liu et al. 2511.22677, section 3).
    """
    return (fake - cond) / distance_to(x, guided)


def guidance_part(x: Tensor, cond: Tensor, guided: Tensor) -> Tensor:
    """(cond - guided) / mean |x - guided| of each sample, where guided - cond = (scale - 1) (cond - uncond)."""
    return (cond - guided) / distance_to(x, guided)


def distance_to(x: Tensor, guided: Tensor) -> Tensor:
    """(B, 1, 1, 1) mean |x - guided| of each sample, above zero."""
    distance = (x - guided).abs().flatten(1).mean(1)
    return expand(distance.clamp(min=finfo(distance.dtype).tiny), x)


def shares(where: str, schedule: NoiseSchedule, times: Tensor, step: int, low: float, high: float) -> tuple[float, float]:
    """The smallest and the largest share of the range of times at which the answer of step 0, 1, ... is given noise again.

    times (N,): the student's own, decreasing; the first step begins with pure noise, whatever time it is told. `where`: range, stretch,
    noisier (see the key matching_times); all within low to high.
    """
    borders = [1.0, *schedule.fraction(times).tolist()[1:], 0.0]
    first, last = {"range": (0.0, 1.0), "stretch": (borders[step + 1], borders[step]), "noisier": (borders[step + 1], 1.0)}[where]
    first = min(max(first, low), high)
    return first, max(first, min(last, high))

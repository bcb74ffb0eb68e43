"""Progressive distillation's mathematics (Salimans & Ho 2202.00512): the grid of times, the target of a step, and its weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.schedule import NoiseSchedule, expand
from distill_cli.errors import UsageError

END = -1.0
"""The time after the last step, at which nothing but the image is left (alpha 1, sigma 0)."""


def rounds(first: int, last: int) -> list[int]:
    """The steps of the student of each round: from the teacher's `first` steps halved down to `last`.

    Raises UsageError where halving `first` does not lead to `last`.
    """
    count = round(math.log2(first / last)) if first > last else 0
    if count < 1 or last * 2**count != first:
        near = sorted({last * 2**k for k in (max(1, count - 1), max(1, count), count + 1)})
        raise UsageError(
            f"first_steps {first}: halving does not lead to {last} step{'s' * (last > 1)}", f"first_steps={' or '.join(map(str, near))}"
        )
    return [first // 2**k for k in range(1, count + 1)]


def grid(schedule: NoiseSchedule, steps: int, spacing: str) -> Tensor:
    """(steps + 1,) float64 decreasing times, from t_max to END, of a teacher that takes `steps` steps.

    `schedule`: the schedule's own. `angle`: even in arctan(sigma / alpha), which is the paper's cosine schedule; whole times where the
    schedule has whole times alone. Every second time is nearly the grid of half the steps, and is what the student of a round gets.
    """
    if spacing == "schedule":
        times = schedule.times(steps).double()
    else:
        start = torch.tensor(schedule.t_max, dtype=torch.float64)
        widest = torch.atan2(schedule.sigma(start), schedule.alpha(start))
        times = schedule.time((widest * torch.arange(steps, 0, -1, dtype=torch.float64) / steps).tan())
        times = times if schedule.bins is None else times.round()
        times[0] = start
    return torch.cat([times, torch.tensor([END], dtype=torch.float64)])


def check_falling(times: Tensor, spacing: str) -> None:
    """Raise UsageError where two times of a grid are the same: a table has only so many."""
    if not (times[1:] < times[:-1]).all():
        raise UsageError(f"first_steps {len(times) - 1}: the table has too few times for spacing {spacing}", "fewer first_steps")


def coefficients(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at times t (B,), END among them, in float64."""
    t = t.double()
    alpha, sigma = schedule.alpha(t.clamp(min=0)), schedule.sigma(t.clamp(min=0))
    return torch.where(t < 0, 1.0, alpha), torch.where(t < 0, 0.0, sigma)


def target(
    teacher: Denoiser, schedule: NoiseSchedule, x: Tensor, t: Tensor, middle: Tensor, end: Tensor, condition: Condition = NOTHING
) -> Tensor:
    """The estimate of x0 by which one DDIM step from `t` to `end` arrives where two steps of the teacher do, over `middle` (appendix G).

    x is x_t, (B, C, H, W); the times are (B,), and `end` may be END. With z' and z'' the teacher's points at `middle` and `end`, the
    paper has x~ = (z'' - sigma''/sigma_t z_t) / (alpha'' - sigma''/sigma_t alpha_t). Put in, z_t drops out, and x~ is a weighted mean
    of the teacher's two estimates: nothing is lost to rounding where sigma is large or a step is small.
    """
    (a, s), (a1, s1), (a2, s2) = (coefficients(schedule, time) for time in (t, middle, end))
    first = teacher(x, t, condition)
    between = expand(a1, x) * first + expand(s1 / s, x) * (x - expand(a, x) * first)
    second = teacher(between, middle, condition)
    share = s2 / s1 * (a1 - s1 / s * a) / (a2 - s2 / s * a)
    return second + expand(share, x) * (first - second)


def weight(kind: str, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """(B,) float64 weights of the squared error of x0 (section 4): `snr+1`, or `truncated-snr`, which is the SNR, 1 at least."""
    a, s = coefficients(schedule, t)
    snr = (a / s) ** 2
    if kind == "snr+1":
        return snr + 1
    if kind == "truncated-snr":
        return snr.clamp(min=1)
    raise ValueError(f"weighting {kind!r} is none of snr+1, truncated-snr")

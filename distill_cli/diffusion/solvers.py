"""Samplers as plain functions: from x at times[0] to an estimate of x0.

`times` (N,) decrease and end above zero noise; the step from the last one to zero noise is the denoiser's own
estimate, which is what Euler's step to sigma = 0 gives. Every solver works in (alpha, sigma), so one function
serves EDM, Stable Diffusion and flow matching. `noise(k)` returns the fresh standard-normal noise of step k,
(B, C, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.schedule import NoiseSchedule, expand
from distill_cli.diffusion.transfer import sent

Noise = Callable[[int], Tensor]


def _at(schedule: NoiseSchedule, t: Tensor) -> tuple[float, float]:
    t = t.double()
    return schedule.alpha(t).item(), schedule.sigma(t).item()


def _call(denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return denoiser(x, sent(t, x.device, x.dtype).expand(len(x)), condition)


def ddim_step(schedule: NoiseSchedule, x: Tensor, x0: Tensor, t: Tensor, r: Tensor, noise: Callable[[], Tensor] | None = None) -> Tensor:
    """x at the less noisy times r (B,) from x at times t (B,) and an estimate x0 of it (Song et al. 2010.02502, eq. 12 and 16).

    Without noise (eta 0) an Euler step of the ODE in (x / alpha, sigma / alpha); with `noise` (eta 1) DDPM's ancestral sampling.
    The coefficients are float64. Fine where alpha(t) = 0 (zero terminal SNR).
    """
    t, r = t.double(), r.double()
    (a, s), (a_next, s_next) = ((schedule.alpha(k), schedule.sigma(k)) for k in (t, r))
    variance = torch.zeros_like(s)
    if noise is not None:
        variance = ((s_next / s) ** 2 * (s**2 - (a / a_next * s_next) ** 2)).clamp(min=0)
    x = expand(a_next, x) * x0 + expand((s_next**2 - variance).clamp(min=0).sqrt() / s, x) * (x - expand(a, x) * x0)
    if noise is not None:
        x = x + expand(variance.sqrt(), x) * noise()
    return x


def ddim(
    denoiser: Denoiser, schedule: NoiseSchedule, x: Tensor, times: Tensor, condition: Condition = NOTHING, noise: Noise | None = None
) -> Tensor:
    """DDIM (Euler's steps of the ODE), with `noise` ancestral sampling: `ddim_step` by step. First order; one evaluation a time."""
    for k, (t, after) in enumerate(zip(times, times[1:])):
        x0 = _call(denoiser, x, t, condition)
        x = ddim_step(schedule, x, x0, t.expand(len(x)), after.expand(len(x)), noise and partial(noise, k))
    return _call(denoiser, x, times[-1], condition)


@dataclass(frozen=True)
class Churn:
    """New noise in each step of Heun's method: S_churn, S_tmin, S_tmax and S_noise of Karras et al. 2022, table 5, for ImageNet-64.

    At noise levels from `low` to `high` the level grows by the factor 1 + min(amount / N, sqrt(2) - 1).
    """

    amount: float = 40.0
    low: float = 0.05
    high: float = 50.0
    swell: float = 1.003

    def raised(self, level: float, steps: int, most: float) -> float:
        """The level to which a step of `steps` raises `level`; at most `most`."""
        return min(level * (1 + min(self.amount / steps, 2**0.5 - 1)), most) if self.low <= level <= self.high else level


def heun(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Tensor,
    condition: Condition = NOTHING,
    noise: Noise | None = None,
    churn: Churn = Churn(),
) -> Tensor:
    """Heun's method, Karras et al. 2022, algorithm 1, in y = x / alpha over sigma / alpha. Second order, 2N - 1 evaluations.

    With `noise` their algorithm 2: `churn` says how much of it is added before each step.
    """
    most = 0.0
    for k, (t, after) in enumerate(zip(times, times[1:])):
        a, s = _at(schedule, t)
        level, y = s / a, x / a
        most = most or level
        if noise is not None and (raised := churn.raised(level, len(times), most)) > level:
            y = y + (raised**2 - level**2) ** 0.5 * churn.swell * noise(k)
            level, t = raised, schedule.time(torch.tensor([raised], dtype=torch.float64))[0]
            a, _ = _at(schedule, t)
        slope = (y - _call(denoiser, a * y, t, condition)) / level
        a_next, s_next = _at(schedule, after)
        next_level = s_next / a_next
        ahead = y + (next_level - level) * slope
        corrected = _call(denoiser, a_next * ahead, after, condition)
        x = a_next * (y + (next_level - level) * 0.5 * (slope + (ahead - corrected) / next_level))
    a, _ = _at(schedule, times[-1])
    return _call(denoiser, a * (x / a), times[-1], condition)  # rounded as in every step


def dpm(denoiser: Denoiser, schedule: NoiseSchedule, x: Tensor, times: Tensor, condition: Condition = NOTHING) -> Tensor:
    """DPM-Solver++ (Lu et al. 2211.01095, algorithm 2: second order, multistep). One evaluation a time; alpha is above 0.

    From the second step on a line through the last two estimates, in lambda = ln(alpha / sigma), takes the place of the estimate.
    """
    before, h_before = x, 0.0
    for t, after in zip(times, times[1:]):
        (a, s), (a_next, s_next) = _at(schedule, t), _at(schedule, after)
        h = math.log(a_next / s_next) - math.log(a / s)
        x0 = _call(denoiser, x, t, condition)
        line = x0 + h / (2 * h_before) * (x0 - before) if h_before else x0
        x = s_next / s * x - a_next * math.expm1(-h) * line
        before, h_before = x0, h
    return _call(denoiser, x, times[-1], condition)


def renoised(schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor, sigma_min: float = 0.0) -> Tensor:
    """x at the time t, a scalar, from an estimate x0 (B, ...) and new standard-normal noise of its shape.

    The noise has standard deviation sqrt(sigma^2 - sigma_min^2); consistency models give their sigma_min.
    """
    a, s = _at(schedule, t)
    return a * x0 + max(0.0, s**2 - sigma_min**2) ** 0.5 * noise


def few_step(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Tensor,
    condition: Condition = NOTHING,
    *,
    sigma_min: float = 0.0,
    noise: Noise | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x0, renoise, x0, ...: the sampler of one- and few-step students (Song et al. 2303.01469, algorithm 1).

    Between two steps x0 is `renoised`. `project` takes each x0 before it is used: zero-shot edits put back there what is known (the
    paper's algorithm 4).
    """
    x0 = x
    for k, t in enumerate(times):
        if k:
            assert noise is not None, "several steps need noise"
            x = renoised(schedule, x0, t, noise(k), sigma_min)
        x0 = _call(denoiser, x, t, condition)
        if project:
            x0 = project(x0)
    return x0

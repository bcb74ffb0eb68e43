"""Samplers as plain functions: from x at times[0] to an estimate of x0.

`times` (N,) decrease and end above zero noise; the step from the last one to zero noise is the denoiser's own
estimate, which is what Euler's step to sigma = 0 gives. Every solver works in (alpha, sigma), so one function
serves EDM, Stable Diffusion and flow matching. `noise(k)` returns the fresh standard-normal noise of step k,
(B, C, H, W); `callback(k, x, x0)` sees each step's state and estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.schedule import NoiseSchedule, expand

Callback = Callable[[int, Tensor, Tensor], None]
Noise = Callable[[int], Tensor]


def _at(schedule: NoiseSchedule, t: Tensor) -> tuple[float, float]:
    t = t.double()
    return schedule.alpha(t).item(), schedule.sigma(t).item()


def _call(denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return denoiser(x, t.to(x.device, x.dtype).expand(len(x)), condition)


def ddim_step(
    schedule: NoiseSchedule, x: Tensor, x0: Tensor, t: Tensor, r: Tensor, eta: float = 0.0, noise: Callable[[], Tensor] | None = None
) -> Tensor:
    """x at the less noisy times r (B,) from x at times t (B,) and an estimate x0 of it (Song et al. 2010.02502, eq. 12 and 16).

    eta 0 is deterministic: an Euler step of the ODE in (x / alpha, sigma / alpha). eta 1 is DDPM's ancestral sampling, which adds `noise`.
    The coefficients are float64. Fine where alpha(t) = 0 (zero terminal SNR).
    """
    t, r = t.double(), r.double()
    (a, s), (a_next, s_next) = ((schedule.alpha(k), schedule.sigma(k)) for k in (t, r))
    variance = torch.zeros_like(s)
    if eta:
        variance = ((eta * s_next / s) ** 2 * (s**2 - (a / a_next * s_next) ** 2)).clamp(min=0)
    x = expand(a_next, x) * x0 + expand((s_next**2 - variance).clamp(min=0).sqrt() / s, x) * (x - expand(a, x) * x0)
    if eta:
        assert noise is not None, "eta > 0 needs noise"
        x = x + expand(variance.sqrt(), x) * noise()
    return x


def ddim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Tensor,
    condition: Condition = NOTHING,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM, step by step (`ddim_step`). First order; one evaluation a time."""
    for k, t in enumerate(times):
        x0 = _call(denoiser, x, t, condition)
        if callback:
            callback(k, x, x0)
        if k + 1 == len(times):
            return x0
        x = ddim_step(schedule, x, x0, t.expand(len(x)), times[k + 1].expand(len(x)), eta, noise and partial(noise, k))
    raise ValueError("no times")


def euler(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Tensor,
    condition: Condition = NOTHING,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Euler steps of the probability-flow ODE in (x / alpha, sigma / alpha), which are DDIM's steps with eta 0."""
    return ddim(denoiser, schedule, x, times, condition, callback=callback)


def heun(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Tensor,
    condition: Condition = NOTHING,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = float("inf"),
    churn_noise: float = 1.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Karras et al. 2022, algorithm 2; without churn algorithm 1 with Heun's method. Second order, 2N - 1 evaluations.

    churn, churn_min, churn_max, churn_noise are the paper's S_churn, S_tmin, S_tmax, S_noise.
    """
    for k, t in enumerate(times):
        a, s = _at(schedule, t)
        level = s / a
        y = x / a  # sample and noise level of the variance-exploding form
        gamma = min(churn / len(times), 2**0.5 - 1) if churn and churn_min <= level <= churn_max else 0.0
        if gamma:
            assert noise is not None, "churn needs noise"
            raised = level * (1 + gamma)
            y = y + (raised**2 - level**2) ** 0.5 * churn_noise * noise(k)
            level = raised
            t = schedule.time(torch.tensor(raised, dtype=torch.float64))
            a, _ = _at(schedule, t)
        x0 = _call(denoiser, a * y, t, condition)
        if callback:
            callback(k, a * y, x0)
        if k + 1 == len(times):
            return x0
        a_next, s_next = _at(schedule, times[k + 1])
        next_level = s_next / a_next
        slope = (y - x0) / level
        ahead = y + (next_level - level) * slope
        corrected = _call(denoiser, a_next * ahead, times[k + 1], condition)
        y = y + (next_level - level) * 0.5 * (slope + (ahead - corrected) / next_level)
        x = a_next * y
    raise ValueError("no times")


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
    callback: Callback | None = None,
) -> Tensor:
    """x0, renoise, x0, ...: the sampler of one- and few-step students (Song et al. 2303.01469, algorithm 1).

    Renoising has standard deviation sqrt(sigma^2 - sigma_min^2); consistency models give their sigma_min. `project` takes
    each x0 before it is used: zero-shot edits put back there what is known (the paper's algorithm 4).
    """
    x0 = x
    for k, t in enumerate(times):
        if k:
            assert noise is not None, "several steps need noise"
            a, s = _at(schedule, t)
            x = a * x0 + max(0.0, s**2 - sigma_min**2) ** 0.5 * noise(k)
        x0 = _call(denoiser, x, t, condition)
        if callback:
            callback(k, x, x0)
        if project:
            x0 = project(x0)
    return x0

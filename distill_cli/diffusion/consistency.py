"""Consistency models' mathematics: discretisations, the step between neighbouring times, weights.

Sources: Song et al. 2303.01469 (cd, ct), Song & Dhariwal 2310.14189 (ict), Geng et al. 2406.14548 (ect). Noise levels are
sigma / alpha, which is EDM's time; of a pair of times t is the noisier one and r < t the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.schedule import NoiseSchedule, expand
from distill_cli.diffusion.solvers import ddim_step

ORDER = {"euler": 1, "heun": 2}
"""Evaluations that a step of a solver of the ODE costs."""


def level(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """(B,) noise levels sigma / alpha at times t (B,)."""
    return schedule.sigma(t) / schedule.alpha(t)


def neighbours(schedule: NoiseSchedule, index: Tensor, intervals: int) -> tuple[Tensor, Tensor]:
    """Times of grid points `index` (B,) and of their less noisy neighbours."""
    return schedule.point(index, intervals), schedule.point(index + 1, intervals)


def ct_scales(step: int, steps: int, start: int, end: int) -> int:
    """N(k) of consistency training: ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (2303.01469, appendix C)."""
    return math.ceil(math.sqrt(step / steps * ((end + 1) ** 2 - start**2) + start**2) - 1) + 1


def ct_decay(scales: int, start: int, decay: float, over: str = "N") -> float:
    """mu(k) = exp(s0 ln mu0 / N(k)) of consistency training (2303.01469, appendix C); OpenAI's program divides by N(k) - 1."""
    return math.exp(start * math.log(decay) / (scales - 1 if over == "N-1" else scales))


def ict_scales(step: int, steps: int, start: int, end: int) -> int:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2 floor(s1 / s0) + 1)) (2310.14189, section 3.4)."""
    period = max(1, math.floor(steps / (math.log2(end // start) + 1)))
    return min(start * 2 ** (step // period), end) + 1


def lognormal_index(schedule: NoiseSchedule, uniform: Tensor, intervals: int, p_mean: float, p_std: float) -> Tensor:
    """(B,) indices of the noisier end, drawn so that ln sigma of the pair is normal (2310.14189, eq. 11), from uniforms (B,)."""
    levels = level(schedule, schedule.point(torch.arange(intervals + 1), intervals)).log()
    mass = torch.special.erf((levels - p_mean) / (2**0.5 * p_std))
    return weighted_index(uniform, mass[:-1] - mass[1:])


def weighted_index(uniform: Tensor, weights: Tensor) -> Tensor:
    """(B,) indices drawn as often as `weights` (float64) say, from uniforms (B,)."""
    share = weights.cumsum(0)
    return torch.searchsorted(share / share[-1], uniform.double(), right=True).clamp(max=len(weights) - 1)


def ect_neighbour(t: Tensor, stage: int, q: float, k: float, b: float) -> Tensor:
    """(B,) r = max(0, t (1 - q^-(stage + 1) (1 + k sigmoid(-b t)))) of easy consistency tuning (2406.14548, section 3)."""
    return (t * (1 - q ** -(stage + 1) * (1 + k * torch.sigmoid(-b * t)))).clamp(min=0)


def ode_step(denoiser: Denoiser, schedule: NoiseSchedule, x: Tensor, t: Tensor, r: Tensor, condition: Condition, solver: str) -> Tensor:
    """From x at times t (B,) to times r (B,) along the probability-flow ODE, by one `heun` or `euler` step of each sample.

    Both are steps of x / alpha over sigma / alpha; Euler's is DDIM's, and fine where alpha(t) = 0.
    """
    if solver == "euler":
        return ddim_step(schedule, x, denoiser(x, t, condition), t, r)
    a, a_next, here, there = (expand(each, x) for each in (schedule.alpha(t), schedule.alpha(r), level(schedule, t), level(schedule, r)))
    y = x / a
    slope = (y - denoiser(x, t, condition)) / here
    ahead = y + (there - here) * slope
    return a_next * (y + (there - here) * 0.5 * (slope + (ahead - denoiser(a_next * ahead, r, condition)) / there))


def ode_steps(
    denoiser: Denoiser, schedule: NoiseSchedule, x: Tensor, t: Tensor, r: Tensor, condition: Condition, solver: str, steps: int
) -> Tensor:
    """As `ode_step`, in `steps` steps between t and r (B,), spaced as the schedule's grid."""
    times = [t, *(schedule.between(t, r, k / steps) for k in range(1, steps)), r]
    for here, there in zip(times, times[1:]):
        x = ode_step(denoiser, schedule, x, here, there, condition, solver)
    return x


def weight(kind: str, t: Tensor, r: Tensor, sigma_data: float) -> Tensor:
    """(B,) weights of the distance between the estimates at noise levels t and r (B,)."""
    if kind == "uniform":
        return torch.ones_like(t)
    if kind == "snr+1":
        return t**-2 + 1
    if kind == "karras":
        return t**-2 + sigma_data**-2
    if kind == "inverse-step":
        return torch.where(t > r, 1 / (t - r), 0)  # both may lie below the smallest level of a table
    raise ValueError(f"weighting {kind!r} is none of uniform, snr+1, karras, inverse-step")

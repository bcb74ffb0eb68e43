"""The times at which a student of few steps is sampled, as people write them.

index:0,22     points of the 40-point grid on which OpenAI's samplers and diffusers' ConsistencyModelPipeline count
               (0 is sigma_max, 39 sigma_min, even in sigma^(1/rho)); diffusers takes them as timesteps=[22, 0].
               These two are the published ones of ImageNet-64 (Song et al. 2303.01469, appendix C; OpenAI's scripts)
sigma:80,1.4   noise levels
even           as many as there are steps, evenly over the indices: what diffusers does with num_inference_steps alone
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from distill_cli.diffusion.consistency import sigma_at
from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.errors import UsageError

GRID = 39
"""Intervals of the grid."""


def from_indices(schedule: EDMSchedule, indices: Sequence[int]) -> list[float]:
    """Noise levels of grid points."""
    return sigma_at(schedule, torch.tensor(list(indices)), GRID).tolist()


def parse(spec: str, schedule: EDMSchedule, steps: int) -> list[float]:
    """Decreasing noise levels above sigma_min, at most sigma_max; raises UsageError for anything else."""
    kind, _, rest = spec.partition(":")
    if spec == "even":
        if steps > GRID + 1:
            raise UsageError(f"--times even: {steps} steps on {GRID + 1} times")
        return from_indices(schedule, [k * ((GRID + 1) // steps) for k in range(steps)])
    if kind not in ("index", "sigma"):
        raise UsageError(f"--times {spec}: unknown", "like index:0,22, or sigma:80,1.4, or even")
    try:
        numbers = [float(part) for part in rest.split(",")]
    except ValueError as error:
        raise UsageError(f"--times {spec}: not numbers with commas between") from error
    low, high = (0, GRID - 1) if kind == "index" else (schedule.sigma_min, schedule.sigma_max)
    if kind == "index" and any(number != int(number) for number in numbers if math.isfinite(number)):
        raise UsageError(f"--times {spec}: an index is a whole number")
    wrong = [number for number in numbers if not (low <= number <= high and (kind == "index" or number > low))]
    if wrong:
        raise UsageError(f"--times {spec}: {wrong[0]:g} is not between {low:g} and {high:g}")
    ordered = sorted(set(numbers), reverse=kind == "sigma")
    if ordered != numbers:
        raise UsageError(f"--times {spec}: noise levels must decrease", "indices grow: 0 is the noisiest")
    return from_indices(schedule, [int(number) for number in numbers]) if kind == "index" else numbers

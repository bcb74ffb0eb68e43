"""How people write the times of a few-step student.

index:0,22     points of the student's grid: those it was distilled on (cd's key scales), else the 40 of OpenAI's samplers
               and diffusers (0 is sigma_max, the last sigma_min, even in sigma^(1/rho)); ConsistencyModelPipeline takes
               the same numbers as timesteps=[22, 0]
sigma:80,1.4   noise levels
even           as many as there are steps, evenly over the indices: what diffusers does with num_inference_steps alone,
               where that divides the grid (elsewhere diffusers stops early)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from distill_cli.diffusion.schedule import GRID, NoiseSchedule
from distill_cli.errors import UsageError

PUBLISHED = (0, 22)
"""The two times of ImageNet-64, as points of 40 (consistency distillation; Song et al. 2303.01469, appendix C; OpenAI's scripts)."""


def from_indices(schedule: NoiseSchedule, indices: Sequence[int]) -> list[float]:
    """Noise levels of grid points."""
    return schedule.point(torch.tensor(list(indices)), schedule.grid - 1).clamp(max=schedule.t_max).tolist()


def nearest(schedule: NoiseSchedule, indices: Sequence[int]) -> list[float]:
    """Noise levels on the student's grid, nearest to points `indices` of 40 (GRID), without repeats, above sigma_min."""
    last = schedule.grid - 1
    return from_indices(schedule, sorted({min(round(index * last / (GRID - 1)), last - 1) for index in indices}))


def spelled(times: Sequence[float]) -> str:
    """Noise levels in the form that `parse` reads, exactly."""
    return "sigma:" + ",".join(map(repr, times))


def parse(spec: str, schedule: NoiseSchedule, steps: int, name: str = "--times") -> list[float]:
    """Decreasing noise levels above sigma_min, at most sigma_max. Raises UsageError, naming the option `name`, for anything else."""
    kind, _, rest = spec.partition(":")
    if spec == "even":
        if steps > schedule.grid:
            raise UsageError(f"{name} even: {steps} steps on {schedule.grid} times")
        return from_indices(schedule, [k * schedule.grid // steps for k in range(steps)])
    if kind not in ("index", "sigma"):
        raise UsageError(f"{name} {spec}: unknown", "like index:0,22, or sigma:80,1.4, or even")
    try:
        numbers = [float(part) for part in rest.split(",")]
    except ValueError as error:
        raise UsageError(f"{name} {spec}: not numbers with commas between") from error
    if kind == "index" and any(number != int(number) for number in numbers if math.isfinite(number)):
        raise UsageError(f"{name} {spec}: an index is a whole number")
    low, high = schedule.floor, schedule.t_max
    for number in numbers:
        if kind == "index" and not 0 <= number <= schedule.grid - 2:
            raise UsageError(f"{name} {spec}: {number:g} is not between 0 and {schedule.grid - 2}")
        if kind == "sigma" and not low < number <= high:
            raise UsageError(f"{name} {spec}: {number:g} is not above {low:g} and at most {high:g}")
    ordered = sorted(set(numbers), reverse=kind == "sigma")
    if ordered != numbers:
        raise UsageError(f"{name} {spec}: noise levels must decrease", "indices grow: 0 is the noisiest")
    return from_indices(schedule, [int(number) for number in numbers]) if kind == "index" else numbers

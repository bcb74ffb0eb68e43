"""Sampling of a folder of others with diffusers' LCMScheduler (Luo et al. 2310.04378): its times, and its form near the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.schedule import expand
from distill_cli.errors import DistillError, UsageError

SIGMA_DATA = 0.5


def times(config: Mapping[str, Any], steps: int) -> Tensor:
    """(steps,) decreasing times, as LCMScheduler.set_timesteps has them: even over the `original_inference_steps` of its training."""
    count, original = int(config.get("num_train_timesteps", 1000)), config.get("original_inference_steps", 50)
    if type(original) is not int or not 1 <= original <= count:
        raise DistillError(f"LCMScheduler: original_inference_steps is {original!r}, not a whole number from 1 to {count}")
    if not 1 <= steps <= original:
        raise UsageError(f"--steps {steps}: the model's LCMScheduler takes 1 to {original} (its original_inference_steps)")
    known = torch.arange(original, 0, -1, dtype=torch.float64) * (count // original) - 1
    return known[[k * original // steps for k in range(steps)]]


def bounded(denoiser: Denoiser, config: Mapping[str, Any]) -> Denoiser:
    """The consistency function c_skip x_t + c_out D(x_t, t) of a denoiser D, with LCMScheduler's c_skip and c_out of the time."""
    scaling = config.get("timestep_scaling", 10.0)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
        raise DistillError(f"LCMScheduler: timestep_scaling is {scaling!r}, not a number")

    def function(x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        scaled = t.double() * scaling
        norm = scaled.square() + SIGMA_DATA**2
        return expand(SIGMA_DATA**2 / norm, x) * x + expand(scaled / norm.sqrt(), x) * denoiser(x, t, condition)

    return function

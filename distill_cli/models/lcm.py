"""Latent consistency models of others (Luo et al. 2310.04378): the times and the boundary of diffusers' LCMScheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.schedule import expand
from distill_cli.errors import DistillError
from distill_cli.models.sampler import Sampler

SIGMA_DATA = 0.5


def sampler_of(config: Mapping[str, Any]) -> Sampler:
    """A student that knows the `original_inference_steps` times of its training, evenly over which its steps are spread."""
    count, original = int(config.get("num_train_timesteps", 1000)), config.get("original_inference_steps", 50)
    if type(original) is not int or not 1 <= original <= count:
        raise DistillError(f"LCMScheduler: original_inference_steps is {original!r}, not a whole number from 1 to {count}")
    times = tuple(float(k * (count // original) - 1) for k in range(original, 0, -1))
    return Sampler(solver="few-step", steps=1, knows="own times", answers="endpoint", guidance="inside", times=times)


def boundary(t: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """LCMScheduler's c_skip and c_out (B,), float64, of times (B,)."""
    scaled = t.double() * scaling
    norm = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


class BoundedDenoiser(NetworkDenoiser):
    """The consistency function c_skip x_t + c_out D(x_t, t) of a denoiser D, which at no noise is x_t itself."""

    scaling = 10.0

    def with_scaling(self, config: Mapping[str, Any]) -> BoundedDenoiser:
        """With the timestep_scaling of a scheduler's configuration."""
        scaling = config.get("timestep_scaling", self.scaling)
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
            raise DistillError(f"LCMScheduler: timestep_scaling is {scaling!r}, not a number")
        self.scaling = scaling
        return self

    def forward(self, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        skip, out = boundary(t, self.scaling)
        return expand(skip, x) * x + expand(out, x) * super().forward(x, t, condition)

"""Published latent consistency models (Luo et al. 2310.04378): the times and the boundary of diffusers' LCMScheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.schedule import expand
from distill_cli.errors import DistillError
from distill_cli.models.sampler import Sampler
from distill_cli.models.schedulers import numbers_of

SCHEDULER = "LCMScheduler"
SIGMA_DATA = 0.5


def _numbers(config: Mapping[str, Any], *keys: str) -> list[float]:
    return list(numbers_of({**config, "_class_name": SCHEDULER}, keys, SCHEDULER).values())


def sampler_of(config: Mapping[str, Any]) -> Sampler:
    """The sampler of a student that knows the `original_inference_steps` times of its training; fewer steps are spread evenly over them."""
    count, original = map(int, _numbers(config, "num_train_timesteps", "original_inference_steps"))
    if not 1 <= original <= count:
        raise DistillError(f"{SCHEDULER}: original_inference_steps is {original}, not a whole number from 1 to {count}")
    times = tuple(float(k * (count // original) - 1) for k in range(original, 0, -1))
    return Sampler(solver="few-step", steps=1, knows="own times", answers="endpoint", guidance="inside", times=times)


def boundary(t: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """LCMScheduler's c_skip and c_out (B,), float64, of times (B,)."""
    scaled = t.double() * scaling
    norm = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


class BoundedDenoiser(NetworkDenoiser):
    """The consistency function c_skip x_t + c_out D(x_t, t) of a denoiser D; without noise it is x_t itself."""

    scaling = 10.0

    def with_scaling(self, config: Mapping[str, Any]) -> BoundedDenoiser:
        """Take the timestep_scaling of a scheduler's configuration. Raises DistillError if it is no number."""
        (self.scaling,) = _numbers(config, "timestep_scaling")
        return self

    def forward(self, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        skip, out = boundary(t, self.scaling)
        return expand(skip, x) * x + expand(out, x) * super().forward(x, t, condition)

"""Latent consistency models (Luo et al. 2310.04378) as diffusers' LCMScheduler has them: their times and the scale of their boundary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_cli.errors import DistillError
from distill_cli.models.sampler import Sampler
from distill_cli.models.schedulers import numbers_of

SCHEDULER = "LCMScheduler"


def _numbers(config: Mapping[str, Any], *keys: str) -> list[float]:
    return list(numbers_of({**config, "_class_name": SCHEDULER}, keys, SCHEDULER).values())


def sampler_of(config: Mapping[str, Any], told: bool = False) -> Sampler:
    """The sampler of a student that knows the `original_inference_steps` times of its training; fewer steps are spread evenly over them.

    One that is `told` its guidance scale has the defaults of diffusers' LatentConsistencyModelPipeline: 4 steps, scale 8.5.
    """
    count, original = map(int, _numbers(config, "num_train_timesteps", "original_inference_steps"))
    if not 1 <= original <= count:
        raise DistillError(f"{SCHEDULER}: original_inference_steps is {original}, not a whole number from 1 to {count}")
    own = Sampler.renoising([float(k * (count // original) - 1) for k in range(original, 0, -1)])
    return own.model_copy(update={"steps": min(4, original)}).with_told(8.5, None) if told else own


def scaling_of(config: Mapping[str, Any]) -> float:
    """The timestep_scaling of a scheduler's configuration. Raises DistillError if it is no number."""
    (scaling,) = _numbers(config, "timestep_scaling")
    return scaling

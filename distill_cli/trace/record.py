"""The states of a sampling, and of the forward process, as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import NoiseSchedule, add_noise, expand
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampling


class Watched:
    """A denoiser that keeps what it was asked and what it answered, on the CPU.

    A call that is followed by one at the same time, or at more noise, was a correction ahead (Heun) or a first try (PNDM), no state: it is
    forgotten. Churn may raise the time above that of the state before.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.calls: dict[float, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        x0 = self.denoiser(x, t, condition)
        time = float(t[0])
        if self.calls and next(reversed(self.calls)) <= time:
            self.calls.popitem()
        self.calls[time] = x.float().cpu(), x0.float().cpu()
        return x0


@dataclass
class Walk:
    """A process at K times, of B samples: what the denoiser works on, and what it estimates. Of latent models all are latents."""

    times: Tensor
    """(K,) float64, in the schedule's own time, in the order of the process."""
    x: Tensor
    """x_t, (K, B, C, H, W)."""
    x0: Tensor
    """The estimates of x0, (K, B, C, H, W). Of the forward process: the data."""
    end: Tensor
    """The samples, (B, C, H, W). Of the forward process: the data."""

    def __len__(self) -> int:
        return len(self.times)

    @staticmethod
    def cat(parts: Sequence[Walk]) -> Walk:
        """The walk of all samples of some walks at the same times."""
        x, x0 = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("x", "x0"))
        return Walk(parts[0].times, x, x0, torch.cat([part.end for part in parts]))


@torch.no_grad()
def backward(model: Model, draws: Draws, labels: Tensor, sampling: Sampling, x: Tensor | None = None) -> Walk:
    """The sampling of `draws` (one row a label): the same samples as `Model.generate` makes.

    The estimates are those after guidance. `x` (B, C, H, W): other standard-normal noise to begin with.
    """
    task = model.task(draws, labels, sampling)
    seen = Watched(task.denoiser)
    end = model.solved(replace(task, denoiser=seen, x=task.x if x is None else x.to(task.x)), sampling)
    times = torch.tensor(list(seen.calls), dtype=torch.float64)
    states, estimates = zip(*seen.calls.values(), strict=True)
    return Walk(times, torch.stack(states), torch.stack(estimates), end.cpu())


def forward(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, times: Tensor) -> Walk:
    """x_t = alpha(t) x0 + sigma(t) noise at `times` (K,), for data x0 and noise (B, C, H, W)."""
    x = torch.stack([add_noise(schedule, x0, noise, t.expand(len(x0))) for t in times])
    return Walk(times, x, x0.expand_as(x), x0)


def spread(schedule: NoiseSchedule, t: Tensor, data: float) -> Tensor:
    """The standard deviation of x_t over that of the data, `data`: 1 without noise. Pictures show x_t divided by it."""
    t = t.double()
    return (schedule.alpha(t).square() + (schedule.sigma(t) / data).square()).sqrt()


def score(denoiser: Denoiser, schedule: NoiseSchedule, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
    """The gradient of log p(x_t) by x_t (B, ...) at one time t: (alpha D(x_t) - x_t) / sigma^2 (Tweedie's formula; 2206.00364, eq. 3)."""
    times = t.to(x.device, x.dtype).expand(len(x))
    a, s = expand(schedule.alpha(times), x), expand(schedule.sigma(times), x)
    return (a * denoiser(x, times, condition) - x) / s**2


def kept(count: int, every: int) -> list[int]:
    """The states that are shown of `count`: every so many, from the first, and the last."""
    return sorted({*range(0, count, every), count - 1})


def usual(count: int, most: int) -> int:
    """The smallest `every` with which `kept` shows at most `most` states."""
    return max(1, math.ceil((count - 1) / max(1, most - 1)))


def places(count: int, columns: int) -> list[int]:
    """The columns in which `count` states stand, evenly from the first to the last; (0,) for one."""
    return [round(k * (columns - 1) / max(1, count - 1)) for k in range(count)]

"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, in the schedule's own time t."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from distill_cli.config.base import Solver
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.shift import Shift
from distill_cli.diffusion.transfer import sent

ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "noise": lambda a, s: a / s,  # Ho et al. 2006.11239, L_simple
    "velocity": lambda a, s: (a * a + s * s) / s,  # alpha eps - sigma x0: Salimans & Ho 2202.00512
    "flow": lambda a, s: (a + s) / s,  # eps - x0: 2210.02747
}
"""What a network's plain error is of -> (alpha, sigma) -> that error over the error of x0."""


class NoiseSchedule(Protocol):
    """alpha(t) and sigma(t) of the forward process; t grows with the noise."""

    @property
    def t_max(self) -> float:
        """The largest time, where sampling starts."""

    @property
    def prior_std(self) -> float:
        """Standard deviation of x at t_max as sampling starts it."""
        return 1.0

    def prior(self, t: float) -> float:
        """As prior_std, where sampling starts at time t."""
        return self.prior_std

    @property
    def floor(self) -> float:
        """Smallest noise level of a consistency model; renoising leaves it out."""
        return 0.0

    @property
    def bins(self) -> int | None:
        """The number of whole times; None if time is continuous."""
        return None

    @property
    def points(self) -> int | None:
        """In how many whole times diffusers' schedulers count continuous time; None where they have none of their own."""
        return None

    @property
    def grid(self) -> int:
        """Points on which the times of a few-step student are counted, from t_max to the floor; 0 where they are not counted."""
        return 0

    @property
    def usual_steps(self) -> int:
        """Steps of a solver for which nobody has asked."""
        return 50

    @property
    def usual_solver(self) -> Solver:
        """Solver of new models."""
        return "ddim"

    @property
    def time_input(self) -> str:
        """What new networks are told of the time: a row of TIME_INPUTS."""
        return "t"

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at times t, in t's shape."""

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at times t, in t's shape."""

    def alpha_slope(self, t: Tensor) -> Tensor:
        """The derivative of alpha by t at times t, in t's shape."""

    def sigma_slope(self, t: Tensor) -> Tensor:
        """The derivative of sigma by t at times t, in t's shape."""

    def drawn(self, draws: Draws, mean: float, std: float) -> Tensor:
        """(B,) times on which a denoiser is trained; `mean` and `std` are those of a normal distribution, where the schedule has one."""

    def weight(self, t: Tensor, sigma_data: float, error: str) -> Tensor:
        """(B,) weights of the squared error of x0 in a denoiser's training: by default they make it the plain error of what is predicted.

        `error`: a row of ERRORS, which diffusion/denoiser.py names for each parameterisation.
        """
        return ERRORS[error](self.alpha(t), self.sigma(t)) ** 2

    def time(self, level: Tensor) -> Tensor:
        """The time at which the noise level sigma / alpha is `level`."""

    def at(self, fraction: Tensor) -> Tensor:
        """Times at fractions of the range: 0 is the smallest, 1 the largest, spaced as in training."""

    def fraction(self, t: Tensor) -> Tensor:
        """The inverse of `at`: the fractions of the range at which times t lie."""

    def point(self, index: Tensor, intervals: int) -> Tensor:
        """Times of points `index` (any shape) of a consistency model's grid: 0 is the largest time, `intervals` the smallest."""
        return self.at(1 - index.double() / intervals)

    def between(self, t: Tensor, r: Tensor, share: float) -> Tensor:
        """The times (B,) on the way from t to r (B,), at a share of it."""
        return t + (r - t) * share

    def sized(self, tokens: int) -> NoiseSchedule:
        """The schedule of pictures of so many tokens: itself, unless it depends on the size."""
        return self

    @property
    def signal(self) -> bool:
        """Whether there is signal left at the largest time (alpha above 0)."""
        return bool(self.alpha(torch.tensor(self.t_max, dtype=torch.float64)) > 0)

    def times(self, steps: int) -> Tensor:
        """(steps,) decreasing times for a solver, starting at t_max."""


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) noise for x0, noise (B, ...) and t (B,)."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * noise


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) values as (B, 1, 1, ...) in the dtype and on the device of `like`."""
    return sent(values, like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


GRID = 40
"""Points of the grid on which OpenAI's samplers and diffusers number the times of few-step students."""


@dataclass(frozen=True)
class EDMSchedule(NoiseSchedule):
    """Karras et al. 2022 (2206.00364): alpha = 1 and t is sigma itself.

    Images are in [-1, 1]; sigmas are in the same unit. `grid` is the number of points, from sigma_max to sigma_min, on which the
    times of a few-step student are numbered: diffusers' num_train_timesteps.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    grid: int = GRID
    usual_steps: int = 18
    usual_solver: Solver = "heun"
    time_input: str = "250 ln sigma"

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def prior(self, t: float) -> float:
        return t

    @property
    def floor(self) -> float:
        return self.sigma_min

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_slope(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_slope(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def drawn(self, draws: Draws, mean: float, std: float) -> Tensor:
        """ln sigma is normal (table 1)."""
        return (mean + std * draws.normal("time")).exp()

    def weight(self, t: Tensor, sigma_data: float, error: str) -> Tensor:
        """1/sigma^2 + 1/sigma_data^2, which makes the loss of the raw network even over sigma (eq. 8 and table 1)."""
        return t**-2 + sigma_data**-2

    def time(self, level: Tensor) -> Tensor:
        return level

    def at(self, fraction: Tensor) -> Tensor:
        """Times at fractions of the range: 0 is sigma_min, 1 is sigma_max, evenly in sigma^(1/rho) (eq. 5)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + fraction * (high - low)) ** self.rho

    def fraction(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (t ** (1 / self.rho) - low) / (high - low)

    def between(self, t: Tensor, r: Tensor, share: float) -> Tensor:
        """Evenly in sigma^(1/rho)."""
        high, low = t ** (1 / self.rho), r ** (1 / self.rho)
        return (high + (low - high) * share) ** self.rho

    def times(self, steps: int) -> Tensor:
        """(steps,) decreasing times from sigma_max to sigma_min (eq. 5; the final 0 is left out)."""
        if steps == 1:
            return torch.tensor([self.sigma_max], dtype=torch.float64)
        return self.at(torch.linspace(1, 0, steps, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class TableSchedule(NoiseSchedule):
    """A variance-preserving table, as in DDPM and Stable Diffusion: t in 0 .. N-1.

    `alphas_cumprod` (N,) is alpha^2, interpolated linearly between entries, so alpha^2 + sigma^2 = 1 at every t.
    """

    alphas_cumprod: Tensor
    copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)
    """The table on the devices on which it was wanted."""

    def _on(self, device: torch.device) -> Tensor:
        """The table on `device`, copied there once: a copy a call would have the host wait for the GPU."""
        if device not in self.copies:
            self.copies[device] = sent(self.alphas_cumprod, device)
        return self.copies[device]

    @property
    def t_max(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    @property
    def bins(self) -> int:
        return len(self.alphas_cumprod)

    def _alpha_squared(self, t: Tensor) -> Tensor:
        dtype = t.dtype if t.is_floating_point() else torch.float32
        table = self._on(t.device)
        low = t.long().clamp(0, len(table) - 1)
        high = (low + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[low], table[high], (t.to(table.dtype) - low)).to(dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha_squared(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha_squared(t)).sqrt()

    def _slope(self, t: Tensor) -> Tensor:
        """The derivative of alpha^2: at a whole time that of the interval after it, at the last that of the one before."""
        table = self._on(t.device)
        low = t.long().clamp(0, len(table) - 2)
        return (table[low + 1] - table[low]).to(t.dtype)

    def alpha_slope(self, t: Tensor) -> Tensor:
        return self._slope(t) / (2 * self.alpha(t))

    def sigma_slope(self, t: Tensor) -> Tensor:
        return -self._slope(t) / (2 * self.sigma(t))

    def drawn(self, draws: Draws, mean: float, std: float) -> Tensor:
        """Whole times, all alike."""
        return (draws.uniform("time") * (self.t_max + 1)).floor().float()

    def time(self, level: Tensor) -> Tensor:
        noise = 1 - self._on(level.device)
        value = 1 / (1 + level.to(noise.dtype) ** -2)
        high = torch.searchsorted(noise, value.contiguous()).clamp(1, len(noise) - 1)
        below, above = noise[high - 1], noise[high]
        return (high - 1 + ((value - below) / (above - below)).clamp(0, 1)).to(level.dtype)

    def at(self, fraction: Tensor) -> Tensor:
        """Whole times at fractions of the range: 0 is t = 0, 1 is t = N - 1."""
        return (fraction * self.t_max).round()

    def fraction(self, t: Tensor) -> Tensor:
        return t / self.t_max

    def point(self, index: Tensor, intervals: int) -> Tensor:
        """By "trailing" spacing and then 0: latent consistency models' times where `intervals` divide N, else not whole."""
        return (self.bins - self.bins * index.double() / intervals - 1).clamp(min=0)

    def times(self, steps: int) -> Tensor:
        """(steps,) decreasing whole times from N - 1, by "trailing" spacing (Lin et al. 2305.08891, table 2)."""
        count = len(self.alphas_cumprod)
        return (torch.arange(count, 0, -count / steps, dtype=torch.float64).round() - 1)[:steps]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TableSchedule:
        """The table of a diffusers scheduler config (`beta_schedule`, `beta_start`, ..., `rescale_betas_zero_snr`)."""
        count = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        elif kind == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
        elif kind == "squaredcos_cap_v2":
            edges = torch.arange(count + 1, dtype=torch.float64) / count
            bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"beta_schedule {kind!r} is none of linear, scaled_linear, squaredcos_cap_v2")
        table = torch.cumprod(1 - betas, 0)
        return cls(zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that the last is 0 and the first is unchanged (2305.08891, alg. 1)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Flow matching (2210.02747, rectified flow 2209.03003): alpha = 1 - t, sigma = t, t in [0, 1].

    `shift` moves the times of training and of solvers towards the noise (Esser et al. 2403.03206, section 5.3.2); Stable Diffusion 3 has
    3, and some models have one for each size. `points` is diffusers' num_train_timesteps: training never comes nearer to the data than
    the shifted 1 / points.
    """

    shift: float = 1.0
    points: int = 1000
    t_max: float = 1.0
    usual_solver: Solver = "euler"
    time_input: str = "1000 t"
    ends: Literal["training", "steps"] = "training"
    """Where a solver's N times end before the shift: at the smallest time of training, or at 1/N, in pipelines that give the times."""
    moving: Shift | None = None
    """What `shift` depends on, if it does; else None."""

    def sized(self, tokens: int) -> FlowSchedule:
        if self.moving is None or self.moving.tokens == tokens:
            return self
        return self.moved(self.moving.sized(tokens))

    def moved(self, moving: Shift) -> FlowSchedule:
        """The schedule with the shift that `moving` says."""
        return replace(self, shift=moving.of(), moving=moving)

    def shifted(self, t: Tensor, steps: int | None = None) -> Tensor:
        """The shifted times: t at shift 1. `steps`: for a solver of so many, by which some shifts differ."""
        shift = self.shift if steps is None or self.moving is None else self.moving.of(steps)
        return shift * t / (1 + (shift - 1) * t)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_slope(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_slope(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def drawn(self, draws: Draws, mean: float, std: float) -> Tensor:
        """Logit-normal (2403.03206, section 3.1), shifted."""
        return self.shifted((mean + std * draws.normal("time")).sigmoid())

    def time(self, level: Tensor) -> Tensor:
        """t = level / (1 + level), where t is 1 for an infinite level."""
        return (1 / (1 + 1 / level.double())).to(level.dtype)

    def at(self, fraction: Tensor) -> Tensor:
        """Times at fractions of the range: 0 is the shifted 1 / points, 1 is pure noise, evenly before the shift."""
        low = 1 / self.points
        return self.shifted(low + fraction * (1 - low))

    def fraction(self, t: Tensor) -> Tensor:
        low = 1 / self.points
        return (t / (self.shift - (self.shift - 1) * t) - low) / (1 - low)

    def times(self, steps: int) -> Tensor:
        """(steps,) decreasing times of diffusers' FlowMatchEulerDiscreteScheduler: evenly from 1 to where they end, then shifted.

        By itself it ends at the smallest time of training, which a constant shift has moved already: that one is shifted twice.
        """
        low = 1 / (steps if self.ends == "steps" else self.points)
        if self.ends == "training" and self.moving is None:
            low = self.shifted(torch.tensor(low, dtype=torch.float64)).item()
        return self.shifted(torch.linspace(1, low, steps, dtype=torch.float64), steps)

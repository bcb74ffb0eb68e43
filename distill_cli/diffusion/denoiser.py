"""The one abstraction: a denoiser estimates E[x0 | x_t]; what its network predicts is a row of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.schedule import EDMSchedule, NoiseSchedule, expand
from distill_cli.diffusion.transfer import sent


class Denoiser(Protocol):
    """x_t (B, C, H, W), t (B,), a condition of B samples -> an estimate of E[x0 | x_t], (B, C, H, W)."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = NOTHING, /) -> Tensor: ...


@dataclass(frozen=True)
class Scales:
    """Constants that a parameterisation may use: standard deviation of the data, smallest sigma of a consistency model."""

    sigma_data: float = 0.5
    sigma_min: float = 0.002


Coefficients = Callable[[Tensor, Tensor, Scales], tuple[Tensor, Tensor, Tensor]]


def _eps(a: Tensor, s: Tensor, k: Scales) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(a), 1 / a, -s / a


def _v(a: Tensor, s: Tensor, k: Scales) -> tuple[Tensor, Tensor, Tensor]:
    norm = a * a + s * s
    return torch.ones_like(a), a / norm, -s / norm


def _x0(a: Tensor, s: Tensor, k: Scales) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(a), torch.zeros_like(a), torch.ones_like(a)


def _flow(a: Tensor, s: Tensor, k: Scales) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(a), 1 / (a + s), -s / (a + s)


def _edm(a: Tensor, s: Tensor, k: Scales) -> tuple[Tensor, Tensor, Tensor]:
    norm = s * s + (a * k.sigma_data) ** 2
    return norm.rsqrt(), a * k.sigma_data**2 / norm, s * k.sigma_data * norm.rsqrt()


def _consistency(a: Tensor, s: Tensor, k: Scales) -> tuple[Tensor, Tensor, Tensor]:
    c_in, shifted = (s * s + k.sigma_data**2).rsqrt(), s - k.sigma_min
    return c_in, k.sigma_data**2 / (shifted**2 + k.sigma_data**2), shifted * k.sigma_data * c_in


PARAMETERISATIONS: dict[str, Coefficients] = {
    "eps": _eps,  # noise: Ho et al. 2006.11239
    "v": _v,  # alpha eps - sigma x0: Salimans & Ho 2202.00512
    "x0": _x0,
    "flow": _flow,  # eps - x0: 2210.02747
    "edm": _edm,  # Karras et al. 2206.00364, table 1
    "consistency": _consistency,  # f(x, sigma_min) = x, alpha = 1: Song et al. 2303.01469, appendix C
}
"""name -> (alpha, sigma, scales) -> (c_in, c_skip, c_out), with x0_hat = c_skip x_t + c_out F(c_in x_t)."""

ERROR_OF = {"v": "velocity", "flow": "flow"}
"""Parameterisation -> the row of ERRORS that is the network's own error; "noise" for the others."""


TIME_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda t: t,
    "1000 t": lambda t: 1000 * t,  # diffusers' pipelines of flow matching
    "250 ln sigma": lambda t: 250 * t.log(),  # OpenAI's consistency models and diffusers' ConsistencyModelPipeline
    "ln sigma / 4": lambda t: t.log() / 4,  # NVlabs' EDM
}


LCM = 10.0
"""The usual scale of time in the boundary of latent consistency models: LCMScheduler's timestep_scaling."""


def boundary(t: Tensor, scaling: float, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B,), float64, of latent consistency models at times t (B,) (Luo et al. 2310.04378, their public program)."""
    scaled = t.double() * scaling
    norm = scaled.square() + sigma_data**2
    return sigma_data**2 / norm, scaled / norm.sqrt()


class NetworkDenoiser(nn.Module):
    """A network with a row of the table is a denoiser.

    `network(x, time, condition)` returns the raw prediction, (B, C, H, W). It may run in half precision; the
    combination with x_t is computed in float32, or in x's precision where that is better.
    With a `boundary`, the scale of time, it is the consistency function c_skip x_t + c_out D(x_t, t), which is x_t at t = 0.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        parameterisation: str = "edm",
        scales: Scales = Scales(),
        time_input: str = "250 ln sigma",
        boundary: float | None = None,
    ) -> None:
        super().__init__()
        self.network, self.schedule, self.scales = network, schedule, scales
        self.parameterisation, self.time_input, self.boundary = parameterisation, time_input, boundary

    def forward(self, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        t = sent(t, x.device, x.dtype)
        a, s = expand(self.schedule.alpha(t), x), expand(self.schedule.sigma(t), x)
        c_in, c_skip, c_out = PARAMETERISATIONS[self.parameterisation](a, s, self.scales)
        output = self.network(c_in * x, TIME_INPUTS[self.time_input](t), condition.seen)
        estimate = c_skip * x + c_out * output.to(x.dtype)
        if self.boundary is None:
            return estimate
        skip, out = boundary(t, self.boundary)
        return expand(skip, x) * x + expand(out, x) * estimate

    def around(self, network: nn.Module) -> NetworkDenoiser:
        """The same denoiser of another network."""
        out = NetworkDenoiser(network, self.schedule, self.parameterisation, self.scales, self.time_input, self.boundary)
        return out.train(self.training)

    def on(self, schedule: NoiseSchedule) -> NetworkDenoiser:
        """The denoiser on another schedule, of the same network; itself where it is the same schedule."""
        if schedule is self.schedule:
            return self
        training = self.training
        out = self.around(self.network)
        out.schedule = schedule
        return out.train(training)

    @property
    def error(self) -> str:
        """The network's own error, a row of ERRORS."""
        return ERROR_OF.get(self.parameterisation, "noise")

    def prediction(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """What the network would have predicted at x_t = `x` where the estimate is `x0`: the table's row solved for it."""
        a, s = expand(self.schedule.alpha(t.to(x)), x), expand(self.schedule.sigma(t.to(x)), x)
        _, c_skip, c_out = PARAMETERISATIONS[self.parameterisation](a, s, self.scales)
        return (x0 - c_skip * x) / c_out


class MixtureDenoiser:
    """The exact posterior mean for data from sum_k w_k N(mu_k, std^2 I): the perfect teacher of tests.

    means (K, ...), weights (K,). With x_t = a x0 + s eps,
    D = sum_k r_k (mu_k + a std^2 / (a^2 std^2 + s^2) (x_t - a mu_k)), r = softmax(log w_k - |x_t - a mu_k|^2 / (2 (a^2 std^2 + s^2))).
    """

    def __init__(self, means: Tensor, weights: Tensor, std: float, schedule: NoiseSchedule | None = None) -> None:
        self.means, self.weights, self.std = means, weights, std
        self.schedule = schedule or EDMSchedule()

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = NOTHING) -> Tensor:
        t = t.to(x.dtype)
        a, s = expand(self.schedule.alpha(t), x), expand(self.schedule.sigma(t), x)
        variance = (a * self.std) ** 2 + s**2
        delta = x[:, None] - a[:, None] * self.means  # (B, K, ...)
        logits = self.weights.log() - delta.flatten(2).square().sum(2) / (2 * variance.flatten(1))
        r = logits.softmax(1).reshape(*logits.shape, *[1] * (x.ndim - 1))
        return (r * (self.means + (a * self.std**2 / variance)[:, None] * delta)).sum(1)

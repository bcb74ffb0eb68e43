"""Every row of the parameterisation table against the closed-form posterior mean."""

import pytest
import torch

from distill_cli.diffusion.denoiser import PARAMETERISATIONS, MixtureDenoiser, NetworkDenoiser, Scales
from distill_cli.diffusion.guidance import Guided, guided
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule, add_noise, expand
from tests.conditions import labels_of, of

SCHEDULES = {
    "edm": (EDMSchedule(), torch.tensor([0.01, 0.5, 3.0, 60.0], dtype=torch.float64)),
    "table": (TableSchedule.from_config({"beta_schedule": "linear"}), torch.tensor([1.0, 250.0, 700.0, 999.0], dtype=torch.float64)),
    "flow": (FlowSchedule(), torch.tensor([0.01, 0.3, 0.7, 0.99], dtype=torch.float64)),
}  # fmt: skip


def mixture(schedule):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator)
    return MixtureDenoiser(means, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 0.4, schedule)


class ExactNetwork(torch.nn.Module):
    """The raw network that is never wrong: E[target | x_t], by each target's own formula in E[x0 | x_t] and E[eps | x_t]."""

    def __init__(self, kind, schedule):
        super().__init__()
        self.kind, self.schedule, self.exact = kind, schedule, mixture(schedule)

    def forward(self, x, t, condition):
        a, s = expand(self.schedule.alpha(t), x), expand(self.schedule.sigma(t), x)
        if self.kind == "edm":
            x = x * (s**2 + 0.25 * a**2).sqrt()  # undo c_in
        if self.kind == "consistency":
            x = x * (s**2 + 0.25).sqrt()
        x0 = self.exact(x, t)
        eps = (x - a * x0) / s
        return {
            "eps": eps,
            "v": a * eps - s * x0,
            "x0": x0,
            "flow": eps - x0,
            "edm": (x0 - 0.25 * a / (s**2 + 0.25 * a**2) * x) / (s * 0.5 / (s**2 + 0.25 * a**2).sqrt()),
            "consistency": (x0 - 0.25 / ((s - 0.002) ** 2 + 0.25) * x) / ((s - 0.002) * 0.5 / (s**2 + 0.25).sqrt()),
        }[self.kind]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", PARAMETERISATIONS)
def test_rows_give_the_posterior_mean(kind, schedule):
    if (kind in ("v",) and schedule != "table") or (kind == "consistency" and schedule != "edm"):
        pytest.skip("defined for another schedule")
    noise_schedule, t = SCHEDULES[schedule]
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(4, 2, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    x = add_noise(noise_schedule, x0, eps, t)
    denoiser = NetworkDenoiser(ExactNetwork(kind, noise_schedule), noise_schedule, kind, time_input="t")
    assert (denoiser(x, t) - mixture(noise_schedule)(x, t)).abs().max() < 1e-10


def test_edm_scales_unit_variance():
    """c_in makes the input, and the target, of unit variance for data of standard deviation sigma_data (2206.00364, B.6)."""
    generator = torch.Generator().manual_seed(2)
    x0 = 0.5 * torch.randn(200_000, dtype=torch.float64, generator=generator)
    eps = torch.randn(200_000, dtype=torch.float64, generator=generator)
    for sigma in (0.02, 0.5, 20.0):
        a, s = torch.ones(1, dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64)
        c_in, c_skip, c_out = PARAMETERISATIONS["edm"](a, s, Scales())
        x = x0 + s * eps
        assert abs((c_in * x).std() - 1) < 0.01
        assert abs(((x0 - c_skip * x) / c_out).std() - 1) < 0.01


def test_consistency_boundary():
    class Noise(torch.nn.Module):
        def forward(self, x, t, condition):
            return torch.randn_like(x)

    x = torch.randn(4, 3, 8, 8)
    denoiser = NetworkDenoiser(Noise(), EDMSchedule(), "consistency")
    assert torch.equal(denoiser(x, torch.full((4,), 0.002)), x)


def test_guidance_is_linear_in_any_prediction():
    """Combining noise predictions and combining x0 give the same denoiser; scale 1 is the condition alone."""
    schedule, t = SCHEDULES["table"]
    one, other = mixture(schedule), MixtureDenoiser(torch.zeros(1, 2, 4, 4).double(), torch.ones(1).double(), 0.7, schedule)
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64)

    def both(x, t, c):
        return torch.where(labels_of(c).view(-1, 1, 1, 1) == 3, one(x, t), other(x, t))

    labels, null = of(torch.full((4,), 3)), of(torch.tensor([10]))
    ours = Guided(both, 2.5, null)(x, t, labels)
    a, s = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    cond, uncond = (x - a * one(x, t)) / s, (x - a * other(x, t)) / s
    theirs = (x - s * (uncond + 2.5 * (cond - uncond))) / a
    assert (ours - theirs).abs().max() < 1e-10
    assert (Guided(both, 1.0, null)(x, t, labels) - one(x, t)).abs().max() < 1e-12
    assert guided(both, 1.0, null) is both

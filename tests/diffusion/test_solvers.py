"""Solvers on the closed form: orders of convergence, stochastic samplers' moments, zero terminal SNR."""

import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler

from distill_cli.diffusion import solvers
from distill_cli.diffusion.denoiser import MixtureDenoiser, NetworkDenoiser
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule

TABLE = TableSchedule.from_config({"beta_schedule": "linear"})


def gaussian(schedule, mean=0.3, std=0.5):
    """Data N(mean, std^2): the ODE is solved exactly by x0 = mean + std (x - alpha mean) / sqrt(alpha^2 std^2 + sigma^2)."""
    return MixtureDenoiser(torch.full((1, 1, 2, 2), mean, dtype=torch.float64), torch.ones(1).double(), std, schedule)


def watched(schedule, seen):
    """As `gaussian`; what it is asked and answers goes into `seen`."""
    denoiser = gaussian(schedule)

    def call(x, t, condition=None):
        seen.append((x, denoiser(x, t)))
        return seen[-1][1]

    return call


def exact(schedule, x, t, mean=0.3, std=0.5):
    a, s = schedule.alpha(t), schedule.sigma(t)
    return mean + std * (x - a * mean) / (a**2 * std**2 + s**2).sqrt()


def order(solve, schedule, first, last, grids):
    """The measured order of convergence at time `last`, by steps evenly divided in each grid."""
    x = 1.7 * torch.ones(1, 1, 2, 2, dtype=torch.float64) * schedule.prior_std
    errors = []
    for times in grids:
        states = []
        solve(watched(schedule, states), schedule, x, times)
        a, s = schedule.alpha(times), schedule.sigma(times)
        target = a[-1] * 0.3 + (a[-1] ** 2 * 0.25 + s[-1] ** 2).sqrt() * (x - a[0] * 0.3) / (a[0] ** 2 * 0.25 + s[0] ** 2).sqrt()
        errors.append((states[-1][0] - target).abs().max().item())
    return math.log2(errors[-2] / errors[-1])


GRIDS = [EDMSchedule().times(n) for n in (201, 401)]


def test_heun_is_of_second_order():
    assert abs(order(solvers.heun, EDMSchedule(), 80, 0.002, GRIDS) - 2) < 0.1


def test_dpm_is_of_second_order():
    assert abs(order(solvers.dpm, EDMSchedule(), 80, 0.002, GRIDS) - 2) < 0.1
    grids = [torch.linspace(0.98, 0.02, n, dtype=torch.float64) for n in (201, 401)]
    assert abs(order(solvers.dpm, FlowSchedule(), 1, 0, grids) - 2) < 0.1


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_dpm_is_diffusers_scheduler_on_edm(steps):
    """EDMDPMSolverMultistepScheduler takes the raw answer of an EDM network, from which it makes the estimate. Its sigmas are float32."""
    denoiser, schedule = gaussian(EDMSchedule()), EDMDPMSolverMultistepScheduler(sigma_data=0.5)
    schedule.set_timesteps(steps)
    start = x = 80 * torch.linspace(-2, 2, 4, dtype=torch.float64).view(1, 1, 2, 2)
    for t, sigma in zip(schedule.timesteps, schedule.sigmas.double()):
        into, out = sigma * 0.5 / (sigma**2 + 0.25).sqrt(), 0.25 / (sigma**2 + 0.25)
        x = schedule.step((denoiser(x, sigma.expand(1)) - out * x) / into, t, x.double()).prev_sample
    ours = solvers.dpm(denoiser, EDMSchedule(), start, EDMSchedule().times(steps))
    assert (ours - x).abs().max() < 2e-5


def test_ddim_is_of_first_order():
    assert abs(order(solvers.ddim, EDMSchedule(), 80, 0.002, GRIDS) - 1) < 0.1


@pytest.mark.parametrize("schedule", [EDMSchedule(), TABLE, FlowSchedule()])
def test_eulers_step_is_dx_over_dsigma(schedule):
    """In y = x / alpha over s = sigma / alpha: dy/ds = (y - x0) / s."""
    times, seen = schedule.times(5)[1:3], []
    x = torch.tensor([-1.0, 0.2, 1.4, 0.7], dtype=torch.float64).view(1, 1, 2, 2)
    solvers.ddim(watched(schedule, seen), schedule, x, times)
    (a, a2), (s, s2) = schedule.alpha(times), schedule.sigma(times)
    y = x / a + (s2 / a2 - s / a) * (x / a - seen[0][1]) / (s / a)
    assert (seen[1][0] - a2 * y).abs().max() < 1e-10


def test_orders_on_a_table():
    grids = [torch.linspace(999, 20, n, dtype=torch.float64) for n in (90, 179)]
    assert abs(order(solvers.ddim, TABLE, 999, 20, grids) - 1) < 0.15


def test_order_of_heun_on_flow_matching():
    grids = [torch.linspace(0.98, 0.02, n, dtype=torch.float64) for n in (201, 401)]
    assert abs(order(solvers.heun, FlowSchedule(), 1, 0, grids) - 2) < 0.1


@pytest.mark.parametrize("schedule", [EDMSchedule(), TABLE, FlowSchedule(3.0)])
def test_many_steps_reach_the_exact_sample(schedule):
    times = schedule.times(400 if schedule is not TABLE else 1000)
    x = schedule.prior_std * torch.tensor([-1.0, 0.2, 1.4, 0.7], dtype=torch.float64).view(1, 1, 2, 2)
    out = solvers.ddim(gaussian(schedule), schedule, x, times)
    assert (out - exact(schedule, x, times[0])).abs().max() < 0.02


def moments(solve, schedule, times, **options):
    draws = Draws(0, range(4000))
    x = schedule.prior_std * draws.normal("prior", (1, 2, 2)).double()
    out = solve(gaussian(schedule), schedule, x, times, noise=lambda k: draws.normal("solver", (1, 2, 2), k).double(), **options)
    return out.mean().item(), out.std().item()


def test_ancestral_sampling_has_the_datas_moments():
    mean, std = moments(solvers.ddim, TABLE, TABLE.times(250))
    assert abs(mean - 0.3) < 0.02
    assert abs(std - 0.5) < 0.02


def test_heun_with_churn_is_algorithm_2():
    """Karras et al. 2022, algorithm 2, with table 5's numbers for ImageNet-64, written again line by line; and the data's moments."""
    times, denoiser = EDMSchedule().times(12), gaussian(EDMSchedule())
    draws = Draws(0, range(6))
    x = start = 80 * draws.normal("prior", (1, 2, 2)).double()
    for k, (t, after) in enumerate(zip(times, [*times[1:], torch.tensor(0.0)])):
        gamma = min(40 / 12, 2**0.5 - 1) if 0.05 <= t <= 50 else 0.0
        raised = t + gamma * t
        x = x + (raised**2 - t**2).sqrt() * 1.003 * draws.normal("solver", (1, 2, 2), k).double()
        slope = (x - denoiser(x, raised.expand(6))) / raised
        ahead = x + (after - raised) * slope
        if after > 0:
            ahead = x + (after - raised) * (slope + (ahead - denoiser(ahead, after.expand(6))) / after) / 2
        x = ahead
    ours = solvers.heun(denoiser, EDMSchedule(), start, times, noise=lambda k: draws.normal("solver", (1, 2, 2), k).double())
    assert (ours - x).abs().max() < 1e-10
    assert (ours - solvers.heun(denoiser, EDMSchedule(), start, times)).abs().max() > 0.1
    for schedule, many in ((EDMSchedule(), EDMSchedule().times(100)), (TABLE, torch.linspace(999, 4, 100, dtype=torch.float64))):
        mean, std = moments(solvers.heun, schedule, many)
        assert abs(mean - 0.3) < 0.02
        assert abs(std - 0.5) < 0.02  # 0.508 in 100 steps, by the recursion of the variance


def test_ddpm_variance_is_the_posterior():
    """eta 1: the noise of a step has DDPM's posterior variance beta_t (1 - abar_{t-1}) / (1 - abar_t) (2006.11239, eq. 7)."""
    times = torch.tensor([500.0, 499.0], dtype=torch.float64)
    x, seen = torch.zeros(1, 1, 2, 2, dtype=torch.float64), []
    for value in (0.0, 1.0):
        solvers.ddim(watched(TABLE, seen), TABLE, x, times, noise=lambda k, v=value: torch.full_like(x, v))
    bar = TABLE.alphas_cumprod
    variance = (1 - bar[500] / bar[499]) * (1 - bar[499]) / (1 - bar[500])
    assert ((seen[3][0] - seen[1][0]) - variance.sqrt()).abs().max() < 1e-10


def test_few_step_renoises_by_sigma_min():
    class Fixed:
        def __call__(self, x, t, condition=None):
            self.x = x
            return torch.full_like(x, 0.25)

    denoiser, one = Fixed(), torch.ones(1, 1, 2, 2, dtype=torch.float64)
    solvers.few_step(denoiser, EDMSchedule(), 80 * one, torch.tensor([80.0, 2.0]).double(), sigma_min=0.002, noise=lambda k: one)
    assert (denoiser.x - (0.25 + (4 - 0.002**2) ** 0.5)).abs().max() < 1e-12


def test_zero_snr_sampling_starts_from_the_teachers_own_mean():
    """At alpha = 0 a v network sees noise alone: x0 is the mean of the data, and DDIM passes the step without an infinity."""
    schedule = TableSchedule.from_config(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True}
    )

    class V(torch.nn.Module):
        def forward(self, x, t, condition):
            a, s = schedule.alpha(t).view(-1, 1, 1, 1), schedule.sigma(t).view(-1, 1, 1, 1)
            x0 = gaussian(schedule)(x, t)
            eps = (x - a * x0) / s
            return a * eps - s * x0

    denoiser = NetworkDenoiser(V(), schedule, "v", time_input="t")
    x = torch.tensor([-1.0, 0.2, 1.4, 0.7], dtype=torch.float64).view(1, 1, 2, 2)
    assert (denoiser(x, torch.tensor([999.0])) - 0.3).abs().max() < 1e-12
    out = solvers.ddim(denoiser, schedule, x, schedule.times(200))
    assert (out - (0.3 + 0.5 * x)).abs().max() < 0.02


def test_shifted_flow_reaches_the_mixture():
    """Two modes of unequal weight: each has its share, its mean and its spread."""
    schedule, draws = FlowSchedule(3.0), Draws(0, range(4000))
    means = torch.tensor([-1.0, 0.8], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 1, 1)
    denoiser = MixtureDenoiser(means, torch.tensor([0.3, 0.7], dtype=torch.float64), 0.1, schedule)
    out = solvers.ddim(denoiser, schedule, draws.normal("prior", (1, 1, 1)).double(), schedule.times(100)).flatten()
    assert (out < 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    for part, mean in ((out[out < 0], -1.0), (out[out > 0], 0.8)):
        assert part.mean().item() == pytest.approx(mean, abs=0.01)
        assert part.std().item() == pytest.approx(0.1, abs=0.015)

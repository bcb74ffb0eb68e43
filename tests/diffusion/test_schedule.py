import pytest
import torch

from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule, zero_terminal_snr
from distill_cli.diffusion.solvers import ddim_step

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def test_edm_times_are_the_papers():
    """Eq. 5 of 2206.00364 for 18 steps, first, second and last by hand."""
    times = EDMSchedule().times(18)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    assert len(times) == 18
    assert abs(times[0] - 80) < 1e-10
    assert abs(times[1] - (high + 1 / 17 * (low - high)) ** 7) < 1e-10
    assert abs(times[-1] - 0.002) < 1e-12


def test_edm_bins_run_from_small_to_large():
    sigma = EDMSchedule().at(torch.linspace(0, 1, 1000, dtype=torch.float64))
    assert (sigma.diff() > 0).all()
    assert abs(sigma[0] - 0.002) < 1e-12


@pytest.mark.parametrize(
    "config", [SD, {**SD, "rescale_betas_zero_snr": True}, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}]
)
def test_tables_are_those_of_diffusers(config):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**config).alphas_cumprod.double()
    assert (TableSchedule.from_config(config).alphas_cumprod - theirs).abs().max() < 2e-6


def test_zero_terminal_snr():
    plain = TableSchedule.from_config(SD).alphas_cumprod
    table = zero_terminal_snr(plain)
    assert table[-1] == 0
    assert abs(table[0] - plain[0]) < 1e-14
    schedule = TableSchedule(table)
    last = torch.tensor([999.0], dtype=torch.float64)
    assert schedule.alpha(last) == 0
    assert schedule.sigma(last) == 1


@pytest.mark.parametrize(
    ("schedule", "t"),
    [
        (EDMSchedule(), [0.002, 1.7, 80.0]),
        (TableSchedule.from_config(SD), [0.0, 20.0, 321.5, 999.0]),
        (FlowSchedule(), [0.0, 0.1, 0.5, 1.0]),
        (TableSchedule.from_config({**SD, "rescale_betas_zero_snr": True}), [0.0, 999.0]),
    ],
)
def test_time_inverts_the_noise_level(schedule, t):
    t = torch.tensor(t, dtype=torch.float64)
    assert (schedule.time(schedule.sigma(t) / schedule.alpha(t)) - t).abs().max() < 1e-6


@pytest.mark.parametrize("config", [SD, {**SD, "rescale_betas_zero_snr": True}])
def test_tables_preserve_the_variance(config):
    schedule, t = TableSchedule.from_config(config), torch.tensor([0.0, 20.0, 321.5, 999.0], dtype=torch.float64)
    assert (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 - 1).abs().max() < 1e-12


def test_the_spacing_is_that_of_diffusers():
    from diffusers import DDIMScheduler

    for steps in (7, 20, 50):
        scheduler = DDIMScheduler(**SD, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        assert TableSchedule.from_config(SD).times(steps).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("schedule", [EDMSchedule(), TableSchedule.from_config(SD), FlowSchedule()], ids=["edm", "table", "flow"])
def test_slopes_are_the_derivatives(schedule):
    """Autograd's, inside the intervals of a table; at its last time the slope is that of the interval before."""
    t = (torch.linspace(0.05, 0.95, 19, dtype=torch.float64) * schedule.t_max).requires_grad_()
    for value, slope in ((schedule.alpha(t), schedule.alpha_slope(t)), (schedule.sigma(t), schedule.sigma_slope(t))):
        expected = torch.autograd.grad(value.sum(), t, allow_unused=True)[0] if value.requires_grad else torch.zeros_like(t)
        assert torch.allclose(slope, torch.zeros_like(t) if expected is None else expected, rtol=1e-9, atol=0)
    last = torch.tensor([schedule.t_max], dtype=torch.float64)
    assert schedule.sigma_slope(last) > 0


def test_a_ddim_step_of_each_samples_own_times():
    """Closed forms: on EDM the line to x0; at t = 999 of zero terminal SNR, where alpha is 0, the noise is x itself."""
    x, x0 = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    t, r = torch.tensor([80.0, 3.0, 0.5]), torch.tensor([3.0, 0.5, 0.1])
    assert torch.allclose(ddim_step(EDMSchedule(), x, x0, t, r), x0 + (r.double() / t.double()).view(3, 1, 1, 1) * (x - x0), rtol=1e-12)
    table = TableSchedule.from_config({**SD, "rescale_betas_zero_snr": True})
    t, r = torch.full((3,), 999.0), torch.tensor([900.0, 500.0, 0.0])
    a, s = (value(r.double()).view(3, 1, 1, 1) for value in (table.alpha, table.sigma))
    assert torch.allclose(ddim_step(table, x, x0, t, r), a * x0 + s * x, rtol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_are_those_of_diffusers(shift):
    """The grid of every number of steps, and the times of training."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule, scheduler = FlowSchedule(shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    trained = schedule.at(torch.linspace(1, 0, 1000, dtype=torch.float64))
    assert (trained - scheduler.sigmas.double()).abs().max() < 1e-6
    for steps in (1, 4, 28):
        scheduler.set_timesteps(steps)
        assert (schedule.times(steps) - scheduler.sigmas[:-1].double()).abs().max() < 1e-6


def test_flow_times_of_training_are_logit_normal_and_shifted():
    """The share of times below a bound is the normal distribution's at the logit of the bound without its shift."""
    shift, mean, std = 3.0, 0.4, 1.3
    drawn = FlowSchedule(shift).drawn(Draws(0, range(20000)), mean, std)
    for bound in (0.3, 0.6, 0.9):
        before = bound / (shift - (shift - 1) * bound)
        expected = torch.special.ndtr((torch.logit(torch.tensor(before)) - mean) / std)
        assert (drawn < bound).float().mean().item() == pytest.approx(expected.item(), abs=0.01)

import pytest
import torch

from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule, zero_terminal_snr

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
        (FlowSchedule(), [0.1, 0.5, 1.0]),
        (TableSchedule.from_config({**SD, "rescale_betas_zero_snr": True}), [0.0, 999.0]),
    ],
)
def test_time_inverts_the_noise_level(schedule, t):
    t = torch.tensor(t, dtype=torch.float64)
    level = schedule.sigma(t) / schedule.alpha(t)
    assert (schedule.time(level) - t).abs().max() < 1e-6
    if not isinstance(schedule, EDMSchedule | FlowSchedule):
        assert (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 - 1).abs().max() < 1e-12


def test_spacings_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    for spacing, steps in (("trailing", 7), ("leading", 50), ("linspace", 20), ("trailing", 50)):
        offset = 1 if spacing == "leading" else 0
        scheduler = DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=offset)
        scheduler.set_timesteps(steps)
        assert TableSchedule.from_config(SD).times(steps, spacing, offset).tolist() == scheduler.timesteps.tolist()

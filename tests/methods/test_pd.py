"""Progressive distillation's mathematics: the paper's numbers, and what a perfect teacher makes exact."""

import pytest
import torch

from distill_cli.diffusion.consistency import sigma_at
from distill_cli.diffusion.denoiser import PARAMETERISATIONS, MixtureDenoiser, NetworkDenoiser, Scales
from distill_cli.diffusion.losses import distance
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule, add_noise, expand
from distill_cli.diffusion.solvers import ddim
from distill_cli.errors import UsageError
from distill_cli.methods.pd import maths
from tests.methods.test_consistency import Raw

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {
    "edm": EDMSchedule(),
    "table": TableSchedule.from_config(TABLE),
    "zero snr": TableSchedule.from_config(TABLE | {"rescale_betas_zero_snr": True}),
    "flow": FlowSchedule(),
}
SHAPE = (2, 3, 3)


def mixture(schedule):
    means = Draws(3, range(3)).normal("label", SHAPE).double()
    return MixtureDenoiser(means, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.3, schedule)


def noises(count=4):
    return Draws(1, range(count)).normal("prior", SHAPE).double()


def columns(times, k, count=4):
    return (times[j].expand(count) for j in (k, k + 1, k + 2))


def step(schedule, x, x0, t, r):
    """One DDIM step, as the paper writes it (eq. 8)."""
    (a, s), (a1, s1) = maths.coefficients(schedule, t), maths.coefficients(schedule, r)
    return expand(a1, x) * x0 + expand(s1 / s, x) * (x - expand(a, x) * x0)


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_golden(metric, golden):
    """The paper's target and weights: to 1e-8 with the reference program's float32 times and scalings, to 1e-4 with float64's."""
    g = golden("consistency")
    h = g.header
    schedule, scales = EDMSchedule(h["sigma_min"], h["sigma_max"], h["rho"]), Scales(h["sigma_data"], h["sigma_min"])
    high, low = h["sigma_max"] ** (1 / h["rho"]), h["sigma_min"] ** (1 / h["rho"])
    theirs = [(high + (g["index"] + k) / h["num_scales"] * (low - high)) ** h["rho"] for k in (0, 0.5, 1)]
    network = Raw(g["student.weight"], g["student.bias"])

    def errors(times, estimate):
        t, middle, end = (time.double() for time in times)
        x = add_noise(schedule, g["x"], g["noise"], t)
        return distance(metric, estimate(x), maths.target(g.mixture("teacher", schedule), schedule, x, t, middle, end), 0.0).detach()

    def single(x):
        t, norm = expand(theirs[0], x.float()), expand(theirs[0], x.float()) ** 2 + scales.sigma_data**2
        return scales.sigma_data**2 / norm * x + t * scales.sigma_data / norm**0.5 * network(1 / norm**0.5 * x, 250 * theirs[0].log(), None)

    assert (errors(theirs, single) / g[f"pd.{metric}.uniform"] - 1).abs().max() < 1e-8
    ours = [sigma_at(schedule, g["index"] + k, h["num_scales"]) for k in (0, 0.5, 1)]
    found = errors(ours, lambda x: NetworkDenoiser(network, schedule, "edm", scales)(x, ours[0]))
    assert (maths.weight("snr+1", schedule, ours[0]) * found / g[f"pd.{metric}.snr+1"] - 1).abs().max() < 1e-4


@pytest.mark.parametrize("spacing", ["schedule", "angle"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_by_the_target_arrives_where_two_of_the_teacher_do(name, spacing):
    """So a student that equals the target samples, in half the steps, the teacher's own images."""
    schedule = SCHEDULES[name]
    teacher, x = mixture(schedule), schedule.prior_std * noises()
    times = maths.grid(schedule, 8, spacing)
    reached = ddim(teacher, schedule, x, times[:-1])
    for k in range(0, 8, 2):
        t, middle, end = columns(times, k)
        x = step(schedule, x, maths.target(teacher, schedule, x, t, middle, end), t, end)
    assert (x - reached).abs().max() < 1e-10 * reached.abs().max()


@pytest.mark.parametrize("row", [row for row in PARAMETERISATIONS if row != "consistency"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_row_of_the_table_teaches_the_same_target(name, row):
    """A network of any parameterisation whose estimate is the mixture's: eps divides by alpha, so it is asked short of alpha 0."""
    schedule = SCHEDULES[name]
    exact = mixture(schedule)

    class Network(torch.nn.Module):
        def forward(self, x, time, condition):
            return self.owner.prediction(self.point, time, exact(self.point, time))

    network = Network()
    teacher = NetworkDenoiser(network, schedule, row, time_input="t")
    network.__dict__["owner"] = teacher

    def told(x, t, condition):
        network.point = x
        return teacher(x, t, condition)

    t, middle, end = columns(maths.grid(schedule, 8, "angle")[1:], 0)
    x = add_noise(schedule, exact.means[:1].expand(4, *SHAPE), noises(), t)
    ours, theirs = maths.target(told, schedule, x, t, middle, end), maths.target(exact, schedule, x, t, middle, end)
    assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_target_of_small_steps_is_the_posterior_mean(name):
    """With ever smaller steps x~ tends to the teacher's own estimate, in first order: what makes halving stable."""
    schedule = SCHEDULES[name]
    teacher, x = mixture(schedule), noises()
    errors = []
    for steps in (256, 512, 1024):
        t, middle, end = columns(maths.grid(schedule, steps, "angle")[steps // 4 :], 0)
        x_t = add_noise(schedule, teacher.means[:1].expand(4, *SHAPE), x, t)
        errors.append((maths.target(teacher, schedule, x_t, t, middle, end) - teacher(x_t, t)).abs().max().item())
    if schedule.bins is None:
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
        assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)
    assert errors[1] < 0.02


def test_the_last_target_is_the_teachers_last_estimate():
    schedule = EDMSchedule()
    teacher, x = mixture(schedule), noises()
    t, middle, end = columns(maths.grid(schedule, 4, "angle"), 2)
    assert end[0] == maths.END
    last = teacher(step(schedule, x, teacher(x, t), t, middle), middle)
    assert torch.equal(maths.target(teacher, schedule, x, t, middle, end), last)


@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_of_one_batch_have_times_of_their_own(name):
    schedule = SCHEDULES[name]
    teacher, x = mixture(schedule), noises()
    times = maths.grid(schedule, 8, "angle")
    index = torch.tensor([0, 2, 4, 6])
    together = maths.target(teacher, schedule, x, times[index], times[index + 1], times[index + 2])
    for k, i in enumerate(index):
        alone = maths.target(teacher, schedule, x[k : k + 1], *(times[i + j].view(1) for j in range(3)))
        assert torch.allclose(together[k : k + 1], alone, rtol=0, atol=1e-12)


def test_float32_at_large_noise():
    """The weighted mean loses nothing at sigma 80, where the paper's difference of two points loses digits."""
    schedule = EDMSchedule()
    exact = mixture(schedule)

    def single(x, t, condition):
        return exact(x.double(), t.double(), condition).float()

    x = 80 * noises()
    t, middle, end = columns(maths.grid(schedule, 256, "schedule"), 0)
    wide = maths.target(exact, schedule, x, t, middle, end)
    assert (maths.target(single, schedule, x.float(), t, middle, end) - wide).abs().max() < 1e-6


def test_weights():
    """snr+1 is the plain error of the velocity in a variance-preserving table, truncated-snr that of x0 or of the noise, the larger."""
    schedule = SCHEDULES["zero snr"]
    t = torch.tensor([0.0, 300.0, 800.0, 999.0], dtype=torch.float64)
    a, s = schedule.alpha(t), schedule.sigma(t)
    assert torch.allclose(maths.weight("snr+1", schedule, t), s**-2)
    assert torch.allclose(maths.weight("truncated-snr", schedule, t), torch.maximum((a / s) ** 2, torch.ones(4)))
    assert maths.weight("snr+1", schedule, t)[-1] == 1


def test_grids():
    """The student's times are every second one of the teacher's; the angle's are the paper's cosine schedule."""
    angle = maths.grid(EDMSchedule(), 4, "angle")
    assert torch.allclose(angle[1:4], torch.tensor([2.4139, 1.0, 0.4142], dtype=torch.float64), rtol=0.03)
    assert angle[0] == 80
    for schedule in SCHEDULES.values():
        for spacing in ("schedule", "angle"):
            times = maths.grid(schedule, 16, spacing)
            assert times[0] == schedule.t_max
            assert (times.diff() < 0).all()
    assert maths.grid(SCHEDULES["table"], 16, "schedule")[:-1:4].tolist() == [999, 749, 499, 249]  # diffusers' trailing times of 4 steps


def test_rounds():
    assert maths.rounds(32, 1) == [16, 8, 4, 2, 1]
    assert maths.rounds(12, 3) == [6, 3]
    for first, last, said in [(18, 4, "16 or 32"), (4, 4, "8"), (3, 4, "8"), (10, 1, "8")]:
        with pytest.raises(UsageError) as caught:
            maths.rounds(first, last)
        assert said in caught.value.hint

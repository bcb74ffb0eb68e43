"""The states of a sampling and of the forward process, and the score, against solvers and closed forms."""

from dataclasses import replace

import pytest
import torch

from distill_cli.diffusion import solvers
from distill_cli.diffusion.denoiser import MixtureDenoiser
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from distill_cli.models.lineage import Lineage
from distill_cli.models.pixel import create
from distill_cli.trace import record

TABLE = TableSchedule.from_config({"beta_schedule": "linear"})
SCHEDULES = {"edm": EDMSchedule(), "table": TABLE, "flow": FlowSchedule(shift=3.0)}
DRAWS, LABELS = Draws(5, [3, 8]), torch.tensor([1, 4])


def network(schedule, parameterisation):
    options = {"resolution": 8, "channels": [8, 8], "attention": [False, False], "groups": 4, "head": 8, "classes": ["a", "b", "c", "d"]}
    return create(**options, schedule=schedule, parameterisation=parameterisation, lineage=Lineage(name="x"))


@pytest.mark.parametrize("solver", ["heun", "ddim", "ancestral"])
def test_each_estimate_is_what_the_solver_returns_that_stops_there(tiny, solver):
    """A solver ends with the denoiser's answer at its own x_t, so that of times[:k] is the k-th estimate, bit for bit."""
    asked = tiny.with_defaults(solver, 5, None)
    walk = record.backward(tiny, DRAWS, LABELS, asked)
    assert torch.equal(walk.end, tiny.generate(DRAWS, LABELS, asked))
    task = tiny.task(DRAWS, LABELS, asked)
    assert walk.times.tolist() == [pytest.approx(time, rel=1e-6) for time in task.times.tolist()]
    for k in range(1, 6):
        part = replace(task, times=task.times[:k])
        assert torch.equal(tiny.solved(part, asked), walk.x0[k - 1].clamp(-1, 1))
    assert torch.equal(walk.x[0], 80 * DRAWS.normal("prior", tiny.shape))


@pytest.mark.parametrize("solver", ["pndm", "dpm++", "euler"])
def test_solvers_of_diffusers_are_traced(solver):
    model = network(TABLE, "eps")
    asked = model.with_defaults(solver, 6, None)
    walk = record.backward(model, DRAWS, LABELS, asked)
    assert torch.equal(walk.end, model.generate(DRAWS, LABELS, asked))
    assert len(walk) == 6
    assert (walk.times.diff() < 0).all()
    assert torch.equal(walk.x[0], DRAWS.normal("prior", model.shape))


def test_estimates_are_those_after_guidance(tiny):
    asked = tiny.with_defaults("heun", 3, 2.5)
    walk = record.backward(tiny, DRAWS, LABELS, asked)
    for k in range(3):
        x, t = walk.x[k], walk.times[k].float().expand(2)
        with torch.no_grad():
            cond, uncond = (tiny.denoiser(x, t, tiny.conditioner(labels)) for labels in (LABELS, torch.tensor([10, 10])))
        torch.testing.assert_close(walk.x0[k], uncond + 2.5 * (cond - uncond), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(walk.end, record.backward(tiny, DRAWS, LABELS, tiny.with_defaults("heun", 3, None)).end)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_forward_process_is_alpha_x0_plus_sigma_noise(name):
    x0, noise = DRAWS.normal("noise", (3, 4, 4)), DRAWS.normal("prior", (3, 4, 4))
    walk = record.forward(SCHEDULES[name], x0, noise, SCHEDULES[name].at(torch.linspace(0, 1, 7, dtype=torch.float64)))
    for t, x in zip(walk.times.tolist(), walk.x, strict=True):
        bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        alpha, sigma = {
            "edm": (1.0, t), "flow": (1 - t, t), "table": (bar[int(t)].sqrt().item(), (1 - bar[int(t)]).sqrt().item()),
        }[name]  # fmt: skip
        torch.testing.assert_close(x.double(), alpha * x0.double() + sigma * noise.double(), rtol=1e-6, atol=1e-6)
    wide = record.spread(SCHEDULES[name], walk.times, 0.5)
    big = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double() * 0.5
    other = torch.randn(200_000, generator=torch.Generator().manual_seed(1)).double()
    for k, t in enumerate(walk.times):
        x = SCHEDULES[name].alpha(t) * big + SCHEDULES[name].sigma(t) * other
        assert (x / wide[k]).std().item() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_score_is_the_gradient_of_the_log_density(name):
    means = torch.tensor([[-0.7, 0.1], [0.4, 0.6], [0.2, -0.5]], dtype=torch.float64)[:, :, None, None]
    weights, std, schedule = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.15, SCHEDULES[name]
    exact = MixtureDenoiser(means, weights, std, schedule)
    for fraction in (0.2, 0.6, 0.9):
        t = schedule.at(torch.tensor(fraction, dtype=torch.float64))
        x = torch.randn(50, 2, 1, 1, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
        a, s = schedule.alpha(t), schedule.sigma(t)
        variance = (a * std) ** 2 + s**2
        squares = (x[:, None] - a * means).square().sum((2, 3, 4))
        density = (weights.log() - squares / (2 * variance)).logsumexp(1)
        (closed,) = torch.autograd.grad(density.sum(), x)
        torch.testing.assert_close(record.score(exact, schedule, x.detach(), t), closed, rtol=1e-8, atol=1e-8)


def test_corrections_are_no_states():
    """Heun's correction is called ahead, at the next time and another x; with churn the next step begins at more noise than that."""
    means = torch.tensor([[-0.5, 0.0], [0.5, 0.0]], dtype=torch.float64)[:, :, None, None]
    exact = MixtureDenoiser(means, torch.tensor([0.5, 0.5]).double(), 0.1)
    times, x = EDMSchedule().times(9), 80 * torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    for noise in (None, lambda k: torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(k)).double()):
        seen = record.Watched(exact)
        end = solvers.heun(seen, EDMSchedule(), x, times, noise=noise)
        raised = [t * (2**0.5 if noise and 0.05 <= t <= 50 and t != times[-1] else 1) for t in times.tolist()]
        assert list(seen.calls) == pytest.approx(raised)
        assert torch.equal(list(seen.calls.values())[-1][1], end.float())
        seen = record.Watched(exact)  # at the border of churn a raised time is above that of the state before
        solvers.heun(seen, EDMSchedule(), x, EDMSchedule().times(18), noise=noise)
        assert len(seen.calls) == 18


def test_which_states_are_shown():
    assert record.kept(18, 4) == [0, 4, 8, 12, 16, 17]
    assert record.kept(1, 5) == [0]
    for count in range(1, 60):
        for most in (2, 10, 40):
            shown = record.kept(count, record.usual(count, most))
            assert len(shown) <= most + 1
            assert (shown[0], shown[-1]) == (0, count - 1)
    assert record.places(3, 11) == [0, 5, 10]
    assert record.places(1, 4) == [0]
    assert record.places(4, 4) == [0, 1, 2, 3]

"""Consistency distillation against the exact consistency function of a mixture of Gaussians, which its ODE gives."""

import pytest
import torch
from torch import nn

from distill_cli.data.points import POINTS
from distill_cli.diffusion.condition import NOTHING
from distill_cli.diffusion.consistency import ode_step
from distill_cli.diffusion.denoiser import MixtureDenoiser, NetworkDenoiser, Scales
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.models.conditioners import ClassConditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.plane import PlaneCodec
from tests.options import consistency, options
from tests.plane import Plane

SCHEDULE = EDMSchedule(0.02, 10.0)
MEANS, WEIGHTS, STD = torch.tensor([[-0.8, 0.3], [0.7, 0.6], [0.1, -0.9]]), torch.tensor([0.5, 0.3, 0.2]), 0.15
MIXTURE = MixtureDenoiser(MEANS.view(3, 2, 1, 1), WEIGHTS, STD, SCHEDULE)


class Network(Plane):
    """On points of the plane, with waves of ln sigma."""

    def __init__(self):
        super().__init__()
        sizes = (8, 128, 128, 128)
        hidden = [part for a, b in zip(sizes, sizes[1:]) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(128, 2))

    def forward(self, x, t, condition):
        angles = t[:, None] / 250 * torch.tensor([0.3, 0.6, 1.2])
        return self.layers(torch.cat([x.flatten(1), angles.sin(), angles.cos()], 1))[:, :, None, None]


class Points:
    """Points of the mixture as a set of images of one pixel with two channels."""

    kind, classes, shape = POINTS, (), (2, 1, 1)

    def __init__(self, count):
        draws = Draws(11, range(count))
        place = (draws.uniform("label")[:, None] > WEIGHTS.cumsum(0)).sum(1)
        self.x = MIXTURE.means[place] + STD * draws.normal("prior", self.shape)

    def __len__(self):
        return len(self.x)

    def batch(self, positions, draws):
        return self.x[list(positions)], torch.zeros(len(positions), dtype=torch.long)


def exact(x, sigma):
    """f(x, sigma): where 300 steps of Heun's method take x, from sigma to sigma_min."""
    x, times = x.double(), EDMSchedule(SCHEDULE.sigma_min, sigma).times(300)
    for t, r in zip(times[:-1], times[1:]):
        x = ode_step(MIXTURE, EDMSchedule(), x, t.expand(len(x)), r.expand(len(x)), NOTHING, "heun")
    return x


@pytest.mark.slow
def test_distillation_reaches_the_exact_function():
    """Measured (root mean square): 0.006, 0.066, 0.083, 0.087 at sigma 0.1, 0.5, 2, 10; the teacher's own estimate of x0,
    which is what the student starts near, is 0.026, 0.135, 0.455, 0.593 away."""
    torch.manual_seed(0)
    denoiser = NetworkDenoiser(Network(), SCHEDULE, scales=Scales(0.7, 0.02))
    teacher = Model(denoiser, ClassConditioner(), Lineage(name="plane"), codec=PlaneCodec())
    steps = 3000
    config = options("cm", device="cpu", steps=steps, batch_size=128, scales=30, metric="l2", target_decay=0.95)
    cm = consistency(config, teacher, Points(4096))
    cm.real = MIXTURE
    student = cm.trained["student"].module
    optimizer = torch.optim.RAdam(student.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        for loss in cm.turns(step, Draws(0, range(step * 128, step * 128 + 128))):
            loss.value.backward()
            optimizer.step()
            optimizer.zero_grad()
        cm.after(step)
    points, noise = Points(1000).x, Draws(5, range(1000)).normal("noise", (2, 1, 1))
    for sigma, bound in ((0.1, 0.012), (0.5, 0.09), (2.0, 0.12), (10.0, 0.13)):
        x, t = points + sigma * noise, torch.full((1000,), sigma)
        with torch.no_grad():
            there = exact(x, sigma)
            error, guess = ((out - there).square().mean().sqrt().item() for out in (student(x, t), MIXTURE(x, t)))
        assert error < bound < guess
    x = points
    with torch.no_grad():
        assert (student(x, torch.full((1000,), 0.02)) - x).abs().max() < 1e-6  # the boundary


def test_the_exact_function_is_right():
    """For one Gaussian it is known: f(x, sigma) - mean shrinks by sqrt((std^2 + sigma_min^2) / (std^2 + sigma^2))."""
    x = torch.tensor([[0.9, -2.0], [0.1, 0.4]]).view(2, 2, 1, 1).double()
    single = MixtureDenoiser(MEANS[:1].view(1, 2, 1, 1).double(), torch.ones(1).double(), STD)
    times = EDMSchedule(0.02, 2.0).times(300)
    y = x
    for t, r in zip(times[:-1], times[1:]):
        y = ode_step(single, EDMSchedule(), y, t.expand(2), r.expand(2), None, "heun")
    mean = MEANS[0].view(1, 2, 1, 1).double()
    expected = mean + (x - mean) * ((STD**2 + 0.02**2) / (STD**2 + 4)) ** 0.5
    assert (y - expected).abs().max() < 1e-4


def test_an_euler_step_is_first_order():
    x = torch.tensor([[0.9, -2.0]]).view(1, 2, 1, 1).double()
    single = MixtureDenoiser(MEANS[:1].view(1, 2, 1, 1).double(), torch.ones(1).double(), STD)
    mean = MEANS[0].view(1, 2, 1, 1).double()
    errors = {}
    for solver in ("euler", "heun"):
        for step in (0.1, 0.05):
            y = ode_step(single, EDMSchedule(), x, torch.tensor([1.0]).double(), torch.tensor([1 - step]).double(), None, solver)
            there = mean + (x - mean) * ((STD**2 + (1 - step) ** 2) / (STD**2 + 1)) ** 0.5
            errors[solver, step] = (y - there).abs().max().item()
    assert errors["euler", 0.1] / errors["euler", 0.05] == pytest.approx(4, rel=0.1)  # local errors: h^2 and h^3
    assert errors["heun", 0.1] / errors["heun", 0.05] == pytest.approx(8, rel=0.15)

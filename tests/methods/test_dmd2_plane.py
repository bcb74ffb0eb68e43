"""DMD2 without pairs on two separated modes of the plane, by the objective's own turns: 70% of the points left, and the exact teacher.

The one-step student begins with half of its points at each mode. How the weights come back without a regression, and what happens from the
teacher's own start, which is the mean of all points.
"""

import copy
from dataclasses import replace

import pytest  # noqa: F401
import torch

from distill_cli.config import NetworkConfig
from distill_cli.data import open_images
from distill_cli.data.points import TwoModes
from distill_cli.diffusion.condition import NOTHING
from distill_cli.diffusion.denoiser import MixtureDenoiser
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.methods.dmd2.config import DMD2Config
from distill_cli.methods.dmd2.objective import DMD2
from distill_cli.models.lineage import Lineage
from distill_cli.models.plane import new
from distill_cli.runs import Run
from docs.figure3 import MODES, WIDTH, numbers

SCHEDULE = EDMSchedule()
BATCH = 64


class Exact(MixtureDenoiser):
    """The denoiser of the two modes, in closed form, as the objective's teacher."""

    def __init__(self, like):
        super().__init__(MODES.float()[:, :, None, None], torch.tensor(TwoModes.weights), WIDTH, SCHEDULE)
        self.scales, self.error = like.scales, like.error


def fitted(network, target, steps):
    """The network after regression on target(draws) -> x, times, wanted x0."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        x, t, wanted = target(torch.Generator().manual_seed(step))
        loss = (network(x, t, NOTHING) - wanted).square().mean(dim=(1, 2, 3))
        weight = 1 / t**2 + 4 if t.std() > 0 else 1.0
        optimizer.zero_grad()
        (weight * loss).mean().backward()
        optimizer.step()


def denoising(exact):
    def target(generator):
        t = (torch.randn(256, generator=generator) * 2 - 0.5).exp().clamp(0.002, 80)
        side = (torch.rand(256, generator=generator) > TwoModes.weights[0]).long()
        x0 = MODES.float()[side][:, :, None, None] + WIDTH * torch.randn(256, 2, 1, 1, generator=generator)
        x = x0 + t[:, None, None, None] * torch.randn(256, 2, 1, 1, generator=generator)
        return x, t, exact(x, t)

    return target


def halves(generator):
    """Pure noise, and points of which the noise's sign says the mode."""
    z = torch.randn(256, 2, 1, 1, generator=generator)
    wanted = MODES.float()[(z[:, 0, 0, 0] > 0).long()][:, :, None, None] + WIDTH * torch.cat([z[:, 1:], (3 * z[:, 1:]).sin()], 1)
    return 80 * z, torch.full((256,), 80.0), wanted


def distilled(covering, steps, seed=0, **options):
    """Numbers of 2,000 points of the student before and after `steps` of the objective's turns."""
    torch.manual_seed(0)
    data = open_images("two-modes")
    model = new(data, NetworkConfig(channels=[64, 64]), SCHEDULE, "edm", Lineage(name="plane"), 0)
    exact = Exact(model.denoiser)
    fitted(model.denoiser.train().requires_grad_(True), denoising(exact), 400)
    config = DMD2Config(teacher="plane", device="cpu", batch_size=BATCH, student_steps=1, seed=seed, **options)
    one = DMD2(config, model, data if config.data else None)
    one.prepare(torch.device("cpu"), Run("/nowhere"))
    student = one.network("student")
    if covering:
        fitted(student, halves, 300)
    one.teacher = replace(one.teacher, denoiser=exact)

    @torch.no_grad()
    def points():
        x = 80 * Draws(1, range(2000)).normal("prior", (2, 1, 1))
        return numbers(averaged(x, torch.full((2000,), 80.0), NOTHING).flatten(1))

    averaged, before = copy.deepcopy(student), None
    before = points()
    rates = {"student": 3e-4, "fake": 1e-3}
    optimizers = {name: torch.optim.Adam(each.parameters(), lr=rates[name], betas=(0.5, 0.99)) for name, each in one.trained.items()}
    for step in range(steps):
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rates[name] * (1 - step / steps)
        for loss in one.turns(step, Draws(seed, range(step * BATCH, step * BATCH + BATCH))):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss.value.backward()
            optimizers[loss.network].step()
        for mean, value in zip(averaged.parameters(), student.parameters(), strict=True):
            mean.data.lerp_(value.data, 0.02)
    return before, points()

"""A whole distillation against an exact answer: the teacher is a Gaussian in closed form, the networks are small."""

from types import SimpleNamespace

import torch
from torch import nn

from distill_cli.config import DMDConfig
from distill_cli.diffusion.denoiser import MixtureDenoiser, NetworkDenoiser
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.distill.dmd import DMD
from distill_cli.models.model import ClassConditioner, Lineage, Model, UNet

MEAN, STD = torch.tensor([0.6, -0.4]), 0.3


class Plane(nn.Module):
    """A network on points of the plane, (B, 2, 1, 1), that stands in for a UNet."""

    config = SimpleNamespace(in_channels=2, sample_size=1)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t, class_labels, return_dict):
        time = t.expand(len(x)) / 1000
        inputs = torch.cat([x.flatten(1), time[:, None], (2 * time[:, None]).sin()], 1)
        return (self.layers(inputs)[:, :, None, None],)


def distilled(steps, **changes):
    """Points (B, 2) of a student of the Gaussian, trained by the objective's own turns."""
    torch.manual_seed(0)
    teacher = Model(NetworkDenoiser(UNet(Plane()), EDMSchedule(0.02, 10.0)), ClassConditioner(), Lineage(name="plane"))
    dmd = DMD(DMDConfig(device="cpu", **changes), teacher, None)
    dmd.real = MixtureDenoiser(MEAN.view(1, 2, 1, 1), torch.ones(1), STD, dmd.schedule)
    optimizers = {name: torch.optim.Adam(network.parameters(), lr=3e-3) for name, network in dmd.networks.items()}
    for step in range(steps):
        for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
            group["lr"] = 3e-3 * (1 - step / steps)
        for loss in dmd.turns(Draws(0, range(step * 64, step * 64 + 64))):
            loss.value.backward()
            optimizers[loss.network].step()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
    with torch.no_grad():
        return dmd.generate(Draws(1, range(2000)).normal("prior", (2, 1, 1)), torch.zeros(2000).long()).flatten(1)


def test_the_student_has_the_teachers_mean_and_spread():
    points = distilled(500, fake_steps=2)
    assert (points.mean(0) - MEAN).abs().max() < 0.08
    assert ((points.std(0) / STD - 1).abs() < 0.3).all()


def test_without_the_fake_score_it_collapses(monkeypatch):
    """The real score alone pulls every point to the mode: the spread is the fake score's doing."""
    original = DMD._match

    def real_alone(self, x, noise, t, condition):
        networks, self.networks = self.networks, {**self.networks, "fake": lambda noisy, *_: x}
        try:
            return original(self, x, noise, t, condition)
        finally:
            self.networks = networks

    monkeypatch.setattr(DMD, "_match", real_alone)
    points = distilled(500)
    assert (points.mean(0) - MEAN).abs().max() < 0.08
    assert (points.std(0) < 0.3 * STD).all()

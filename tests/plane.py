"""DMD's objective on points of the plane, without files: a small network and a teacher in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.denoiser import MixtureDenoiser, NetworkDenoiser
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import DMD
from distill_cli.models.backbones import Backbone
from distill_cli.models.conditioners import ClassConditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.plane import PlaneCodec


class Plane(Backbone):
    """A network on points of the plane, (B, 2, 1, 1)."""

    part, inputs, shape = "layers", frozenset(), (2, 1, 1)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)))

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        time = time[:, None] / 1000
        return self.net(torch.cat([x.flatten(1), time, (2 * time).sin()], 1))[:, :, None, None]


def distilled(real: MixtureDenoiser, schedule: EDMSchedule, steps: int, **options: Any) -> Tensor:
    """Points (2000, 2) of a student of `real` after `steps` of the objective's own turns."""
    torch.manual_seed(0)
    network = Plane()
    teacher = Model(NetworkDenoiser(network, schedule), ClassConditioner(), Lineage(name="plane"), codec=PlaneCodec())
    dmd = DMD(DMDConfig(device="cpu", **options), teacher, None)
    dmd.real = real
    optimizers = {name: torch.optim.Adam(each.parameters(), lr=3e-3) for name, each in dmd.trained.items()}
    for step in range(steps):
        for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
            group["lr"] = 3e-3 * (1 - step / steps)
        for loss in dmd.turns(step, Draws(0, range(step * 64, step * 64 + 64))):
            loss.value.backward()
            optimizers[loss.network].step()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
    with torch.no_grad():
        return dmd.generate(Draws(1, range(2000)).normal("prior", teacher.shape), NOTHING).flatten(1)

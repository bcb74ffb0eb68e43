"""Figure 3 of 2311.18828, recomputed: what each part of DMD is for, on points of the plane.

    python -m docs.figure3        # prints the table and writes docs/figure3.png; a minute on one core

Real points lie around two modes, 70% around the left one; their score is known in closed form. The generator starts
beside the left mode. (a) The real score alone drags all points to the nearest mode. (b) With the fake score they spread
over that mode, but never see the other. (c) With the regression on pairs both modes come back in the right proportion.
Matching times end at sigma 1, so that no noise of theirs bridges the modes. Objective, schedule and solver are distill's own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.diffusion import solvers
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

MODES, WEIGHTS, STD = torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), torch.tensor([0.7, 0.3]), 0.4
START = torch.tensor([-1.8, 1.0])
PAIRS = 1000
CASES: dict[str, dict[str, Any]] = {
    "(a) real score": {"fake_score": False},
    "(b) with fake score": {},
    "(c) with regression": {"regression_weight": 2.0},
}


class Plane(Backbone):
    """A network on points of the plane, (B, 2, 1, 1)."""

    part, inputs, shape = "layers", frozenset(), (2, 1, 1)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)))

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        time = time[:, None] / 1000
        return self.net(torch.cat([x.flatten(1), time, (2 * time).sin()], 1))[:, :, None, None]


class Pairs:
    """Noise and where the teacher's ODE takes it: a store of pairs in memory."""

    def __init__(self, real: MixtureDenoiser, schedule: EDMSchedule, teacher: Model) -> None:
        self.noise = Draws(2, range(PAIRS)).normal("prior", teacher.shape)
        with torch.no_grad():
            self.x0 = solvers.heun(real, schedule, schedule.prior_std * self.noise, schedule.times(40))
        made_by = {"teacher_hash": teacher.weights_hash(), "guidance_scale": 1.0, "negative_prompt": "", "settings_hash": ""}
        self.folder, self.manifest = None, SimpleNamespace(shape=teacher.shape, classes=[0], dtype="float32", **made_by)

    def __len__(self) -> int:
        return PAIRS

    def prompts(self) -> tuple[str, ...]:
        return ()

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        return {"noise": self.noise[indices], "x0": self.x0[indices].float(), "label": torch.zeros(len(indices), dtype=torch.long)}


def distilled(real: MixtureDenoiser, schedule: EDMSchedule, steps: int, start: Tensor | None = None, **options: Any) -> Tensor:
    """Points (2000, 2) of a student of `real` after `steps` of the objective's own turns; it begins at `start`."""
    torch.manual_seed(0)
    network = Plane()
    teacher = Model(NetworkDenoiser(network, schedule), ClassConditioner(), Lineage(name="plane"))
    pairs: Any = Pairs(real, schedule, teacher) if options.get("regression_weight") else None
    dmd = DMD(DMDConfig(device="cpu", **options, pairs=Path("memory") if pairs else None), teacher, pairs)
    dmd.real = real
    optimizers = {name: torch.optim.Adam(each.parameters(), lr=3e-3) for name, each in dmd.trained.items()}
    for step in range(200 if start is not None else 0):
        points = dmd.generate(Draws(3, range(step * 64, step * 64 + 64)).normal("prior", teacher.shape), NOTHING).flatten(1)
        ((points.mean(0) - start).square().sum() + (points.std(0) - STD).square().sum()).backward()
        optimizers["student"].step()
        optimizers["student"].zero_grad()
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


def two_modes(case: str | None, steps: int = 1500) -> Tensor:
    """Points (2000, 2) of the generator after a case of the figure; None: before any training."""
    schedule = EDMSchedule(0.02, 20.0)
    real = MixtureDenoiser(MODES.view(2, 2, 1, 1), WEIGHTS, STD, schedule)
    options = CASES[case] if case else {}
    return distilled(
        real, schedule, steps if case else 0, START, fake_steps=2 if options.get("fake_score", True) else 1, t_high=0.44, **options
    )


def numbers(points: Tensor) -> dict[str, float]:
    """The share of points nearer to each mode, how far the means of both lots are from their modes (nan: no points), and the
    spread of the left lot around its mean, over the real one."""
    far = points[:, 0] > 0
    return {
        "left_off": (points[~far].mean(0) - MODES[0]).norm().item(),
        "right_off": (points[far].mean(0) - MODES[1]).norm().item(),
        "left": 1 - far.double().mean().item(),
        "right": far.double().mean().item(),
        "spread": (points[~far].std(0).mean() / STD).item(),
    }


def draw(panels: dict[str, Tensor], path: Path) -> None:
    """Real points in grey, the generator's in red, a panel a case."""
    from PIL import Image, ImageDraw

    real = MODES[(Draws(4, range(2000)).uniform("label") > WEIGHTS[0]).long()] + STD * Draws(4, range(2000)).normal("prior", (2,))
    wide, high, zoom = 300, 200, 30
    canvas = Image.new("RGB", (wide * len(panels), high), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (title, points) in enumerate(panels.items()):
        for colour, cloud in (("#bbbbbb", real), ("#cc2222", points)):
            for x, y in (cloud * torch.tensor([zoom, -zoom]) + torch.tensor([k * wide + wide / 2, high / 2])).tolist():
                pen.point((x, y), colour)
        pen.text((k * wide + 8, 6), title, fill="black")
    canvas.save(path)


def main() -> None:
    panels = {"start": two_modes(None), **{case: two_modes(case) for case in CASES}}
    print("| case | left mode | right mode | spread of the left one |\n|---|---|---|---|")
    print(f"| real points | {WEIGHTS[0]:.0%} | {WEIGHTS[1]:.0%} | 1.00 |")
    for case, points in panels.items():
        found = numbers(points)
        print(f"| {case} | {found['left']:.1%} | {found['right']:.1%} | {found['spread']:.2f} |")
    path = Path(__file__).with_name("figure3.png")
    draw(panels, path)
    print(f"picture: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()

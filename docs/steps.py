"""How exactly the teacher's steps of consistency distillation follow its ODE, by the number of times of the grid.

    python -m docs.steps        # three minutes

From 128 noises the built-in digits' ODE is followed over the whole grid by one step an interval, as `distill cm --method cd` does
with `solver` and `scales`; and by Heun's on a grid of 80. Prints the mean distance of a picture (over its 768 numbers, in
[-1, 1]) to that of the 80, and the mean standard deviation of a number over the pictures, as a share of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_cli.diffusion.consistency import ode_step, sigma_at
from distill_cli.diffusion.noise import Draws
from distill_cli.models import load
from distill_cli.models.model import Model

NOISES = 128


@torch.no_grad()
def follow(model: Model, scales: int, solver: str) -> Tensor:
    """(NOISES, C, H, W) at sigma_min."""
    schedule = model.denoiser.schedule
    times = sigma_at(schedule, torch.arange(scales), scales - 1).float()
    x = schedule.t_max * Draws(11, range(NOISES)).normal("prior", model.shape)
    condition = model.conditioner(model.conditioner.labels(NOISES))
    for t, r in zip(times[:-1], times[1:], strict=True):
        x = ode_step(model.denoiser, x, t.expand(NOISES), r.expand(NOISES), condition, solver)
    return x


def main() -> None:
    model = load("digits")
    exact = follow(model, 80, "heun")
    print("| N | distance, Heun | distance, Ralston | spread, Heun | spread, Ralston |\n|---|---|---|---|---|")
    for scales in (8, 10, 12, 18):
        found = [follow(model, scales, solver) for solver in ("heun", "ralston")]
        distances = [f"{(x - exact).flatten(1).norm(dim=1).mean().item():.2f}" for x in found]
        spreads = [f"{(x.std(0).mean() / exact.std(0).mean()).item():.3f}" for x in found]
        print("|", " | ".join([str(scales), *distances, *spreads]), "|")


if __name__ == "__main__":
    main()

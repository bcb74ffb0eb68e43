"""Sets of points measured by the sliced Wasserstein distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill_cli.config import EvaluateConfig
from distill_cli.data import Images
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.evaluate.report import AGAIN_SEED, REFERENCE_SEED, Measure
from distill_cli.evaluate.sources import Source

DIRECTIONS = 128


def wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """(...) Wasserstein-1 distance of samples a (..., N) and b (..., M) on a line: the area between their quantile functions.

    Both functions are constant between neighbouring multiples of 1/N and 1/M, so the area is a finite sum.
    """
    a, b = a.double().sort(-1).values, b.double().sort(-1).values
    n, m = a.shape[-1], b.shape[-1]
    steps = [torch.arange(1, count + 1, dtype=torch.float64, device=a.device) / count for count in (n, m)]
    ends = torch.cat(steps).sort().values
    widths = torch.diff(ends, prepend=ends.new_zeros(1))
    middles = ends - widths / 2
    at = [(middles * count).long().clamp(max=count - 1) for count in (n, m)]
    return ((a[..., at[0]] - b[..., at[1]]).abs() * widths).sum(-1)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = DIRECTIONS) -> float:
    """The mean Wasserstein-1 distance of the projections of points a (N, 2) and b (M, 2) onto evenly spaced directions (1106.1824)."""
    angles = torch.arange(directions, dtype=torch.float64, device=a.device) * math.pi / directions
    onto = torch.stack([angles.cos(), angles.sin()])
    return wasserstein((a.double() @ onto).T, (b.double() @ onto).T).mean().item()


def spread(points: Tensor) -> float:
    """The standard deviation of points (N, 2) over both coordinates."""
    return points.double().var(0, correction=0).mean().sqrt().item()


class Sliced(Measure):
    """The distance to all points of a set, as a share of their standard deviation."""

    columns = {"sliced Wasserstein": ("sliced_wasserstein", ".4f")}
    least = 2

    def __init__(self, config: EvaluateConfig, images: Images) -> None:
        self.kind, self.shape, self.read = images.kind, images.shape, images.about
        if given := config.changed("classifier", "neighbours", "features", "measures", "attributes", "save_statistics"):
            images.kind.needs_pictures(given[0])
        if config.classes and max(config.classes) >= max(1, len(images.classes)):
            raise UsageError(f"--classes {max(config.classes)}: {config.data} has {len(images.classes)} classes")
        every = range(len(images))
        x, labels = images.batch(every, Draws(REFERENCE_SEED, every))
        wanted = torch.tensor(config.classes if config.classes is not None else range(max(1, len(images.classes))))
        self.points = x[torch.isin(labels, wanted)]
        self.classes, self.spread = tuple(images.classes), spread(self.points.flatten(1))
        which = "all" if config.classes is None else f"of classes {', '.join(map(str, config.classes))} the"
        self.text = f"{which} {len(self.points)} points of {config.data}"
        self.about = f"Sliced Wasserstein-1 distance over {DIRECTIONS} directions, as a share of the reference's standard deviation"

    def measure(self, source: Source) -> dict[str, float | None]:
        return self._scores(source.batch(range(len(source))))

    def _scores(self, x: Tensor) -> dict[str, float | None]:
        return {"sliced_wasserstein": sliced_wasserstein(x.flatten(1), self.points.flatten(1)) / self.spread}

    def again(self, count: int) -> tuple[dict[str, float | None], Tensor]:
        drawn = self.points[(Draws(AGAIN_SEED, range(count)).uniform("order") * len(self.points)).long()]
        return self._scores(drawn), drawn

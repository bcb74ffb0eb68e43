"""Points of the plane: sets by formula, each of 10,000 points x0 (2, 1, 1), on which a method is seen to work within seconds.

Each set is moved and scaled so that its mean is 0 and its standard deviation, over both coordinates, is 0.5: the sigma_data of EDM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distill_cli.data.kinds import Kind
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError

COUNT, SEED, STD = 10_000, 0, 0.5


class Points(Kind):
    """Points (B, 2, 1, 1), of any size; float32 (N, 2) in files."""

    name, new, measure, trace = "points", "models.plane:new", "evaluate.points:Sliced", "trace.plane:Plane"
    formats, drawn = ("npz",), False

    def size(self, picture: str) -> str:
        return "points of the plane"

    def written(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape

    def stored(self, x: Tensor) -> np.ndarray:
        if not x.isfinite().all():
            raise DistillError("the model's points are not finite numbers; nothing of this batch is written", "--precision bf16 or no")
        return x.float().flatten(1).cpu().numpy()

    def read(self, stored: np.ndarray, where: str) -> Tensor:
        if stored.dtype.kind != "f" or stored.ndim != 2 or stored.shape[1] != 2:
            raise UsageError(f"{where}: arr_0 is {stored.dtype} {stored.shape}, not float32 (N, 2)", "points are measured against points")
        if not np.isfinite(stored).all():
            raise UsageError(f"{where}: arr_0 has numbers that are not finite")
        return torch.from_numpy(stored.astype(np.float32))[:, :, None, None]


POINTS: Kind = Points()


class PointSet:
    """A set of points: position i is made of the draws of sample i alone, and belongs to class i modulo the number of classes."""

    kind = POINTS
    shape = (2, 1, 1)
    name: str
    classes: list[str] = []
    centre: tuple[float, float]
    """The mean of the formula."""
    variance: float
    """The variance of a coordinate, over both."""
    noise: float = 0.05
    """Standard deviation of the normal noise on each coordinate, which `variance` counts."""

    def __init__(self) -> None:
        draws = Draws(SEED, range(COUNT))
        self.labels = torch.arange(COUNT) % max(1, len(self.classes))
        raw = self.formula(draws.uniform("augment"), self.labels) + self.noise * draws.normal("noise", (2,)).double()
        self.points = self.standardised(raw).float()[:, :, None, None]
        self.about = f"{COUNT} points of {len(self.classes) or 'no'} classes in {self.name}"

    def formula(self, u: Tensor, labels: Tensor) -> Tensor:
        """Points (B, 2) float64 without noise from uniform numbers u (B,) in [0, 1)."""
        raise NotImplementedError

    def standardised(self, raw: Tensor) -> Tensor:
        """The formula's coordinates (..., 2) in those of the set."""
        return (raw - raw.new_tensor(self.centre)) * (STD / math.sqrt(self.variance))

    def __len__(self) -> int:
        return COUNT

    def batch(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        return self.points[list(positions)], self.labels[list(positions)]


class TwoModes(PointSet):
    """Two round modes at (-3, 0), with 70% of the points, and (3, 0): figure 3 of 2311.18828."""

    name = "two-modes"
    modes, weights = ((-3.0, 0.0), (3.0, 0.0)), (0.7, 0.3)
    noise = 0.4
    centre, variance = (-1.2, 0.0), (9 - 1.2**2) / 2 + noise**2

    def formula(self, u: Tensor, labels: Tensor) -> Tensor:
        return torch.tensor(self.modes, dtype=u.dtype)[(u >= self.weights[0]).long()]


class SCurve(PointSet):
    """Two arcs that meet in the form of an S: scikit-learn's make_s_curve without its second coordinate."""

    name = "s-curve"
    centre, variance = (0.0, 0.0), 1 + 2 / (3 * math.pi) + PointSet.noise**2

    def formula(self, u: Tensor, labels: Tensor) -> Tensor:
        t = 3 * math.pi * (u - 0.5)
        return torch.stack([t.sin(), t.sign() * (t.cos() - 1)], 1)


class Moons(PointSet):
    """Two half circles, one inside the other: scikit-learn's make_moons. Each one is a class."""

    name, classes = "moons", ["outer", "inner"]
    centre, variance = (0.5, 0.25), (0.75 + (0.5 + 0.75 - 2 / math.pi) / 2 - 0.25**2) / 2 + PointSet.noise**2

    def formula(self, u: Tensor, labels: Tensor) -> Tensor:
        outer = torch.stack([(math.pi * u).cos(), (math.pi * u).sin()], 1)
        return torch.where(labels[:, None] == 0, outer, outer.new_tensor([1.0, 0.5]) - outer)


class Rings(PointSet):
    """Two circles around one centre, of radius 1 and 0.5. Each one is a class."""

    name, classes = "rings", ["outer", "inner"]
    centre, variance = (0.0, 0.0), (1 + 0.25) / 4 + PointSet.noise**2

    def formula(self, u: Tensor, labels: Tensor) -> Tensor:
        angle = 2 * math.pi * u
        return torch.stack([angle.cos(), angle.sin()], 1) * torch.where(labels == 0, 1.0, 0.5)[:, None]

"""Points of the plane: the formulas, their scale, and that a point depends on its position alone."""

import math

import numpy as np
import pytest
import torch

from distill_cli.data import open_images
from distill_cli.data.points import COUNT, POINTS, Moons, Rings, SCurve, TwoModes
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError

SETS = ["two-modes", "s-curve", "moons", "rings"]


@pytest.mark.parametrize("name", SETS)
def test_mean_0_and_standard_deviation_one_half(name):
    """Within four standard errors of the formula's: the constants are closed forms."""
    images = open_images(name)
    x, labels = images.batch(range(COUNT), Draws(5, range(COUNT)))
    assert x.shape == (COUNT, 2, 1, 1)
    x = x.flatten(1).double()
    assert (x.mean(0).abs() < 4 * x.std(0) / COUNT**0.5).all()
    squares = x.square().mean(1)
    assert (squares.mean() - 0.25).abs() < 4 * squares.std() / COUNT**0.5
    assert torch.bincount(labels).tolist() == [COUNT // max(1, len(images.classes))] * max(1, len(images.classes))


@pytest.mark.parametrize("name", SETS)
def test_a_point_depends_on_its_position_alone(name):
    images = open_images(name)
    some, _ = images.batch([7, 3, 9_999], Draws(1, [100, 4, 5]))
    again, _ = open_images(name).batch(range(COUNT), Draws(2, range(COUNT)))
    assert torch.equal(some, again[[7, 3, 9_999]])
    assert len(again.flatten(1).unique(dim=0)) == COUNT


def test_moons_and_s_curve_are_scikit_learns():
    """Without noise, at the same angles."""
    datasets = pytest.importorskip("sklearn.datasets")
    theirs, labels = datasets.make_moons(200, shuffle=False)
    u = torch.linspace(0, 1, 100, dtype=torch.float64).repeat(2)
    moons = Moons().formula(u, torch.from_numpy(labels))
    np.testing.assert_allclose(moons.numpy(), theirs, atol=1e-12)
    theirs, t = datasets.make_s_curve(200, random_state=0)
    curve = SCurve().formula(torch.from_numpy(t) / (3 * math.pi) + 0.5, torch.zeros(200))
    np.testing.assert_allclose(curve.numpy(), theirs[:, [0, 2]], atol=1e-12)


def test_two_modes_and_rings():
    modes = TwoModes()
    centres = modes.standardised(torch.tensor(modes.modes, dtype=torch.float64))
    x = modes.points.flatten(1).double()
    near = torch.cdist(x, centres).argmin(1)
    assert (near == 0).double().mean() == pytest.approx(0.7, abs=4 * (0.21 / COUNT) ** 0.5)
    std = 0.4 * 0.5 / modes.variance**0.5
    for k in (0, 1):
        assert (x[near == k] - centres[k]).std(0).numpy() == pytest.approx(std, rel=0.05)
    rings = Rings()
    radii = rings.points.flatten(1).norm(dim=1) / 0.5 * rings.variance**0.5
    assert radii[rings.labels == 0].mean() == pytest.approx(1, abs=0.01)
    assert radii[rings.labels == 1].mean() == pytest.approx(0.5, abs=0.01)


def test_files_hold_points_as_they_are():
    x = torch.tensor([[30.5, -2.0], [0.1, 7.0]])[:, :, None, None]
    stored = POINTS.stored(x)
    assert stored.dtype == np.float32
    assert torch.equal(POINTS.read(stored, "x.npz"), x)
    assert torch.equal(POINTS.read(stored.astype(np.float64), "x.npz"), x)
    with pytest.raises(DistillError, match="not finite"):
        POINTS.stored(x / 0)
    with pytest.raises(UsageError, match=r"x.npz: arr_0 is uint8 \(2, 8, 8, 3\), not float32 \(N, 2\)"):
        POINTS.read(np.zeros((2, 8, 8, 3), np.uint8), "x.npz")
    with pytest.raises(UsageError, match="not finite"):
        POINTS.read(stored / 0, "x.npz")

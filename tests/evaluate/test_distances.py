"""Distances against closed forms."""

import warnings

import numpy as np
import pytest
import torch

from distill_cli.evaluate import distances
from distill_cli.evaluate.distances import Statistics, frechet, frechet_of, precision_recall
from distill_cli.evaluate.points import sliced_wasserstein, wasserstein


def normal(count, mean, root, seed=0):
    """Points whose sample mean and covariance are exactly `mean` and root root^T."""
    x = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1)).T)
    return x @ root.T + mean


def test_frechet_of_commuting_covariances():
    """|m|^2 + sum (sqrt a - sqrt b)^2 where both are diagonal."""
    one, other = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 0.1]).double()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    a, b = normal(50, torch.zeros(3).double(), one.diag()), normal(70, shift, other.diag(), 1)
    assert frechet(a, b) == pytest.approx(shift.square().sum().item() + (one - other).square().sum().item(), rel=1e-9)


def test_frechet_of_full_covariances_is_symmetric_and_agrees_with_scipy():
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(3)
    a, b = (
        torch.randn(200, 8, dtype=torch.float64, generator=generator) @ torch.randn(8, 8, dtype=torch.float64, generator=generator)
        for _ in "ab"
    )
    one, other = np.cov(a.numpy().T), np.cov(b.numpy().T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-8)
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)


def turned(values, seed=0):
    """Covariances (D, D) with these eigenvalues and the same random eigenvectors."""
    basis = torch.linalg.qr(
        torch.randn(len(values[0]), len(values[0]), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )[0]
    return [Statistics(torch.zeros(len(each)).double(), basis * each @ basis.T) for each in values]


def by_scipy(a, b):
    """The distance as published programs compute it: by the root of the product."""
    from scipy.linalg import sqrtm

    one, other = a.covariance.numpy(), b.covariance.numpy()
    return (a.mean - b.mean).square().sum().item() + np.trace(one + other - 2 * sqrtm(one @ other).real)


@pytest.mark.parametrize("rank", [96, 40])
@pytest.mark.parametrize("order", ["equal", "shuffled"])
def test_frechet_of_ill_conditioned_covariances(rank, order):
    """Eigenvalues over 12 decades, and the same without full rank. In closed form sum (sqrt a - sqrt b)^2, since both commute.

    scipy's root of the product is good to the square root of the rounding in A B, ours to the rounding itself.
    """
    one = torch.logspace(0, -12, 96, dtype=torch.float64)
    one[rank:] = 0
    other = 0.25 * one if order == "equal" else one[torch.randperm(96, generator=torch.Generator().manual_seed(1))]
    truth = (one.sqrt() - other.sqrt()).square().sum().item()
    a, b = turned([one, other])
    assert frechet_of(a, b) == pytest.approx(truth, rel=1e-9)
    assert frechet_of(a, a) == pytest.approx(0, abs=1e-13)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy says that the matrix is singular
        theirs = by_scipy(a, b)
    assert theirs == pytest.approx(truth, abs=1e-4)
    assert abs(frechet_of(a, b) - truth) <= abs(theirs - truth)


def test_frechet_of_covariances_that_do_not_commute():
    """Of two by two: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)); their axes lie 0.3 apart, their lengths six decades."""
    long, short, angle = 1.0, 1e-12, torch.tensor(0.3, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    axes = torch.tensor([long, short], dtype=torch.float64)
    a, b = (Statistics(torch.zeros(2).double(), each) for each in (axes.diag(), turn * axes @ turn.T))
    trace = long**2 * angle.cos() ** 2 + 2 * long * short * angle.sin() ** 2 + short**2 * angle.cos() ** 2
    truth = 2 * (long + short) - 2 * (trace + 2 * long * short).sqrt().item()
    assert frechet_of(a, b) == pytest.approx(truth, rel=1e-9)


def test_frechet_of_a_singular_covariance_is_finite():
    flat = torch.zeros(10, 4, dtype=torch.float64)
    flat[:, 0] = torch.arange(10)
    assert frechet(flat, flat + 1) == pytest.approx(4.0, abs=1e-6)


def test_precision_and_recall_of_points_on_a_line(monkeypatch):
    """Reals at 0..9: each one's third neighbour is 2 away, 3 at the ends."""
    real = torch.arange(10, dtype=torch.float64)[:, None]
    fake = torch.tensor([[-3.5], [-2.5], [4.4], [12.5]]).double()
    precision, recall = precision_recall(real, fake, 3)
    assert precision == 0.5  # -2.5 is in 0's ball, 4.4 is, 12.5 (3.5 from 9) and -3.5 are not
    # the fakes' balls reach 16, 15, 8.1 (its third is 12.5) and 16: all reals are covered
    assert recall == 1.0
    monkeypatch.setattr(distances, "BLOCK", 23)  # two rows at a time
    assert precision_recall(real, fake, 3, distances.radii(real, 3)) == (precision, recall)
    dropped = precision_recall(real, torch.tensor([[0.0], [0.1], [0.2], [0.3], [0.4]]).double(), 3)
    assert dropped == (1.0, 0.1)  # one mode: precise, and all but one real point are missed


def test_wasserstein_on_a_line():
    """By scipy, for samples of other sizes too; of a shift it is the shift."""
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for n, m in ((7, 7), (5, 3), (12, 18), (1, 4)):
        a, b = torch.randn(n, generator=generator).double(), 2 * torch.randn(m, generator=generator).double() + 1
        assert wasserstein(a, b).item() == pytest.approx(stats.wasserstein_distance(a.numpy(), b.numpy()), rel=1e-12)
    assert wasserstein(a.expand(2, 1), torch.stack([a, a + 3])).tolist() == pytest.approx([0, 3])


def test_sliced_wasserstein_is_the_mean_over_directions():
    """Of two points it is their distance times the mean of |cos|, 2/pi; it does not change where both sets are turned."""
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])
    assert sliced_wasserstein(a, b) == pytest.approx(5 * 2 / torch.pi, rel=1e-4)
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert sliced_wasserstein(a @ quarter, b @ quarter) == pytest.approx(sliced_wasserstein(a, b), rel=1e-6)

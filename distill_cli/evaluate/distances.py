"""Distances between two sets of features, (N, D) and (M, D) in float64."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**24
"""Most distances in memory at once."""


def _covariance(x: Tensor) -> Tensor:
    """(D, D) covariance of the rows, divided by N - 1."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of normal distributions fitted to both sets (Heusel et al. 1706.08500, eq. 6).

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) for covariances A and B.
    """
    one, other = _covariance(a), _covariance(b)
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((a.mean(0) - b.mean(0)).square().sum() + one.trace() + other.trace() - 2 * mixed).item())


def radii(x: Tensor, neighbours: int) -> Tensor:
    """(N,) distance from each row to its k-th nearest other row."""
    return torch.cat([torch.cdist(part, x).kthvalue(neighbours + 1).values for part in x.split(max(1, BLOCK // len(x)))])


def _covered(x: Tensor, centres: Tensor, reach: Tensor) -> float:
    """The share of rows in x that lie in at least one ball around `centres`."""
    parts = x.split(max(1, BLOCK // len(centres)))
    return torch.cat([(torch.cdist(part, centres) <= reach).any(1) for part in parts]).double().mean().item()


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3, reach: Tensor | None = None) -> tuple[float, float]:
    """Precision, the share of `fake` inside the region of `real`, and recall, the reverse (Kynkäänniemi et al. 1904.06991, eq. 1 to 3).

    The region of a set is the union of balls around its points, each reaching to the k-th nearest neighbour. `reach`: radii of `real`.
    """
    reach = radii(real, neighbours) if reach is None else reach
    return _covered(fake, real, reach), _covered(real, fake, radii(fake, neighbours))

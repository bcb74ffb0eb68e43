"""Distances between two sets of features, (N, D) and (M, D); all arithmetic is float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**22
"""Most distances in memory at once."""
ROWS = 4096
"""Rows of features that are float64 at once."""


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D), divided by N - 1, of features: all that a Fréchet distance needs."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Statistics:
        """The statistics of features (N, D), in two passes over blocks of rows."""
        mean = sum((part.double().sum(0) for part in x.split(ROWS)), x.new_zeros(x.shape[1], dtype=torch.float64)) / len(x)
        covariance = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for part in x.split(ROWS):
            centred = part.double() - mean
            covariance.addmm_(centred.T, centred)
        return cls(mean, covariance / (len(x) - 1))

    def factor(self) -> Tensor:
        """(D, R) whose product with its own transpose is the covariance; R is the rank, as far as float64 tells it."""
        values, vectors = torch.linalg.eigh(self.covariance)
        real = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
        return vectors[:, real] * values[real].sqrt()


def frechet_of(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two normal distributions (Heusel et al. 1706.08500, eq. 6).

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) for covariances A and B. For A = F F^T and B = G G^T the last trace is the sum of the
    singular values of F^T G. So no root is taken of a difference that rounding has left, and singular covariances are no special case.
    """
    mixed = torch.linalg.svdvals(a.factor().T @ b.factor()).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * mixed
    return max(0.0, distance.item())


def frechet(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of features (N, D) and (M, D)."""
    return frechet_of(Statistics.of(a), Statistics.of(b))


def frechet_spread(x: Tensor, other: Statistics, resamples: int) -> float:
    """The standard deviation of the Fréchet distance of x (N, D) to `other` over bootstrap resamples of x.

    A resample repeats rows, so its distance is too large; how much it varies is what is asked.
    """
    values, vectors = torch.linalg.eigh(other.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    found = []
    for k in range(resamples):
        again = Statistics.of(x[np.random.default_rng(k).integers(len(x), size=len(x))])
        mixed = torch.linalg.eigvalsh(root @ again.covariance @ root).clamp(min=0).sqrt().sum()
        found.append((again.mean - other.mean).square().sum() + again.covariance.trace() - 2 * mixed)
    return torch.stack(found).std().item()


def kernel_distance(a: Tensor, b: Tensor, subsets: int, size: int, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the kernel inception distance (Bińkowski et al. 1801.01401, section 4).

    It is the unbiased squared MMD of `size` rows of each set under the kernel (x.y / D + 1)^3. Subsets are drawn as torch-fidelity
    draws them, so both find the same numbers.
    """
    generator = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x, y = (each[generator.choice(len(each), size, replace=False)].double() for each in (a, b))
        inside = sum((kernel.sum() - kernel.trace()) / (size * (size - 1)) for kernel in (_kernel(x, x), _kernel(y, y)))
        found.append(inside - 2 * _kernel(x, y).mean())
    distances = torch.stack(found)
    return distances.mean().item(), distances.std(correction=0).item()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 1606.03498, section 4).

    `logits` (N, K) are without the bias of the last layer, as in the original program. The order is torch-fidelity's.
    """
    logits = logits[np.random.RandomState(seed).permutation(len(logits))].double()
    logs, count = logits.log_softmax(1), len(logits)
    parts = [logs[k * count // splits : (k + 1) * count // splits] for k in range(splits)]
    scores = torch.stack([(part.exp() * (part - part.exp().mean(0).log())).sum(1).mean().exp() for part in parts])
    return scores.mean().item(), scores.std(correction=0).item()


def distances_between(x: Tensor, centres: Tensor) -> Iterator[Tensor]:
    """(B, M) Euclidean distances of x (N, D) to all `centres` (M, D), a block of rows at a time."""
    centres = centres.double()
    for part in x.split(max(1, BLOCK // len(centres))):
        yield torch.cdist(part.double(), centres)


def radii(x: Tensor, neighbours: int) -> Tensor:
    """(N,) distance from each row to its k-th nearest other row."""
    return torch.cat([block.kthvalue(neighbours + 1).values for block in distances_between(x, x)])


def covered(x: Tensor, centres: Tensor, reach: Tensor) -> Tensor:
    """(N,) in how many of the balls around `centres` (M, D) of radii `reach` (M,) each row of x (N, D) lies."""
    return torch.cat([(block <= reach).sum(1) for block in distances_between(x, centres)])


def nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) distance of each row of x to the nearest of `centres`, and (N,) which one that is."""
    found = [block.min(1) for block in distances_between(x, centres)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3, reach: Tensor | None = None) -> tuple[float, float]:
    """Precision, the share of `fake` inside the region of `real`, and recall, the reverse (Kynkäänniemi et al. 1904.06991, eq. 1 to 3).

    The region of a set is the union of balls around its points, each reaching to the k-th nearest neighbour. `reach`: radii of `real`.
    """
    reach = radii(real, neighbours) if reach is None else reach
    precise, recalled = covered(fake, real, reach) > 0, covered(real, fake, radii(fake, neighbours)) > 0
    return precise.double().mean().item(), recalled.double().mean().item()

"""Measures of pictures by what a network sees of them: a row of MEASURES each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from math import isnan

import torch
from torch import Tensor

from distill_cli.config import EvaluateConfig
from distill_cli.evaluate.distances import (
    Statistics,
    covered,
    distances_between,
    frechet_of,
    frechet_spread,
    inception_score,
    kernel_distance,
    nearest,
    radii,
)
from distill_cli.evaluate.kept import Seen
from distill_cli.evaluate.networks import Network
from distill_cli.evaluate.page import SPREAD

SUBSET = 1000
"""Pictures in a subset of the kernel inception distance as published."""
SPLITS = 10
Score = tuple[float, float | None]
"""A value and its spread."""


class Needs(IntEnum):
    """What a measure needs of the real pictures, and what there is of them."""

    NOTHING, STATISTICS, PICTURES = range(3)


class Reference:
    """What a network sees of the real pictures; of a file of statistics, mean and covariance alone."""

    def __init__(self, seen: Seen | None, statistics: Statistics | None, neighbours: int) -> None:
        self._seen, self._statistics, self.neighbours = seen, statistics, neighbours

    @property
    def seen(self) -> Seen:
        assert self._seen is not None
        return self._seen

    @cached_property
    def statistics(self) -> Statistics:
        return self._statistics or Statistics.of(self.seen.features)

    @cached_property
    def reach(self) -> Tensor:
        """(N,) distance of each real picture to its k-th nearest neighbour."""
        return radii(self.seen.features, self.neighbours)

    @cached_property
    def alone(self) -> Tensor:
        """(N,) distance of each real picture to its nearest neighbour."""
        return radii(self.seen.features, 1)


def share(hits: Tensor) -> Score:
    """The mean of values (N,), and its standard error."""
    values = hits.double()
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


def _accuracy(real: Reference, fake: Seen, config: EvaluateConfig) -> Sequence[Score]:
    assert fake.logits is not None
    assert fake.labels is not None
    return [share(fake.logits.argmax(1).eq(fake.labels))]


def _frechet(real: Reference, fake: Seen, config: EvaluateConfig) -> Sequence[Score]:
    spread = frechet_spread(fake.features, real.statistics, config.bootstrap) if config.bootstrap > 1 else None
    return [(frechet_of(Statistics.of(fake.features), real.statistics), spread)]


def subset(real: int, fake: int, config: EvaluateConfig) -> int:
    """Pictures in a subset of the kernel inception distance."""
    return config.kid_subset_size or min(SUBSET, real, fake)


def _kid(real: Reference, fake: Seen, config: EvaluateConfig) -> Sequence[Score]:
    size = subset(len(real.seen), len(fake), config)
    return [kernel_distance(fake.features, real.seen.features, config.kid_subsets, size)]


def _inception_score(real: Reference, fake: Seen, config: EvaluateConfig) -> Sequence[Score]:
    assert fake.logits is not None
    return [inception_score(fake.logits, min(SPLITS, len(fake)))]


def _precision_recall(real: Reference, fake: Seen, config: EvaluateConfig) -> Sequence[Score]:
    own = radii(fake.features, real.neighbours)
    precise, recalled = covered(fake.features, real.seen.features, real.reach), covered(real.seen.features, fake.features, own)
    return [share(precise > 0), share(recalled > 0)]


def _density_coverage(real: Reference, fake: Seen, config: EvaluateConfig) -> Sequence[Score]:
    """Naeem et al. 2002.09797, eq. 4 and 5."""
    dense = covered(fake.features, real.seen.features, real.reach) / real.neighbours
    return [share(dense), share(nearest(real.seen.features, fake.features)[0] <= real.reach)]


def _memorisation(real: Reference, fake: Seen, config: EvaluateConfig) -> Sequence[Score]:
    """The share of copies, and how near samples are.

    A sample is a copy if it is nearer to its nearest real picture than that picture is to any other real one: it is not authentic (Alaa et
    al. 2102.08921, section 4). Nearness is the median distance to the nearest real picture, over the same median between real pictures.
    """
    distance, which = nearest(fake.features, real.seen.features)
    own = real.alone.median().clamp(min=torch.finfo(torch.float64).tiny)
    return [share(distance < real.alone[which]), ((distance.median() / own).item(), None)]


def _diversity(real: Reference, fake: Seen, config: EvaluateConfig) -> Sequence[Score]:
    """The mean distance between pictures of the same prompt or class, over that between any two pictures.

    1: a prompt's pictures differ as much as all pictures do; 0: they are all the same.
    """
    assert fake.labels is not None
    between = _apart(fake.features)
    inside = [_apart(fake.features[fake.labels == label]) for label in fake.labels.unique() if (fake.labels == label).sum() > 1]
    return [share(torch.tensor(inside, dtype=torch.float64) / between) if inside and between else (float("nan"), None)]


def _apart(x: Tensor) -> float:
    """The mean distance between two different rows of x (N, D)."""
    return sum(block.sum().item() for block in distances_between(x, x)) / (len(x) * (len(x) - 1))


@dataclass(frozen=True)
class Measure:
    """A measure: its scores by the ends of their keys, with titles and formats; what it needs; and how it is made."""

    scores: Mapping[str, tuple[str, str]]
    made: Callable[[Reference, Seen, EvaluateConfig], Sequence[Score]]
    needs: Needs = Needs.PICTURES
    logits: bool = False
    """Whether it needs a network that classifies."""
    labels: bool = False
    """Whether it needs labels of the samples, and a network that knows them."""
    groups: bool = False
    """Whether it needs to know which samples have the same prompt or class."""

    def fits(self, network: type[Network]) -> bool:
        """Whether it can be made of what a network gives."""
        return (network.classifies or not self.logits) and (network.labels or not self.labels)

    def keys(self, network: Network) -> dict[str, tuple[str, str]]:
        """Its columns in the features of a network: titles, each with a key of the rows and a format."""
        titles = {key: network.distance if key == "frechet" else title + network.suffix for key, (title, _) in self.scores.items()}
        return {titles[key]: (network.prefix + key, form) for key, (_, form) in self.scores.items()}

    def of(self, network: Network, real: Reference, fake: Seen, config: EvaluateConfig) -> dict[str, float | None]:
        """The scores of samples by their keys, each with its spread; None without the labels that it needs."""
        keys = [key for key, _ in self.keys(network).values()]
        if (self.labels or self.groups) and fake.labels is None:
            return dict.fromkeys(keys)
        out: dict[str, float | None] = {}
        for key, (value, spread) in zip(keys, self.made(real, fake, config), strict=True):
            out[key] = None if isnan(value) else value
            if spread is not None:
                out[key + SPREAD] = spread
        return out


MEASURES = {
    "accuracy": Measure({"accuracy": ("accuracy", ".3f")}, _accuracy, Needs.NOTHING, logits=True, labels=True),
    "frechet": Measure({"frechet": ("Fréchet distance", ".4f")}, _frechet, Needs.STATISTICS),
    "kid": Measure({"kid": ("KID", ".6f")}, _kid),
    "inception-score": Measure({"score": ("IS", ".3f")}, _inception_score, Needs.NOTHING, logits=True),
    "precision-recall": Measure({"precision": ("precision", ".3f"), "recall": ("recall", ".3f")}, _precision_recall),
    "density-coverage": Measure({"density": ("density", ".3f"), "coverage": ("coverage", ".3f")}, _density_coverage),
    "diversity": Measure({"diversity": ("diversity", ".3f")}, _diversity, Needs.NOTHING, groups=True),
    "memorisation": Measure({"copies": ("copies", ".3f"), "nearness": ("nearness", ".3f")}, _memorisation),
}

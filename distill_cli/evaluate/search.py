"""Search for the best times of a few-step consistency student (Song et al. 2303.01469, section 3 and appendix C)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from distill_cli import launch
from distill_cli.config import EvaluateConfig, SampleConfig
from distill_cli.data import open_images
from distill_cli.data.pictures import finished, from_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.evaluate.distances import Statistics, frechet_of
from distill_cli.evaluate.networks import Own
from distill_cli.evaluate.pictures import ENOUGH, statistics_of
from distill_cli.models.model import Model
from distill_cli.models.times import from_indices

UNUSED = 2**41
"""First noise index of the search, out of reach of any later job: times are never measured on the noise they were chosen on."""


def lowest(score: Callable[[int], float], low: int, high: int) -> int:
    """The place of the lowest score in low .. high (inclusive) by ternary search, which assumes that scores fall and then rise."""
    while high - low > 2:
        third = (high - low) // 3
        left, right = low + third, high - third
        if score(left) <= score(right):
            high = right - 1
        else:
            low = left + 1
    return min(range(low, high + 1), key=score)


def search_times(config: SampleConfig, model: Model, steps: int) -> tuple[Model, list[int], list[dict[str, Any]]]:
    """Find the student's `steps` best times in turn, each by ternary search; returns the student, the times' indices, and every score.

    The score is the Fréchet distance of `config.num` images with seed `config.seed` in the features of `config.classifier`.
    """
    model.codec.kind.needs_pictures("--search-times")
    schedule = model.denoiser.schedule
    if not model.sampler.edits:
        raise UsageError(f"--search-times {steps}: for consistency students (distill cm) alone")
    if steps >= schedule.grid:
        raise UsageError(f"--search-times {steps}: this student has {schedule.grid} times, and its last one is sigma_min")
    if config.num < 2:
        raise UsageError(f"--num {config.num}: too few images to measure")
    if launch.world_size() > 1:
        raise UsageError("--search-times: runs in one process", "start one")
    where = launch.device(config.device)
    model.ready(where, launch.HALF.get(config.precision))
    network = Own(EvaluateConfig(classifier=config.classifier), where)
    if network.info.shape != model.shape:
        made = f"--classifier {config.classifier}: knows images of {network.info.shape}, the student makes {model.shape}"
        raise UsageError(made, "distill classifier trains one for your images")
    data = network.info.data
    reference = statistics_of(network, open_images(data, model.shape[-1]), config.classes, where)
    if config.num < ENOUGH * network.width:
        few = f"warning: {config.num} images for {network.width} features: the distances are mostly their number; raise --num"
        print(few, file=sys.stderr)
    labels = model.conditioner.labels(config.num, config.classes)
    found: list[int] = [0]
    known: dict[tuple[int, ...], float] = {}

    def timed(indices: Sequence[int]) -> Model:
        return replace(model, sampler=model.sampler.with_times(from_indices(schedule, indices)))

    def score(index: int) -> float:
        indices = (*found, index)
        if indices not in known:
            at = timed(indices)
            features = []
            for first in range(0, config.num, config.batch_size):
                draws = Draws(config.seed, range(UNUSED + first, UNUSED + min(config.num, first + config.batch_size)))
                with launch.autocast(where, config.precision):
                    images = at.sample(draws, labels[first : first + config.batch_size])
                features.append(network(from_uint8(finished(images)).to(where))["features"].cpu())
            known[indices] = frechet_of(Statistics.of(torch.cat(features)), reference)
            print(f"index:{','.join(map(str, indices))}  Fréchet distance {known[indices]:.4f}", file=sys.stderr)
        return known[indices]

    for position in range(1, steps):
        found.append(lowest(score, found[-1] + 1, schedule.grid - 1 - (steps - position)))
    return timed(found), found, [{"indices": list(indices), "frechet": value} for indices, value in sorted(known.items())]

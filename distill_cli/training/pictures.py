"""Health by pictures: while a run trains, the student's pictures are measured beside the teacher's of the same noise.

The teacher's pictures are made once and stored in the run's folder. Each look measures the average's pictures from the same noise and
conditions, so from look to look nothing changes but the weights. Process 0 looks, and the others wait for it: no number depends on how
many they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill_cli import shards
from distill_cli.config import StudentConfig, TrainingConfig
from distill_cli.data.pictures import from_uint8, to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.launch import autocast
from distill_cli.methods.registry import load
from distill_cli.models import classifier
from distill_cli.models.classifier import Classifier
from distill_cli.models.model import LARGE, Model
from distill_cli.models.sampler import Sampling
from distill_cli.processes import say
from distill_cli.training import checkpoint, signs
from distill_cli.training.memory import result
from distill_cli.training.objective import Objective, Row, span_at

FILE = "teacher-pictures.safetensors"
FIRST = 2**40
"""The first sample's index, outside the range of any job: the first pictures are those of the sample grids."""
ALIKE = 4
"""Pictures of one class or prompt, at least."""
LOOKS, SHARE = 20, 0.02
"""Looks in a run by default, and the share of the run's network evaluations that they and the teacher's pictures may cost."""
FEWEST = 5
"""Fewer looks than these say nothing about where a run goes."""
DARK = 1e-3
"""A teacher's measure below this (of a grey teacher the saturation) is not compared."""
LUMA = (0.2126, 0.7152, 0.0722)
"""Weights of red, green and blue in luminance (ITU-R BT.709)."""


def spread(images: Tensor, labels: Tensor) -> Tensor:
    """How much images (B, C, H, W) differ inside their classes (B,): the mean standard deviation of a value."""
    x = images.detach().float().flatten(1)
    same = (labels[:, None] == labels[None]).to(x)
    means = same @ x / same.sum(1, keepdim=True)
    return (x - means).square().mean(0).sqrt().mean()


def measures(pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """Measures of pictures (N, 3, H, W) in [-1, 1] of labels (N,), on a scale of 0 to 1.

    Luminance: its mean. Saturation: the mean difference between a pixel's largest and smallest channel. Contrast: the mean standard
    deviation of luminance inside a picture. Sharpness: the root of the power in the finest octave of luminance, what its means over
    2x2 pixels leave out. Spread: see `spread`.
    """
    x = (pictures.double() + 1) / 2
    luma = torch.einsum("bchw,c->bhw", x, x.new_tensor(LUMA))
    even = luma[:, : luma.shape[1] // 2 * 2, : luma.shape[2] // 2 * 2]
    coarse = torch.nn.functional.avg_pool2d(even[:, None], 2)
    fine = even.square().mean() - coarse.square().mean()  # Parseval: 2x2 means and what they leave out are orthogonal
    return {
        "luminance": luma.mean().item(),
        "saturation": (x.amax(1) - x.amin(1)).mean().item(),
        "contrast": luma.flatten(1).std(1, correction=0).mean().item(),
        "sharpness": fine.clamp(min=0).sqrt().item(),
        "spread": spread(x, labels).item(),
    }


def drift(ratios: Mapping[str, float]) -> float:
    """How far measures are from the teacher's: the root mean square of the logarithms of their ratios."""
    logs = [math.log(max(value, DARK)) for value in ratios.values()]
    return math.sqrt(sum(log * log for log in logs) / len(logs)) if logs else 0.0


def best_by(config: TrainingConfig) -> str:
    """What checkpoints are ranked by."""
    return getattr(config, "best_by", "loss")


def judge_of(teacher: Model) -> Classifier | None:
    """The built-in classifier that takes the teacher's pictures and knows its classes; None if there is none."""
    for name in classifier.names():
        found = classifier.load(str(classifier.BUILTIN / f"{name}{classifier.SUFFIX}"))
        if found.info.shape == teacher.shape and found.info.classes == tuple(teacher.conditioner.classes):
            return found
    return None


def usual(row: Row) -> Row | None:
    """A teacher at its own usual guidance scale and without guides; None where a run guides it no more than that."""
    teacher, sampling = row
    own = teacher.sampler.guidance_scale
    if not teacher.guides and sampling.guidance_scale <= own:
        return None
    alone = replace(teacher, conditioner=teacher.conditioner.guided(()))
    return alone, sampling.model_copy(update={"guidance_scale": own})


class Plan(NamedTuple):
    """When a run looks, and what it costs."""

    pictures: int
    """Pictures in a look."""
    every: int
    """Steps between looks; 0: none by themselves."""
    share: float
    """Network evaluations of the looks and of the teacher's pictures, as a share of the run's."""

    def __str__(self) -> str:
        if not self.every:
            return f"none: to look at {self.pictures} pictures would be more than {SHARE:.0%} of so short a run; health_every=N asks for it"
        return f"{self.pictures} pictures every {self.every} steps beside the teacher's: {self.share:.2%} of the network evaluations"


def scheduled(objective: Objective) -> Plan | None:
    """When a run looks: as `health_every` says, by default `LOOKS` times, or as often as `SHARE` of its evaluations allows.

    None for a run without a teacher's pictures, and for one that is told not to look. Raises UsageError where it is told to in vain.
    """
    config: Any = objective.config
    if not isinstance(config, StudentConfig) or config.health_every == 0:
        return None
    row = objective.reference()
    if row is None or not row[0].codec.kind.drawn:
        if given := config.changed("health_every", "best_by"):
            raise UsageError(f"{given[0]} {getattr(config, given[0])}: no teacher's pictures to look at", "leave it out")
        return None
    if config.best_by == "frechet" and judge_of(row[0]) is None:
        raise UsageError(f"best_by frechet: no built-in classifier fits pictures of {row[0].lineage.name}", "best_by=drift")
    made, phases = result(objective), objective.phases
    ends = [*accumulate(phase.steps for phase in phases)]
    whole = sum(phase.steps * objective.usual(end - phase.steps).evaluations() for phase, end in zip(phases, ends, strict=True))
    count = 96 if made.pixels < LARGE else 16
    rows = [row, *filter(None, [usual(row)])]
    once, look = count * sum(sampling.evaluations for _, sampling in rows), count * made.sampling.evaluations
    every = config.health_every
    if every is None:
        most = min(LOOKS, int((SHARE * whole - once) // look) - len(phases) - 1)  # those before the first step, at ends of phases
        every = math.ceil(ends[-1] / most / config.log_every) * config.log_every if most >= FEWEST else 0
    looks = {0, *ends, *range(every, ends[-1] + 1, every)} if every else ()
    return Plan(count, every, (once + look * len(looks)) / whole if every else 0.0)


class Pictures:
    """The looks of a run. `history` has a line for each: step, ratios to the teacher's measures, drift, Fréchet distance, accuracy."""

    def __init__(self, objective: Objective, where: torch.device) -> None:
        self.objective, self.where = objective, where
        self.history: list[dict[str, float]] = []
        self.wanted: dict[str, float] = {}
        """The teacher's measures, once its pictures are there."""
        self.guided: dict[str, float] = {}
        """Measures of the teacher as the run guides it, over those as it is usually guided; the first look has them."""
        self.shown: set[str] = set()
        """Names of the warnings of the newest line."""
        self.plan = scheduled(objective)

    def due(self, step: int) -> bool:
        """Whether a run looks after `step` steps: before the first one too, so that what follows has a beginning."""
        config: Any = self.objective.config
        if self.plan is None or not (self.plan.every or config.best_by != "loss"):
            return False
        ends = step in accumulate((phase.steps for phase in self.objective.phases), initial=0)
        return ends or bool(self.plan.every and step % self.plan.every == 0) or (config.best_by != "loss" and step % config.save_every == 0)

    def look(self, made: Model, step: int, folder: Path) -> None:
        """Measure the pictures of the student after `step` steps; on process 0. The teacher's are made, or read, before the first look."""
        if not self.wanted:
            self._begin(made, folder)
        x = from_uint8(self._pictures(made, made.sampling).numpy())
        found = measures(x, self.labels)
        ratios = {name: found[name] / value for name, value in self.wanted.items()}
        begun = {} if self.history else {f"{signs.GUIDED}{name}": value for name, value in self.guided.items()}
        self.history.append({"step": step, **ratios, "drift": drift(ratios), **self._judged(x), **begun})

    def _begin(self, made: Model, folder: Path) -> None:
        """Read the teacher's pictures from a run's folder, or make and store them there, and measure them."""
        assert self.plan is not None
        row = self.objective.reference()
        assert row is not None
        teacher, sampling = row
        labels = made.conditioner.spread(max(1, self.plan.pictures // ALIKE)).unique()
        self.labels = labels[torch.arange(self.plan.pictures) % len(labels)]
        rows = {"pictures": row} | ({"usual": held} if (held := usual(row)) else {})
        settings = [self.objective.identity, self.objective.config.seed, self.labels.tolist(), sampling.model_dump(), teacher.shape]
        key = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()
        path, found = folder / FILE, None
        if path.exists():
            try:
                metadata, _ = shards.check(path, "")
                found = load_file(path) if metadata.get("of") == key else None
                said = "of other settings"
            except DistillError as error:
                said = error.message.removeprefix(f"{path}: ")
            if found is None:
                say(f"{path}: {said}: the teacher's pictures are made again")
        if found is None:
            found = {name: self._pictures(model.to(self.where), asked) for name, (model, asked) in rows.items()}
            shards.write(path, found, {"of": key})
        x = from_uint8(found["pictures"].numpy())
        self.judge, self.features = judge_of(teacher), None
        self.wanted = {name: value for name, value in measures(x, self.labels).items() if value > DARK}
        if "usual" in found:
            before = measures(from_uint8(found["usual"].numpy()), self.labels)
            self.guided = {name: value / before[name] for name, value in self.wanted.items() if before[name] > DARK}
        self.features = None if self.judge is None else self.judge.measure(x)[0]

    def _judged(self, x: Tensor) -> dict[str, float]:
        """What the classifier says of pictures (N, 3, H, W); {} without one."""
        if self.judge is None or self.features is None:
            return {}
        frechet: Callable[[Tensor, Tensor], float] = load("evaluate.distances:frechet")
        features, predicted = self.judge.measure(x)
        return {"frechet": frechet(features, self.features), "accuracy": (predicted == self.labels).double().mean().item()}

    def _pictures(self, model: Model, sampling: Sampling) -> Tensor:
        """(N, H, W, 3) uint8, rounded as in files, so that those that were stored are the same. What is no number is grey."""
        config, size, out = self.objective.config, 32 if model.pixels < LARGE else 4, []
        for first in range(0, len(self.labels), size):
            labels = self.labels[first : first + size]
            with autocast(self.where, config.precision if model.codec.factor > 1 else "no"):
                images = model.sample(Draws(config.seed, range(FIRST + first, FIRST + first + len(labels))), labels, sampling)
            out.append(torch.from_numpy(to_uint8(images.nan_to_num(0.0))))
        return torch.cat(out)

    def at(self, step: int) -> dict[str, float]:
        """The look after `step` steps; {} if there was none."""
        newest = self.history[-1] if self.history else {}
        return newest if newest.get("step") == step else {}

    def numbers(self, step: int) -> dict[str, float]:
        """The look after `step` steps, as it stands in metrics.jsonl."""
        return {f"health_{name}": value for name, value in self.at(step).items() if name != "step"}

    def warn(self, means: Mapping[str, float], step: int, steps: int) -> dict[str, list[str]]:
        """The warnings of a line of metrics.jsonl, as they stand there; prints those that the line before does not have."""
        first, length = span_at(self.objective.phases, step - 1)
        looks = [look for look in self.history if look["step"] > first or not first]  # at its first step the phase before is seen
        remedies = self.objective.remedies(means)
        guided = signs.guided(self.history[0]) if self.history else ""
        found = [guided, *signs.shown(looks, (step - first) / length, remedies), self.objective.advice(means, step / steps)]
        named = {text.partition(":")[0]: text for text in found if text}
        for name, text in named.items():
            if name not in self.shown:
                say(f"warning: step {step}: {text}")
        self.shown = set(named)
        return {"warnings": list(named.values())} if named else {}

    def score(self, step: int, loss: float | None) -> float | None:
        """The number by which the checkpoint of `step` is ranked, lower is better; None where it is not known."""
        by = best_by(self.objective.config)
        return loss if by == "loss" else self.at(step).get(by)

    def choose(self, checkpoints: Path, step: int, average: nn.Module) -> int:
        """The step that becomes the result, with whose average `average` is filled; says which, if it is not always the last."""
        config = self.objective.config
        if getattr(config, "result", "last") == "last":
            return step
        first, _ = span_at(self.objective.phases, step - 1)
        found, score = checkpoint.best(checkpoints, first)
        checkpoint.fill(checkpoints, found, "average", average)
        say(f"result: step {found} of {step}, with the lowest {best_by(config)} of the checkpoints, {score:.4g}")
        return found

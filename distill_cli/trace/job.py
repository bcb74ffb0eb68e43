"""The files of `distill trace`. A second call makes only what is missing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill_cli import launch
from distill_cli.config import BUILTIN_SETS, TraceConfig
from distill_cli.data import Images, open_images
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.files import remove_temporaries, write_atomic
from distill_cli.methods.registry import load as named
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampling
from distill_cli.models.sources.catalog import MADE
from distill_cli.processes import say
from distill_cli.runs import settle
from distill_cli.trace import record
from distill_cli.trace.record import Walk

SETTINGS = "trace.json"
LEAST = 10
"""Least steps of the forward process, which has as many as the model of most steps."""
COLUMNS, FRAMES = 10, 40
"""Most states of a process in a row, and in an animation, where `every` is not given."""
HELD = 1500
"""Milliseconds for which an animation shows the last state of a process."""


@dataclass
class Traced:
    """A model, and how it is sampled."""

    spec: str
    model: Model
    sampling: Sampling

    @property
    def cost(self) -> str:
        """How a sample is made, and what it costs."""
        calls = self.sampling.evaluations
        return f"{self.sampling.solver}, {calls} network evaluation{'s' * (calls > 1)}"

    @property
    def title(self) -> str:
        """Its name, and what a sample costs."""
        return f"{self.spec}: {self.cost}"

    def walk(self, config: TraceConfig, indices: Sequence[int]) -> Walk:
        """The samples `indices` of the job, the same as `distill sample` makes of the same seed."""
        batches = [indices[first : first + config.batch_size] for first in range(0, len(indices), config.batch_size)]
        with launch.autocast(launch.device(config.device), config.precision):
            walks = [
                record.backward(self.model, Draws(config.seed, batch), labels_of(self.model, batch, config.classes), self.sampling)
                for batch in batches
            ]
        return Walk.cat(walks)


def labels_of(model: Model, indices: Sequence[int], classes: list[int] | None) -> Tensor:
    """(B,) labels of the samples `indices` of a job."""
    return torch.cat([model.conditioner.labels(1, classes, start=index) for index in indices])


class Trace(ABC):
    """The files that show the process of one kind of data."""

    parts: ClassVar[tuple[str, ...]]
    """What can be shown; the forward process needs data."""
    usual: ClassVar[int]
    """The number of noises for which nobody has asked."""

    def __init__(self, config: TraceConfig, traced: list[Traced], images: Images | None) -> None:
        self.config, self.traced, self.images = config, traced, images
        self.first = traced[0].model
        self.first.conditioner.labels(1, config.classes)  # which refuses classes that there are not
        self.steps = max(each.sampling.steps for each in traced)
        self.show: list[str] = [*dict.fromkeys(config.show or ())]
        self.show = self.show or [part for part in self.parts if images is not None or part != "forward"]
        kind = self.first.codec.kind
        for part in self.show:
            if part not in self.parts:
                raise UsageError(f"--show {part}: not for {kind.name}", f"of {kind.name}: {', '.join(self.parts)}")
        if "forward" in self.show and images is None:
            raise UsageError("--show forward: noise is added to real data, and there are none", "--data SET or FOLDER")
        if config.every is not None and config.every > self.steps:
            raise UsageError(f"--every {config.every}: the models take {self.steps} steps at most", f"--every {self.steps} or less")

    @abstractmethod
    def files(self) -> list[str]:
        """The names of all files."""

    @abstractmethod
    def made(self, missing: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """The content of these files, by name."""

    def every(self, count: int, most: int) -> list[int]:
        """Which of `count` states are shown, by default at most so many."""
        return record.kept(count, self.config.every or record.usual(count, most))

    def durations(self, forward: int, count: int) -> list[int]:
        """Milliseconds of `count` frames, of which the first `forward` show the forward process; the last of both processes are held."""
        return [HELD if k in (forward - 1, count - 1) else 1000 // self.config.fps for k in range(count)]

    def asked(self, index: int) -> str:
        """What a sample was asked to be, as an end of a title: its class or prompt; '' without."""
        named = self.first.conditioner.named(int(labels_of(self.first, [index], self.config.classes)))
        return "".join(f", {key} {named[key]}" for key in ("class", "prompt") if key in named)

    def past(self, indices: Sequence[int]) -> Walk:
        """The forward process of the pictures or points `indices` of the set, by the first model's schedule.

        The noise is that of the samples of the same indices. Times are spaced as in training.
        """
        assert self.images is not None
        draws, schedule, codec = Draws(self.config.seed, indices), self.first.denoiser.schedule, self.first.codec
        x, _ = self.images.batch([index % len(self.images) for index in indices], draws)
        with torch.no_grad():
            x0 = codec.encode(x)[0].float().cpu()
        times = schedule.at(torch.linspace(0, 1, max(LEAST, self.steps), dtype=torch.float64))
        return record.forward(schedule, x0, draws.normal("prior", self.first.shape), times)


def of_teachers(config: TraceConfig, models: dict[str, Model]) -> set[str]:
    """The options that only teachers among `models` take, where there are both; students keep their own way of sampling, which is said."""
    given = {key for key in ("solver", "steps", "guidance_scale") if getattr(config, key) is not None}
    students = [spec for spec, model in models.items() if not model.sampler.teaches]
    if not given or len(students) in (0, len(models)):
        return set()
    say(f"{', '.join(students)}: sampled in its own way; --{', --'.join(sorted(given)).replace('_', '-')} is for the teachers")
    return given


def check(models: dict[str, Model]) -> None:
    """Raise UsageError for models that have not been trained, or whose samples cannot begin with the same noise."""
    for spec, model in models.items():
        if model.lineage.kind == "teacher" and model.lineage.name in MADE:
            raise UsageError(f"--model {spec}: has not been trained: its weights are random", "distill models ls names models that have")
    (first, own), *others = models.items()
    for spec, model in others:
        if model.codec.kind is not own.codec.kind:
            raise UsageError(f"--model {spec}: makes {model.codec.kind.name}, {first} makes {own.codec.kind.name}", "trace them apart")
        if model.shape != own.shape:
            raise UsageError(f"--model {spec}: noise of {model.shape}, that of {first} is {own.shape}", "trace them apart")


def sampled(config: TraceConfig, models: dict[str, Model], steps: dict[str, int | None]) -> list[Traced]:
    """The models with their sampling. Raises UsageError if one cannot be sampled as asked. `steps`: what follows @ in a name."""
    check(models)
    apart = of_teachers(config, models)
    out = []
    for spec, model in models.items():
        own = config.model_copy(update=dict.fromkeys(() if model.sampler.teaches else apart))
        asked = model.with_defaults(own.solver, steps[spec] or own.steps, own.guidance_scale, own.guidance_calls)
        out.append(Traced(spec, model, asked))
    return out


def real(config: TraceConfig, model: Model) -> Images | None:
    """The set that --data names, in the model's size; None if none is named. Raises UsageError for another kind or size of data."""
    if config.data is None:
        return None
    kind = model.codec.kind
    images = open_images(config.data, None if config.data in BUILTIN_SETS or not kind.drawn else model.pixels)
    if images.kind is not kind:
        raise UsageError(f"--data {config.data}: {images.kind.name}, the model makes {kind.name}", "give a --data of its kind")
    channels, *sides = model.shape
    wanted = (3 if model.codec.parts() else channels, *(side * model.codec.factor for side in sides))
    if tuple(images.shape) != wanted:
        raise UsageError(f"--data {config.data}: {kind.name} of {images.shape}, the model's are {wanted}")
    return images


def kind_of(models: dict[str, Model]) -> type[Trace]:
    """What shows the models' kind of data."""
    kind: type[Trace] = named(next(iter(models.values())).codec.kind.trace)
    return kind


def usual_num(models: dict[str, Model]) -> int:
    """The number of noises for which nobody has asked: at most one for each prompt."""
    prompts = next(iter(models.values())).conditioner.prompts
    return min(kind_of(models).usual, len(prompts) or kind_of(models).usual)


def opened(config: TraceConfig, models: dict[str, Model], steps: dict[str, int | None]) -> Trace:
    """The trace of models. Raises UsageError for models, data or options that do not fit together."""
    traced = sampled(config, models, steps)
    return kind_of(models)(config, traced, real(config, traced[0].model))


def run(trace: Trace) -> dict[str, Any]:
    """Make the missing files, and return counts and each model's times."""
    config = trace.config
    assert config.out is not None
    settings = config.model_dump(mode="json", exclude={"out", "device", "model", "batch_size"})
    models = [
        {"model": each.spec, "hash": each.model.weights_hash(), **each.model.guidance(), **each.sampling.model_dump()}
        for each in trace.traced
    ]
    settle(config.out / SETTINGS, {**settings, "models": models, **trace.first.conditioner.digests()}, "a trace")
    remove_temporaries(config.out)
    for each in trace.traced:
        each.model.to(launch.device(config.device))
    names = trace.files()
    missing = [name for name in names if not (config.out / name).exists()]
    progress = launch.Progress(len(missing), "trace", "files")
    with launch.stoppable() as stop:
        for name, content in trace.made(missing) if missing else ():
            write_atomic(config.out / name, content)
            progress.add(1)
            if stop.requested and progress.done < len(missing):
                raise stop.interrupted(stop.requested, f"stopped after {name}", "the same command makes what is missing")
    progress.close()
    return {"folder": str(config.out), "made": len(missing), "kept": len(names) - len(missing), "files": names}

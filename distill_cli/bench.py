"""What distill adds to the bare network calls: both are timed in turn in one process, and the ratio is the result.

The bare calls are those of diffusers' network alone, on ready tensors, with the same arithmetic and the same optimizer
steps. Ours is everything that the command does for them: noise by index, pairs from disk, scalings, losses, clipping,
averages, metrics and their file, checks for what is no number, images' files. Checkpoints and sample grids, which a run
writes now and then, are not in it, nor LPIPS' network on the bare side. Memory is measured before the bare networks are made.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill_cli import launch
from distill_cli.config import (
    PROMPT_SETS,
    CMConfig,
    Config,
    DMDConfig,
    GenerateConfig,
    PairsConfig,
    SampleConfig,
    TrainConfig,
    TrainingConfig,
)
from distill_cli.data import open_images
from distill_cli.errors import UsageError
from distill_cli.methods.cm.objective import Consistency, images_of
from distill_cli.methods.dmd.objective import DMD
from distill_cli.methods.train.denoising import Denoising
from distill_cli.methods.train.text_to_image import TextToImage
from distill_cli.models import formats, load, schedulers
from distill_cli.models.model import Model
from distill_cli.pairs.generate import generate
from distill_cli.pairs.store import PairStore
from distill_cli.runs import Run, versions
from distill_cli.sample import batch
from distill_cli.training.engine import Engine
from distill_cli.training.optimizer import make_optimizer

BATCHES = 3
WARM_UP = 2
GPU_CALLS = 5
"""Calls timed together on a GPU, which works ahead of what waits for it."""


@dataclass
class Case:
    """Two ways to the same network calls; `images` is how many either makes or sees. `bare` makes the second when it is time."""

    ours: Callable[[], Any]
    bare: Callable[[], Callable[[], Any]]
    images: int
    calls: str
    where: torch.device


class Raw:
    """Bare calls of a copy of a model's network on tensors that are ready."""

    def __init__(self, model: Model, size: int, where: torch.device, precision: str, trained: TrainingConfig | None = None) -> None:
        self.autocast = partial(launch.autocast, where, precision)
        self.network: Any = model.copy().net.to(where).eval().requires_grad_(trained is not None)
        self.x = torch.randn(size, *model.shape, device=where)
        self.t = torch.full((size,), 500.0, device=where)
        self.condition = model.conditioner.example(size, where)
        if trained is not None:
            self.optimizer = make_optimizer(trained, self.network, 1e-5)

    def call(self, grad: bool = False) -> Any:
        with torch.set_grad_enabled(grad), self.autocast():
            return self.network(self.x, self.t, **self.condition.parts, return_dict=False)[0]

    def step(self) -> None:
        self.call(grad=True).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _engine(config: TrainingConfig, objective: Any, folder: Path) -> Engine:
    if config.accumulate > 1:
        raise UsageError("bench: accumulate is 1 here", "leave it out")
    engine = Engine(config, objective)
    engine.open(Run.create(folder / "run", "", "bench"))
    return engine


def prompted(model: Model) -> Model:
    """A model with text with some prompts: what they say costs nothing."""
    given = model.conditioner.chosen(PROMPT_SETS[0], "")
    return model.with_prompts(given) if given else model


def _bench_training(engine: Engine, model: Model, forwards: int, steps: Sequence[int]) -> Case:
    """Bare calls of networks like `model`'s: `forwards` of a batch, and `steps` of training on so many images each."""
    config, where = engine.config, engine.accelerator.device
    size = config.batch_size

    def bare() -> Callable[[], None]:
        answering = Raw(model, size, where, config.precision)
        trained = [Raw(model, count, where, config.precision, config) for count in dict.fromkeys(steps)]
        order = [next(raw for raw in trained if len(raw.x) == count) for count in steps]

        def calls() -> None:
            for _ in range(forwards):
                answering.call()
            for raw in order:
                raw.step()

        return calls

    return Case(engine.advance, bare, size, f"{forwards} forwards, {len(steps)} x (forward, backward, optimizer)", where)


def bench_train(config: TrainConfig, folder: Path) -> Case:
    images = open_images(config.data, config.resolution, config.flip)
    objective = Denoising(config, images) if config.vae is None else TextToImage(config, images)
    return _bench_training(_engine(config, objective, folder), objective.teacher, 0, [config.batch_size])


def bench_dmd(config: DMDConfig, folder: Path) -> Case:
    teacher = prompted(load(config.teacher))
    pairs = config.pairs
    if pairs is None and config.regression_weight != 0:  # any pairs will do
        pairs = folder / "pairs"
        options = config.model_dump(include={"teacher", "classes", "device", "precision", "batch_size"})
        generate(
            PairsConfig(num=4 * config.batch_size, steps=1, solver="ddim", **options),
            teacher,
            pairs,
        )
    objective = DMD(config, teacher, PairStore(pairs) if pairs else None)
    size, matching, fake = config.batch_size, bool(config.matching_weight), "fake" in objective.networks
    guided = objective.sampling.guidance_scale != 1
    forwards = (1 + guided) * matching + fake  # the teacher, guided or not, and the fake score
    student = size * (matching + bool(objective.regression_weight))  # on noise and on pairs
    return _bench_training(_engine(config, objective, folder), teacher, forwards, [student, *[size] * (config.fake_steps * fake)])


def bench_cm(config: CMConfig, folder: Path) -> Case:
    teacher = load(config.teacher) if config.teacher else None
    images = open_images(images_of(config, teacher), config.resolution, config.flip)
    objective = Consistency(config, teacher, images)
    forwards = 1  # the target; the teacher below
    if config.method == "cd":
        forwards += config.teacher_steps * (2 if config.solver == "heun" else 1) * (2 if objective.sampling.guidance_scale != 1 else 1)
    return _bench_training(_engine(config, objective, folder), objective.start, forwards, [config.batch_size])


def _bench_generation(config: GenerateConfig, model: Model, make: Callable[[int], Any]) -> Case:
    """`make(k)` makes BATCHES batches into the k-th folder."""
    where = launch.device(config.device)
    sampling = model.with_defaults(config.solver, config.steps, config.guidance_scale, config.guidance_calls)
    calls = sampling.evaluations
    turn = iter(range(10**9))

    def bare() -> Callable[[], None]:
        raw = Raw(model, config.batch_size, where, config.precision)

        def forwards() -> None:
            for _ in range(BATCHES * calls):
                raw.call()

        return forwards

    return Case(lambda: make(next(turn)), bare, config.num, f"{calls} forwards a batch of {config.batch_size}", where)


def _bench_pipeline(config: SampleConfig, model: Model, folder: Path) -> Case:
    """Against diffusers' StableDiffusionPipeline at the same prompts, steps, batch and precision, its pictures written as PNG files."""
    import diffusers

    where = launch.device(config.device)
    sampling = model.with_defaults(config.solver, config.steps, config.guidance_scale, config.guidance_calls)
    turn = iter(range(10**9))
    prompts = model.conditioner.captions(model.conditioner.labels(config.num).tolist()) or []

    def bare() -> Callable[[], None]:
        formats.save(model, folder / "pipeline")
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder / "pipeline").to(where)
        if model.sampler.teaches:
            pipeline.scheduler = schedulers.make(model.scheduler or {}, schedulers.SOLVERS[sampling.solver])
        pipeline.set_progress_bar_config(disable=True)

        def calls() -> None:
            for first in range(0, config.num, config.batch_size):
                part = prompts[first : first + config.batch_size]
                x = torch.randn(len(part), *model.shape).to(where)
                with launch.autocast(where, config.precision):
                    made = pipeline(part, latents=x, num_inference_steps=sampling.steps, guidance_scale=sampling.guidance_scale)
                for k, picture in enumerate(made.images):
                    picture.save(folder / "pipeline" / f"{first + k:06d}.png")

        return calls

    how = f"{sampling.solver} {sampling.steps}, guidance {sampling.guidance_scale:g}, batch {config.batch_size}"
    text = f"diffusers' StableDiffusionPipeline, {how}"
    return Case(lambda: batch.sample(config, model, folder / str(next(turn))), bare, config.num, text, where)


def bench_pairs(config: PairsConfig, folder: Path) -> Case:
    size = config.batch_size
    config = config.model_copy(update={"num": BATCHES * size, "shard_size": size})
    model = prompted(load(config.teacher))
    return _bench_generation(config, model, lambda k: generate(config, model, folder / str(k)))


def bench_sample(config: SampleConfig, folder: Path) -> Case:
    config = config.model_copy(update={"num": BATCHES * config.batch_size})
    model = prompted(load(config.model))
    if model.conditioner.prompts:
        return _bench_pipeline(config, model, folder)
    if config.times is not None:
        model = model.with_times(config.times, config.steps)
    return _bench_generation(config, model, lambda k: batch.sample(config, model, folder / str(k)))


CASES: dict[str, Callable[..., Case]] = {
    "train": bench_train,
    "dmd": bench_dmd,
    "cm": bench_cm,
    "pairs": bench_pairs,
    "sample": bench_sample,
}


def _timed(work: Callable[[], Any], where: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    calls = GPU_CALLS if where.type == "cuda" else 1
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return (time.perf_counter() - start) / calls


def peak_memory(where: torch.device) -> float:
    """Megabytes: of the GPU's memory, or of the process's."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def machine(where: torch.device) -> str:
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {torch.get_num_threads()} threads"


def bench(command: str, config: Config, repeats: int, folder: Path) -> dict[str, Any]:
    """Time `command` against its bare calls, in turn, `repeats` times; medians of both, and of the ratio turn by turn."""
    case = CASES[command](config, folder)
    for _ in range(WARM_UP):
        case.ours()
    memory = peak_memory(case.where)
    bare = case.bare()
    for _ in range(WARM_UP):
        bare()
    ours: list[float] = []
    raw: list[float] = []
    for turn in range(repeats):
        for kind, work in ((ours, case.ours), (raw, bare)) if turn % 2 else ((raw, bare), (ours, case.ours)):
            kind.append(_timed(work, case.where))
    return {
        "bench": command,
        "ratio": round(statistics.median(a / b for a, b in zip(ours, raw, strict=True)), 3),
        "ours_seconds": round(statistics.median(ours), 4),
        "raw_seconds": round(statistics.median(raw), 4),
        "images_per_second": round(case.images / statistics.median(ours), 2),
        "peak_memory_mb": round(memory),
        "raw_calls": case.calls,
        "repeats": repeats,
        "machine": machine(case.where),
        "versions": {name: version for name, version in versions().items() if name in ("python", "torch", "diffusers", "accelerate")},
    }

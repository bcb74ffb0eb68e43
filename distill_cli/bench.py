"""What distill adds to the bare network calls: both are timed in turn in one process, and the ratio is the result.

The bare calls are those of diffusers' network alone, on ready tensors, with the same arithmetic and the same optimizer
steps. Ours is everything that the command does for them: noise by index, pairs from disk, scalings, losses, clipping,
averages, metrics, files. Checkpoints and sample grids, which a run writes now and then, are not in it.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill_cli import launch
from distill_cli.config import CMConfig, Config, DMDConfig, GenerateConfig, PairsConfig, SampleConfig, TrainConfig, TrainingConfig
from distill_cli.data import open_images
from distill_cli.distill.consistency import Consistency
from distill_cli.distill.denoising import Denoising
from distill_cli.distill.dmd import DMD
from distill_cli.distill.engine import Engine, make_optimizer
from distill_cli.models import load
from distill_cli.models.model import Model, network_evaluations
from distill_cli.pairs.generate import generate
from distill_cli.pairs.store import PairStore
from distill_cli.runs import Run, versions
from distill_cli.sample import batch

BATCHES = 3
WARM_UP = 2


@dataclass
class Case:
    """Two ways to the same network calls; `images` is how many either makes or sees."""

    ours: Callable[[], Any]
    raw: Callable[[], Any]
    images: int
    calls: str
    where: torch.device


class Raw:
    """Bare calls of a copy of a model's network on tensors that are ready."""

    def __init__(self, model: Model, size: int, where: torch.device, trained: TrainingConfig | None = None) -> None:
        self.network: Any = model.copy().unet.to(where).eval().requires_grad_(trained is not None)
        self.x = torch.randn(size, *model.shape, device=where)
        self.t = torch.full((size,), 500.0, device=where)
        self.labels = torch.zeros(size, dtype=torch.long, device=where) if model.conditioner.classes else None
        if trained is not None:
            self.optimizer = make_optimizer(trained, self.network, 1e-5)

    def call(self, grad: bool = False) -> Any:
        with torch.set_grad_enabled(grad):
            return self.network(self.x, self.t, class_labels=self.labels, return_dict=False)[0]

    def step(self) -> None:
        self.call(grad=True).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _engine(config: TrainingConfig, objective: Any, folder: Path) -> Engine:
    engine = Engine(config, objective)
    engine.open(Run.create(folder / "run", "", "bench"))
    return engine


def bench_train(config: TrainConfig, folder: Path) -> Case:
    objective = Denoising(config, open_images(config.data, config.resolution, config.flip))
    engine = _engine(config, objective, folder)
    where = engine.accelerator.device
    raw = Raw(objective.teacher, config.batch_size, where, config)

    def bare() -> None:
        with engine.accelerator.autocast():
            raw.step()

    return Case(engine.train_step, bare, config.batch_size, "forward and backward, optimizer", where)


def bench_dmd(config: DMDConfig, folder: Path) -> Case:
    teacher = load(config.teacher)
    pairs = config.pairs
    if pairs is None and config.regression_weight != 0:  # any pairs will do
        pairs = folder / "pairs"
        options = config.model_dump(include={"teacher", "classes", "device", "precision"})
        generate(PairsConfig(num=4 * config.batch_size, solver="euler", steps=1, **options), teacher, pairs)
    objective = DMD(config, teacher, PairStore(pairs) if pairs else None)
    engine = _engine(config, objective, folder)
    where = engine.accelerator.device
    size = config.batch_size
    steps = [Raw(teacher, size * (2 if objective.regression_weight else 1), where, config)]
    forwards = [Raw(teacher, size, where)] * ((2 if objective.sampling.guidance_scale != 1 else 1) if config.matching_weight else 0)
    if "fake" in objective.networks:
        fake = Raw(teacher, size, where, config)
        forwards, steps = [*forwards, fake], [*steps, *[fake] * config.fake_steps]

    def bare() -> None:
        with engine.accelerator.autocast():
            for raw in forwards:
                raw.call()
            for raw in steps:
                raw.step()

    return Case(engine.train_step, bare, size, f"{len(forwards)} forwards, {len(steps)} x (forward and backward, optimizer)", where)


def bench_cm(config: CMConfig, folder: Path) -> Case:
    teacher = load(config.teacher) if config.teacher else None
    images = open_images(config.data or config.teacher or "digits", config.resolution, config.flip)
    objective = Consistency(config, teacher, images)
    engine = _engine(config, objective, folder)
    where, size = engine.accelerator.device, config.batch_size
    guided = config.method == "cd" and objective.sampling.guidance_scale != 1
    forwards = 1 + (0 if config.method != "cd" else (2 if config.solver == "heun" else 1) * (1 + guided))  # the target, and the teacher
    answering, student = Raw(objective.start, size, where), Raw(objective.start, size, where, config)

    def bare() -> None:
        with engine.accelerator.autocast():
            for _ in range(forwards):
                answering.call()
            student.step()

    return Case(engine.train_step, bare, size, f"{forwards} forwards, forward and backward, optimizer", where)


def _bench_generation(config: GenerateConfig, name: str, make: Callable[[Model, int], Any]) -> Case:
    """`make(model, k)` makes BATCHES batches into the k-th folder."""
    model, where = load(name), launch.device(config.device)
    sampling = model.with_defaults(config.solver, config.steps, config.guidance_scale)
    raw = Raw(model, config.batch_size, where)
    calls = network_evaluations(sampling)
    turn = iter(range(10**9))

    def bare() -> None:
        with launch.autocast(where, config.precision):
            for _ in range(BATCHES * calls):
                raw.call()

    return Case(lambda: make(model, next(turn)), bare, config.num, f"{calls} forwards a batch of {config.batch_size}", where)


def bench_pairs(config: PairsConfig, folder: Path) -> Case:
    config = config.model_copy(update={"num": BATCHES * config.batch_size})
    return _bench_generation(config, config.teacher, lambda model, k: generate(config, model, folder / str(k)))


def bench_sample(config: SampleConfig, folder: Path) -> Case:
    config = config.model_copy(update={"num": BATCHES * config.batch_size})
    return _bench_generation(config, config.model, lambda model, k: batch.sample(config, model, folder / str(k)))


CASES: dict[str, Callable[..., Case]] = {
    "train": bench_train,
    "dmd": bench_dmd,
    "cm": bench_cm,
    "pairs": bench_pairs,
    "sample": bench_sample,
}


def _timed(work: Callable[[], Any], where: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    start = time.perf_counter()
    work()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - start


def peak_memory(where: torch.device) -> float:
    """Megabytes: of the GPU's memory, or of the process's (which holds the bare networks too)."""
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
        case.raw()
    ours: list[float] = []
    raw: list[float] = []
    for turn in range(repeats):
        for kind, work in ((ours, case.ours), (raw, case.raw)) if turn % 2 else ((raw, case.raw), (ours, case.ours)):
            kind.append(_timed(work, case.where))
    return {
        "bench": command,
        "ratio": round(statistics.median(a / b for a, b in zip(ours, raw, strict=True)), 3),
        "ours_seconds": round(statistics.median(ours), 4),
        "raw_seconds": round(statistics.median(raw), 4),
        "images_per_second": round(case.images / statistics.median(ours), 2),
        "peak_memory_mb": round(peak_memory(case.where)),
        "raw_calls": case.calls,
        "repeats": repeats,
        "machine": machine(case.where),
        "versions": {name: version for name, version in versions().items() if name in ("python", "torch", "diffusers", "accelerate")},
    }

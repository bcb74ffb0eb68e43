"""The timed cases: each command against the bare calls of its networks.

The bare side calls diffusers' network on ready tensors, in the same precision, with the same optimizer steps. Our side is the whole
command: noise by index, pairs from disk, scalings, losses, clipping, averages, metrics and their file, checks for finite values, files
of images. Not included are checkpoints and sample grids, and on the bare side LPIPS' network. Memory is measured before the bare
networks are made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from distill_cli import launch
from distill_cli.bench.measure import Case
from distill_cli.commands import TRAINING, method_of
from distill_cli.config import PROMPT_SETS, GenerateConfig, PairsConfig, SampleConfig, TrainingConfig
from distill_cli.errors import UsageError
from distill_cli.methods.registry import load as opener
from distill_cli.models import formats, load, schedulers
from distill_cli.models.model import Model
from distill_cli.pairs.generate import generate
from distill_cli.runs import Run
from distill_cli.sample import batch
from distill_cli.training.engine import Engine
from distill_cli.training.job import Job
from distill_cli.training.objective import Objective
from distill_cli.training.optimizer import make_optimizer

BATCHES = 3


class Raw:
    """Bare calls of a copy of a model's network, on ready tensors."""

    def __init__(self, model: Model, size: int, where: torch.device, precision: str, trained: TrainingConfig | None = None) -> None:
        self.autocast = partial(launch.autocast, where, precision)
        self.network: Any = model.copy().backbone.to(where).eval().requires_grad_(trained is not None)
        self.x = torch.randn(size, *model.shape, device=where)
        self.t = torch.full((size,), 500.0, device=where)
        self.condition = model.example(size, where)
        if trained is not None:
            self.optimizer = make_optimizer(trained, self.network.parameters(), 1e-5)

    def call(self, grad: bool = False) -> Any:
        with torch.set_grad_enabled(grad), self.autocast():
            return self.network(self.x, self.t, self.condition)

    def step(self) -> None:
        self.call(grad=True).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def prompted(model: Model) -> Model:
    """A text-to-image model with some prompts (their content does not change the cost); other models unchanged."""
    given = model.conditioner.chosen(PROMPT_SETS[0], "")
    return model.with_prompts(given) if given else model


def training(command: str, config: TrainingConfig, folder: Path) -> Case:
    """Training steps of a method, against the calls that its objective lists."""
    if config.accumulate > 1:
        raise UsageError("bench: accumulate is 1 here", "leave it out")
    objective: Objective = opener(f"methods.{method_of(config).objective}")(with_pairs(config, folder), Job(command))
    engine = Engine(objective.config, objective)
    engine.open(Run.create(folder / "run", "", "bench"))
    model = objective.model(engine.plain[engine.main], 0)
    if not isinstance(model, Model):
        raise UsageError(f"bench {command}: it trains no denoiser")
    asked, where = objective.calls(), engine.accelerator.device

    def bare() -> Callable[[], None]:
        sizes = {call.images for call in asked.forwards}
        answering = {size: Raw(model, size, where, config.precision) for size in sizes}
        trained = {call.images: Raw(model, call.images, where, config.precision, config) for call in asked.trainings}

        def calls() -> None:
            for call in asked.forwards:
                answering[call.images].call()
            for call in asked.trainings:
                trained[call.images].step()

        return calls

    text = f"{len(asked.forwards)} forwards, {len(asked.trainings)} x (forward, backward, optimizer)"
    return Case(engine.advance, bare, config.batch_size, text, where)


def with_pairs(config: TrainingConfig, folder: Path) -> TrainingConfig:
    """The config, with newly made pairs if its regression lacks them."""
    if getattr(config, "pairs", "") is not None or getattr(config, "regression_weight", None) == 0:
        return config
    options = config.model_dump(include={"teacher", "classes", "device", "precision", "batch_size"})
    teacher = prompted(load(options["teacher"]))
    generate(PairsConfig(num=4 * config.batch_size, steps=1, solver="ddim", **options), teacher, folder / "pairs")
    return config.model_copy(update={"pairs": folder / "pairs"})


def _bench_generation(config: GenerateConfig, model: Model, make: Callable[[int], Any]) -> Case:
    """`make(k)` makes BATCHES batches into the k-th folder."""
    where = launch.device(config.device)
    sampling = model.with_defaults(config.solver, config.steps, config.guidance_scale, config.guidance_calls)
    calls = sampling.evaluations
    turn = count()

    def bare() -> Callable[[], None]:
        raw = Raw(model, config.batch_size, where, config.precision)

        def forwards() -> None:
            for _ in range(BATCHES * calls):
                raw.call()

        return forwards

    return Case(lambda: make(next(turn)), bare, config.num, f"{calls} forwards a batch of {config.batch_size}", where)


def _bench_pipeline(config: SampleConfig, model: Model, folder: Path) -> Case:
    """Sampling against diffusers' StableDiffusionPipeline: same prompts, steps, batch and precision, pictures written as PNG files."""
    import diffusers

    where = launch.device(config.device)
    sampling = model.with_defaults(config.solver, config.steps, config.guidance_scale, config.guidance_calls)
    turn = count()
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


CASES: dict[str, Callable[..., Case]] = {command: partial(training, command) for command in TRAINING}
CASES |= {"pairs": bench_pairs, "sample": bench_sample}

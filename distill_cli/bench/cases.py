"""The timed cases: each command against the bare calls of its networks.

The bare side calls diffusers' network on ready tensors, in the same precision and under the same options, with the same optimizer
steps. Our side is the whole command: noise by index, pairs from disk, scalings, losses, clipping, averages, metrics and their file,
checks for finite values, files of images. Not included are checkpoints and sample grids, and on the bare side LPIPS' network. Memory is
measured before the bare networks are made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch

from distill_cli import launch
from distill_cli.bench.measure import Case
from distill_cli.bench.stand_ins import StandIns, prompted
from distill_cli.commands import TRAINING, method_of
from distill_cli.config import PROMPT_SETS, BatchesConfig, PairsConfig, SampleConfig, TrainingConfig
from distill_cli.errors import UsageError
from distill_cli.methods.registry import load as opener
from distill_cli.models import compiled, cost, formats, schedulers
from distill_cli.models.model import LARGE, Model
from distill_cli.models.parts import read_json
from distill_cli.pairs.generate import generate
from distill_cli.processes import say
from distill_cli.runs import Run
from distill_cli.sample import batch
from distill_cli.training import plan
from distill_cli.training.engine import Engine
from distill_cli.training.memory import memory
from distill_cli.training.objective import Objective
from distill_cli.training.optimizer import make_optimizer
from distill_cli.training.placed import placed

GenerateT = TypeVar("GenerateT", bound=BatchesConfig)
BATCHES = 3


class Raw:
    """Bare calls of a copy of a model's network, on ready tensors; its matrices are `stored` in half precision, or cast in each call."""

    def __init__(
        self, model: Model, size: int, where: torch.device, config: Any, trained: bool = False, stored: torch.dtype | None = None
    ) -> None:
        self.autocast = partial(launch.autocast, where, config.precision)
        self.network = model.copy().backbone.to(where).eval().requires_grad_(trained)
        if stored is not None:
            self.network.cast(stored)
        if isinstance(config, TrainingConfig):
            placed(config, self.network, where, trained)
        else:
            compiled.lay_out(config, self.network)
            compiled.compile_network(self.network, config.compile, **compiled.graph(config.compile, where))
        self.x = torch.randn(size, *model.shape, device=where)
        self.t = torch.full((size,), 500.0, device=where)
        self.condition = model.example(size, where)
        if trained:
            self.optimizer = make_optimizer(config, self.network.parameters(), 1e-5)

    def call(self, grad: bool = False) -> Any:
        with torch.set_grad_enabled(grad), self.autocast():
            return self.network(self.x, self.t, self.condition)

    def through(self) -> None:
        """A call and the gradient of its input."""
        x = self.x.clone().requires_grad_(True)
        with self.autocast():
            self.network(x, self.t, self.condition).float().square().mean().backward()

    def step(self) -> None:
        self.call(grad=True).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def training(command: str, config: TrainingConfig, folder: Path, random: bool = False) -> Case:
    """Training steps of a method, against the calls that its objective lists."""
    if config.accumulate > 1:
        size = config.batch_size // config.accumulate
        say(f"bench: one of the {config.accumulate} parts of a batch, {size} images")
        config = config.model_copy(update={"batch_size": size, "accumulate": 1})
    job = StandIns(command, folder=folder, random=random)
    config = job.complete(config).model_copy(update={"out": folder / "run", "health_every": 0, "best_by": "loss"})  # no looks
    objective: Objective = opener(f"methods.{method_of(config).objective}")(config, job)
    objective.phases = [objective.phases[0]._replace(steps=10**6)]  # all that is timed is of its first phase
    job.say()
    planned = memory(objective).total
    engine = Engine(objective.config, objective)
    engine.open(Run.create(folder / "run", "", "bench"))
    model = objective.model(engine.plain[engine.main], 0)
    if not isinstance(model, Model):
        raise UsageError(f"bench {command}: it trains no denoiser")
    asked, where = [objective.calls(step) for step in range(objective.cycle)], engine.accelerator.device

    def stored(name: str) -> torch.dtype | None:
        """The type of a network's matrices, as our side has them."""
        return getattr(getattr(objective.frozen.get(name), "network", None), "weight_type", None)

    def bare() -> Callable[[], None]:
        kinds = {(call.images, stored(call.network)) for each in asked for call in (*each.forwards, *each.through)}
        answering = {kind: Raw(model, kind[0], where, config, stored=kind[1]) for kind in kinds}
        trained = {call.images: Raw(model, call.images, where, config, trained=True) for each in asked for call in each.trainings}

        def calls() -> None:
            for each in asked:
                for call in each.forwards:
                    answering[call.images, stored(call.network)].call()
                for call in each.through:
                    answering[call.images, stored(call.network)].through()
                for call in each.trainings:
                    trained[call.images].step()

        return calls

    def steps() -> None:
        for _ in asked:
            engine.advance()

    counts = [sum(len(part) for part in parts) for parts in zip(*((c.forwards, c.through, c.trainings) for c in asked), strict=True)]
    kinds = ("forwards", "x (forward, gradient of the input)", "x (forward, backward, optimizer)")
    text = ", ".join(f"{count} {kind}" for count, kind in zip(counts, kinds, strict=True) if count or kind == kinds[0])
    text += f" in {len(asked)} steps" if len(asked) > 1 else ""
    flop = sum(plan.flop(model, each.evaluations(), each.decoded) for each in asked)
    return Case(steps, bare, config.batch_size * len(asked), text, where, config.precision, flop, planned)


def _bench_generation(config: BatchesConfig, model: Model, make: Callable[[int], Any]) -> Case:
    """`make(k)` makes BATCHES batches into the k-th folder."""
    where = launch.device(config.device)
    sampling = model.with_defaults(config.solver, config.steps, config.guidance_scale, config.guidance_calls)
    calls = sampling.evaluations
    together = 2 if sampling.combines and sampling.guidance_calls == 1 else 1  # evaluations that guidance makes in one call
    turn = count()

    def bare() -> Callable[[], None]:
        raw = Raw(model, config.batch_size * together, where, config, stored=launch.HALF.get(config.precision))

        def forwards() -> None:
            for _ in range(BATCHES * calls // together):
                raw.call()

        return forwards

    text = f"{calls // together} forwards a batch of {config.batch_size * together}"
    return Case(lambda: make(next(turn)), bare, config.num, text, where, config.precision, *_asked(config, model, calls))


def _asked(config: BatchesConfig, model: Model, calls: int, decoded: bool = False) -> tuple[int, int]:
    """FLOP of a case that makes `config.num` images in `calls` evaluations each, and bytes of its networks' weights."""
    flop = calls * cost.evaluation(model) + (cost.decoding(model) if decoded else 0)
    return config.num * flop, model.held(launch.HALF.get(config.precision))


def _bench_pipeline(config: SampleConfig, model: Model, drawn: Model, whole: Model, folder: Path) -> Case:
    """Sampling against diffusers' pipeline: same prompts, size, steps, batch and precision, pictures written as PNG files.

    `drawn`: the model with the decoder and the tiles of the options, which the pipeline gets too. `whole`: the model without a LoRA of its
    own, as the pipeline opens it.
    """
    import diffusers

    where = launch.device(config.device)
    sampling = model.with_defaults(config.solver, config.steps, config.guidance_scale, config.guidance_calls)
    turn = count()
    vae = copy.deepcopy(drawn.codec.parts()["vae"])
    prompts = model.conditioner.captions(model.conditioner.labels(config.num).tolist()) or []
    there = formats.format_of(whole).in_diffusers(whole)
    height, width = (side * model.codec.factor for side in model.shape[1:])
    options = {"height": height, "width": width, "num_inference_steps": sampling.steps, **there.called}
    options["guidance_scale"] = sampling.guidance_scale - there.less

    def bare() -> Callable[[], None]:
        formats.save(whole, folder / "pipeline")
        index = read_json(folder / "pipeline" / "model_index.json")
        absent = {part: None for part, entry in index.items() if entry == [None, None]}  # which the pipeline wants said
        tokenizers = model.text.tokenizers() if model.text is not None else {}  # made-up ones are of no class that a folder may name
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "pipeline", **absent, **tokenizers).to(where)
        if config.precision not in launch.HALF:
            pipeline.to(torch.float32)  # some text encoders are stored in bf16, and pipelines hand on what they answer
        if model.sampler.teaches and model.scheduler is not None:
            pipeline.scheduler = schedulers.make(model.scheduler, schedulers.SOLVERS[sampling.solver])
        if config.changed("decoder", "tiles"):
            pipeline.vae = vae.to(where)
        pipeline.set_progress_bar_config(disable=True)

        def calls() -> None:
            for first in range(0, config.num, config.batch_size):
                with launch.autocast(where, config.precision):
                    made = pipeline(prompt=prompts[first : first + config.batch_size], **options)
                for k, picture in enumerate(made.images if config.format != "npz" else ()):
                    picture.save(folder / "pipeline" / f"{first + k:06d}.png")

        return calls

    if told := config.changed("compile", "channels_last"):
        say(f"bench: {' and '.join(told)}: on our side alone, diffusers' pipeline runs as it is")
    how = f"{sampling.solver} {sampling.steps}, guidance {sampling.guidance_scale:g}, batch {config.batch_size}"
    text = f"diffusers' {formats.pipelines_of(whole)[0]}, {how}"
    asked = _asked(config, drawn, sampling.evaluations, decoded=True)
    return Case(lambda: batch.sample(config, drawn, folder / str(next(turn))), bare, config.num, text, where, config.precision, *asked)


def _opened(command: str, config: GenerateT, folder: Path, random: bool, name: str) -> tuple[GenerateT, Model]:
    """BATCHES batches of a command that makes images, and its model with prompts."""
    job = StandIns(command, folder=folder, random=random)
    if guides := config.changed("classifier_guidance", "clip_guidance"):
        say(f"bench: {' and '.join(guides)}: left out, so no guide is timed")
    if told := config.changed("prompts", "negative_prompt"):
        say(f"bench: {' and '.join(told)}: left out for prompts of {PROMPT_SETS[0]}, since the content changes no time")
    model = job.model(name)
    model = prompted(model if config.resolution is None else model.with_resolution(config.resolution))
    if "batch_size" not in config.model_fields_set and model.pixels >= LARGE:
        config = config.model_copy(update={"batch_size": 8})
    job.say()
    return config.model_copy(update={"num": BATCHES * config.batch_size}), model


def bench_pairs(config: PairsConfig, folder: Path, random: bool = False) -> Case:
    config, model = _opened("pairs", config, folder, random, config.teacher)
    config = config.model_copy(update={"shard_size": config.batch_size})
    return _bench_generation(config, model, lambda k: generate(config, model, folder / str(k)))


def bench_sample(config: SampleConfig, folder: Path, random: bool = False) -> Case:
    config, model = _opened("sample", config, folder, random, config.model)
    if config.times is not None:
        model = model.with_times(config.times, config.steps)
    drawn = model.decoding(config.decoder, config.tiles)
    if model.conditioner.prompts:
        known = {model.sampler.solver, *(schedulers.SOLVERS if model.scheduler is not None else ())}
        whole = model.whole()
        if (config.solver or model.sampler.solver) in known and formats.format_of(whole).in_diffusers(whole).snippet:
            return _bench_pipeline(config, model, drawn, whole, folder)
        say("bench: diffusers' pipeline does not sample it so: against bare network calls, without text, decoder and PNG files")
    return _bench_generation(config, drawn, lambda k: batch.sample(config, drawn, folder / str(k)))


CASES: dict[str, Callable[..., Case]] = {command: partial(training, command) for command in TRAINING}
CASES |= {"pairs": bench_pairs, "sample": bench_sample}

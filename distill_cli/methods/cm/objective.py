"""Consistency models by distillation (cd), training (ct), improved training (ict) and easy tuning (ect).

One objective: the student's estimate of x0 at the noisier time is drawn to a target's estimate at the next less noisy one.
The methods differ in how the pair of times is drawn, in how the second point is reached (the teacher's ODE, or the data's own
noise), and in the target: an average of the student (cd, ct) or the student itself (ict, ect).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.config import CMConfig
from distill_cli.data import Images
from distill_cli.data.images import BUILTIN, split
from distill_cli.diffusion import consistency as maths
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.guidance import guided
from distill_cli.diffusion.losses import distance
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.schedule import GRID, EDMSchedule, expand
from distill_cli.errors import UsageError
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.perceptual import Perceptual
from distill_cli.models.pixel import check_resolution, create
from distill_cli.models.sampler import Sampler
from distill_cli.models.times import PUBLISHED, nearest, parse, spelled
from distill_cli.processes import say
from distill_cli.training.ema import follow
from distill_cli.training.examples import Examples
from distill_cli.training.identity import digest
from distill_cli.training.job import Job
from distill_cli.training.objective import Call, Calls, Full, Loss, Objective, Rows, refuse_student, student_of


def open(config: CMConfig, job: Job) -> Objective:
    """Read teacher and images; times, label dropout and data of the config become what they are by default."""
    teacher = job.teacher(config.teacher, config.device) if config.teacher else None
    # runs saved before students had their own grid counted times on 40 points
    if job.resume is not None and config.times is not None and not config.times.startswith("sigma:"):
        config = config.model_copy(update={"times": spelled(parse(config.times, EDMSchedule(), 2))})
    config, said = without_null(config, teacher, job.resume is None and "label_dropout" in config.model_fields_set)
    if said:
        say(said)
    config = config.model_copy(update={"data": images_of(config, teacher)})
    objective = Consistency(config, teacher, images := job.images(config, teacher))
    known = objective.start.conditioner.classes
    if not job.dry_run and images.classes and not known:
        say(f"the teacher knows no classes: those of {config.data} are left aside")
    elif not job.dry_run and list(images.classes) != list(known):
        say(f"the classes {', '.join(images.classes[:3])}, ... of {config.data} are taken for the teacher's in their order")
    if not job.dry_run:
        objective.config = config.model_copy(update={"times": spelled(objective.own_times)})
    return objective


class Consistency(Objective):
    """The objective. The student starts from the teacher's weights, or (ct, ict without one) from new ones."""

    config: CMConfig
    images: Images

    def __init__(self, config: CMConfig, teacher: Model | None, images: Images) -> None:
        super().__init__(config, "student")
        self.teacher, self.images = teacher, images
        self.teacher_hash = teacher.weights_hash() if teacher is not None else ""
        start = teacher.copy() if teacher is not None else new(config, images)
        self.schedule, self.own_times = check(config, start, images)
        start.denoiser.schedule, self.start = self.schedule, start
        student = start.denoiser.train().requires_grad_(True)
        if config.method != "ect":  # which trains with EDM's scalings, whose boundary is at 0
            student.parameterisation = "consistency"
        for name, module in student.named_modules():
            if name.endswith(".dropout") and isinstance(module, nn.Dropout):  # of residual blocks; attention's is in a list
                module.p = config.dropout
        self.trained["student"] = Full(student, config.lr)
        if config.method in ("cd", "ct"):
            self.kept["target"] = copy.deepcopy(student).requires_grad_(False)
        if config.method == "cd":
            assert teacher is not None
            self.sampling = teacher.with_defaults(None, None, config.guidance_scale)
            self.guidance = self.sampling.guidance_scale
            self.frozen["teacher"] = teacher.denoiser.eval().requires_grad_(False)
            self.real = guided(teacher.denoiser, self.guidance, teacher.conditioner.null)
        if teacher is not None:
            self.identity["teacher"] = self.teacher_hash
        self.perceptual: Perceptual | None = None
        if config.metric == "lpips" and (teacher is None or self.teacher_hash):  # which a plan leaves out
            below = math.inf if config.lpips_resize == "always" else 256
            self.perceptual = Perceptual(config.lpips_weights, below=below, pooling=config.lpips_pooling)
            self.frozen["lpips"] = self.perceptual
            self.identity["lpips_weights"] = digest(self.perceptual)
        dimensions = torch.Size(start.shape).numel()
        self.huber_c = 0.00054 * dimensions**0.5 if config.huber_c is None else config.huber_c
        seen, _ = split(images, config.holdout, config.seed)
        self.order = Order(config.seed, len(seen))
        self.examples = Examples(images, self.order, start.conditioner, config.label_dropout, seen)

    def scales(self, step: int) -> int:
        """N, the times of the grid, at a step."""
        config = self.config
        assert config.scales is not None
        if config.method == "cd":
            return config.scales
        assert config.scales_end is not None
        schedule = maths.ct_scales if config.method == "ct" else maths.ict_scales
        return schedule(min(step, config.steps - 1), config.steps, config.scales, config.scales_end)

    def times(self, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        """(B,) float64 pairs of times t > r."""
        config = self.config
        if config.method == "ect":
            assert config.stages is not None
            t = (config.p_mean + config.p_std * draws.normal("time").double()).exp()
            stage = min(step, config.steps - 1) * config.stages // config.steps
            return t, maths.ect_neighbour(t, stage, config.q, config.k, config.b)
        intervals = self.scales(step) - 1
        uniform = draws.uniform("time")
        if config.method == "ict":
            index = maths.lognormal_index(self.schedule, uniform, intervals, config.p_mean, config.p_std)
        elif config.time_weights is not None:
            index = maths.weighted_index(uniform, torch.tensor(config.time_weights, dtype=torch.float64))
        else:
            index = (uniform * intervals).long()
        return maths.sigma_at(self.schedule, index, intervals), maths.sigma_at(self.schedule, index + 1, intervals)

    def errors(self, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """Weighted distance of each sample, (B,): of the student's estimate at t to the target's at r."""
        config = self.config
        assert config.weighting is not None
        weight = maths.weight(config.weighting, t, r, self.start.denoiser.scales.sigma_data).to(x)
        t, r = t.to(x), r.to(x)
        noisy = x + expand(t, x) * noise
        student = self.network("student")
        target = self.kept.get("target", student)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # the student's call below draws the same dropout
            if config.method == "cd":
                nearer = maths.ode_steps(self.real, self.schedule, noisy, t, r, condition, config.solver, config.teacher_steps)
            else:
                nearer = x + expand(r, x) * noise
            reference = torch.where(expand(r, x) > 0, target(nearer, r.clamp(min=1e-6), condition), x)
        torch.clear_autocast_cache()  # casts made without gradient must not serve the call with it (pytorch issue 112583)
        estimate = student(noisy, t, condition)
        if self.perceptual is not None:
            distances = self.perceptual(estimate, reference)
        else:
            distances = distance(config.metric, estimate, reference, self.huber_c)
        return weight * distances

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        x, condition = self.examples.batch(draws, self.device)
        t, r = (time.to(x.device) for time in self.times(draws, step))
        noise = draws.normal("noise", x.shape[1:]).to(x.device)
        yield Loss("student", self.errors(x, noise, t, r, condition).mean())

    def after(self, step: int) -> None:
        """The target's average takes the student's step."""
        if "target" not in self.kept:
            return
        config = self.config
        assert config.target_decay is not None
        decay = config.target_decay
        if config.method == "ct":
            assert config.scales is not None
            decay = maths.ct_decay(self.scales(step), config.scales, decay, config.decay_over)
        follow(self.kept["target"], self.network("student"), 1 - decay)

    def compared(self, made: Model) -> Rows:
        rows = {}
        if self.teacher is not None:
            sampling = self.sampling if self.config.method == "cd" else self.teacher.sampling
            rows["teacher"] = (self.teacher.to(next(made.denoiser.parameters()).device), sampling)
        steps = {n: made.sampling.model_copy(update={"steps": n}) for n in (1, 2)}
        return rows | {f"student, {n} step{'s' * (n > 1)}": (made, sampling) for n, sampling in steps.items()}

    def calls(self) -> Calls:
        config, target = self.config, "target" if self.kept else "student"
        asked = config.teacher_steps * (2 if config.solver == "heun" else 1) * (1 if self.guidance in (None, 1) else 2)
        answers = ["teacher"] * asked if config.method == "cd" else []
        size = config.batch_size
        return Calls([Call("student", size)], [Call(name, size) for name in (*answers, target)])

    def model(self, network: nn.Module, step: int) -> Model:
        """The student; one by ect gets the boundary scalings too (sigma_min apart from its own), which diffusers' pipeline has."""
        assert isinstance(network, NetworkDenoiser)
        network = copy.copy(network)
        network.parameterisation = "consistency"
        conditioner = self.start.conditioner.taught(null=bool(self.config.label_dropout))  # without dropout the null class is not learned
        lineage = student_of(self.start.lineage, self.config.method, self.teacher_hash, self.config.data or "")
        return Model(network, conditioner, lineage, Sampler.consistency(self.own_times))


def images_of(config: CMConfig, teacher: Model | None) -> str:
    """The set of real images: the one given, else that which the teacher has learned, where it is at hand."""
    if config.data:
        return config.data
    known = config.teacher if config.teacher in BUILTIN else teacher.lineage.data if teacher is not None else ""
    if known and (known in BUILTIN or Path(known).is_dir()):
        return known
    raise UsageError(
        f"--data: method {config.method} learns from real images, and none are given", "--data FOLDER --resolution PIXELS, or --data digits"
    )


def without_null(config: CMConfig, teacher: Model | None, asked: bool) -> tuple[CMConfig, str]:
    """The config without label dropout for a teacher that has classes and no null class, and the line that says so.

    Raises UsageError where label dropout was `asked` for.
    """
    if teacher is None or not teacher.conditioner.classes or teacher.conditioner.null is not None or not config.label_dropout:
        return config, ""
    why = f"{teacher.lineage.name} was trained without label dropout: it has no null class"
    if asked:
        raise UsageError(f"label_dropout {config.label_dropout:g}: {why}", "label_dropout=0, or leave it out")
    return config.model_copy(update={"label_dropout": 0.0}), f"label_dropout 0: {why}"


def new(config: CMConfig, images: Images) -> Model:
    """A student with random weights."""
    check_resolution(images.shape[-1], config.network)
    options: dict[str, Any] = config.network.model_dump()
    return create(
        resolution=images.shape[1],
        image_channels=images.shape[0],
        classes=list(images.classes),
        schedule=EDMSchedule(),
        parameterisation="consistency",
        lineage=Lineage(name=Path(str(config.data)).name, data=str(config.data)),
        seed=config.seed,
        **options,
    )


def check(config: CMConfig, start: Model, images: Images) -> tuple[EDMSchedule, list[float]]:
    """The student's schedule and its own times; refuses a model that cannot be trained so, and images of another kind than it makes."""
    schedule = start.denoiser.schedule
    if not isinstance(schedule, EDMSchedule):
        raise UsageError(f"--teacher {config.teacher}: no EDM model", "consistency models need sigma as their time; use `distill dmd`")
    check_images(config, start, images)
    if config.method in ("cd", "ect"):
        refuse_student(start, str(config.teacher), config.method)
    return own_times(config, schedule)


def own_times(config: CMConfig, schedule: EDMSchedule) -> tuple[EDMSchedule, list[float]]:
    """The schedule with the grid of the times that a student will know, and its own few."""
    schedule = replace(schedule, grid=config.scales if config.method == "cd" and config.scales else GRID)
    return schedule, parse(config.times, schedule, 2, "times") if config.times else nearest(schedule, PUBLISHED)


def check_images(config: CMConfig, model: Model, images: Images) -> None:
    """Refuse images of another shape or with other classes than the model's."""
    if tuple(images.shape) != model.shape:
        raise UsageError(f"--data {config.data}: images of {tuple(images.shape)}, the teacher's are {model.shape}")
    if model.conditioner.classes and len(images.classes) != len(model.conditioner.classes):
        raise UsageError(f"--data {config.data}: {len(images.classes)} classes, the teacher has {len(model.conditioner.classes)}")

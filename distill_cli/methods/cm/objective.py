"""Consistency models by distillation (cd), training (ct), improved training (ict) and easy tuning (ect).

One objective: the student's estimate of x0 at the noisier time is pulled to a target's estimate at the next less noisy one.
The methods differ in how the pair of times is drawn, in how the second point is reached (the teacher's ODE, or the data's own
noise), and in the target: an average of the student (cd, ct) or the student itself (ict, ect).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from distill_cli.data import Images
from distill_cli.diffusion import consistency as maths
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import LCM, NetworkDenoiser
from distill_cli.diffusion.losses import distance
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.schedule import GRID, EDMSchedule, NoiseSchedule, add_noise, expand
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.methods.cm.config import CDConfig, CMConfig, CTConfig, ECTConfig, ICTConfig, NewConfig
from distill_cli.methods.registry import load
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.perceptual import Perceptual
from distill_cli.models.sampler import Sampler, Sampling
from distill_cli.models.steering import led, led_by
from distill_cli.models.times import PUBLISHED, nearest, parse, spelled
from distill_cli.pairs.store import PairStore
from distill_cli.processes import say
from distill_cli.runs import Run
from distill_cli.training.ema import follow
from distill_cli.training.examples import without_null
from distill_cli.training.identity import digest
from distill_cli.training.job import Job
from distill_cli.training.objective import Call, Calls, Full, Loss, Objective, Row, Rows, refuse_student, student_of
from distill_cli.training.source import Source, read

OWN = 50
"""Times of a student on another schedule than EDM's, unless its method has a grid: LCMScheduler's original_inference_steps."""
FINE = 100
"""Points of a grid above which bf16 (7 bits of mantissa; fp16 and tf32 have 10) is too coarse."""
ROUNDED = "times come so near to each other that most of the loss will be rounding (over 80% on grids of 1280 points)"


def rounds(config: CMConfig) -> bool:
    """Whether bf16 hides what the student learns: the difference of two estimates at neighbouring times."""
    finest = max(config.grid or 0, getattr(config, "scales_end", 0))
    return config.precision == "bf16" and (finest > FINE or isinstance(config, ECTConfig))


class Consistency(Objective):
    """Shared by the methods. The student starts from the teacher's weights; ct and ict without a teacher start from new ones."""

    config: CMConfig
    order: Order
    parameterisation = "consistency"
    """Parameterisation of an EDM network during training."""
    on_grid = True
    """Whether the pairs of times are neighbours on a grid that begins with the largest time."""

    def __init__(self, config: CMConfig, teacher: Model | None, data: Images | PairStore) -> None:
        super().__init__(config, "student")
        self.teacher = teacher
        if rounds(config):
            say(f"warning: precision bf16: {ROUNDED}; precision=fp16, tf32 or no")
        self.teacher_hash = teacher.weights_hash() if teacher is not None else ""
        self.source = Source(config, self.begin(data), data, planned=teacher is not None and not self.teacher_hash)
        self.start, self.images, self.order = self.source.model, self.source.images, self.source.order
        self.identity |= self.source.identity
        if teacher is not None:  # at the size and for the prompts of the data
            self.teacher = replace(self.start, denoiser=teacher.denoiser, sampler=teacher.sampler)
        self.schedule, self.sampler = self.grid(self.start.denoiser.schedule)
        self.start.denoiser.schedule = self.schedule
        self.student = self.bounded(self.start.denoiser, self.parameterisation).train().requires_grad_(True)
        for name, module in self.student.named_modules():
            if name.endswith(".dropout") and isinstance(module, nn.Dropout):  # only in residual blocks; attention has its dropout in a list
                module.p = config.dropout
        self.trained["student"] = Full(self.student, config.lr)
        if teacher is not None:
            self.identity |= {"teacher": self.teacher_hash, **led_by(teacher)}
        self.perceptual: Perceptual | None = None
        if config.metric == "lpips":
            self.start.codec.kind.needs_pictures("metric lpips", "metric=huber, l1 or l2")
            if self.start.codec.factor > 1:
                raise UsageError(f"metric lpips: compares pixels, and {config.teacher} has latents", "metric=huber")
        if config.metric == "lpips":
            below, planned = math.inf if config.lpips_resize == "always" else 256, teacher is not None and not self.teacher_hash
            self.perceptual = Perceptual(config.lpips_weights, below, config.lpips_pooling, planned)
            self.frozen["lpips"] = self.perceptual
            self.identity |= {} if planned else {"lpips_weights": digest(self.perceptual)}
        dimensions = torch.Size(self.start.shape).numel()
        self.huber_c = 0.00054 * dimensions**0.5 if config.huber_c is None else config.huber_c
        self.frozen |= self.start.codec.parts()

    def begin(self, data: Images | PairStore) -> Model:
        """The student before training. Raises UsageError if the teacher cannot be its start."""
        assert self.teacher is not None
        refuse_student(self.teacher, str(self.config.teacher), self.config.method)
        if self.config.lora and self.config.dropout:
            raise UsageError(f"dropout {self.config.dropout:g}: not with lora, whose network is the teacher's too", "leave it out")
        return replace(self.teacher, denoiser=self.begun_from(self.teacher))

    def bounded(self, denoiser: NetworkDenoiser, parameterisation: str) -> NetworkDenoiser:
        """Give a denoiser the boundary of a consistency function, which is x_t without noise.

        On EDM's schedule by the row of the parameterisation, on a table as in latent consistency models; a flow network has it.
        """
        if self.schedule.grid:
            denoiser.parameterisation = parameterisation
        elif self.schedule.bins is not None:
            denoiser.boundary = LCM
        return denoiser

    def grid(self, schedule: NoiseSchedule) -> tuple[NoiseSchedule, Sampler]:
        """The schedule with the student's grid, and how the student is sampled. Raises UsageError where the two do not go together."""
        config = self.config
        if config.weighting == "inverse-step" and self.on_grid and not schedule.signal:
            ends = f"the schedule of {config.teacher} ends without signal, where this weight is 0"
            raise UsageError(f"weighting inverse-step: {ends}", "weighting=uniform")
        if isinstance(schedule, EDMSchedule):
            schedule, times = own_times(config, schedule)
            return schedule, Sampler.consistency(times)
        if config.times:
            raise UsageError(f"times {config.times}: for EDM teachers; this one's student takes the times of its grid", "leave it out")
        intervals = config.grid - 1 if config.grid else OWN
        if schedule.bins is not None and intervals > schedule.bins:
            raise UsageError(f"a grid of {intervals} steps: {config.teacher} has {schedule.bins} times", "fewer of them")
        return schedule, Sampler.renoising(schedule.point(torch.arange(intervals), intervals).tolist())

    def prepare(self, where: torch.device, run: Run) -> None:
        self.examples = self.source.prepare(where, run)

    def target(self) -> nn.Module:
        """The network whose estimate at the less noisy time is the student's target; it gets no gradient."""
        return self.network("student")

    def times(self, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        """(B,) float64 pairs of times t > r."""
        raise NotImplementedError

    def nearer(self, x: Tensor, noise: Tensor, noisy: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """x_r (B, C, H, W), the less noisy neighbour of x_t = `noisy`; here x with the same noise."""
        return add_noise(self.schedule, x, noise, r)

    def errors(self, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """(B,) weighted distances between the student's estimate at t and the target's at r."""
        config = self.config
        noisier, cleaner = (maths.level(self.schedule, time) for time in (t, r))
        weight = maths.weight(config.weighting, noisier, cleaner, self.start.denoiser.scales.sigma_data).to(x)
        t, r = (sent(each, x.device, x.dtype) for each in (t, r))
        noisy = add_noise(self.schedule, x, noise, t)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # the student's call below draws the same dropout
            nearer = self.nearer(x, noise, noisy, t, r, condition)
            reference = torch.where(expand(r, x) > 0, self.target()(nearer, r.clamp(min=1e-6), condition), nearer)
        torch.clear_autocast_cache()  # casts made without gradient must not serve the call with it (pytorch issue 112583)
        estimate = self.network("student")(noisy, t, condition)
        if self.perceptual is not None:
            distances = self.perceptual(estimate, reference)
        else:
            distances = distance(config.metric, estimate, reference, self.huber_c)
        return weight * distances

    def ahead(self, step: int, draws: Draws) -> None:
        self.examples.ahead(draws)

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        x, condition = self.examples.batch(draws, self.device)
        t, r = (sent(time, x.device) for time in self.times(draws, step))
        noise = sent(draws.normal("noise", x.shape[1:]), x.device)
        yield Loss("student", self.errors(x, noise, t, r, self.told(condition, draws)).mean())

    def told(self, condition: Condition, draws: Draws) -> Condition:
        """The condition with what the student is told besides; nothing by default."""
        return condition

    def reference(self) -> Row | None:
        return None if self.teacher is None else (self.teacher, self.sampling())

    def compared(self, made: Model) -> Rows:
        rows = {} if (teacher := self.reference()) is None else {"teacher": teacher}
        for model, _ in rows.values():
            model.to(next(made.denoiser.parameters()).device)
        steps = {n: made.sampling.model_copy(update={"steps": n}) for n in (1, max(2, made.sampler.steps))}
        return rows | {f"student, {n} step{'s' * (n > 1)}": (made, sampling) for n, sampling in steps.items()}

    def sampling(self) -> Sampling:
        """How the teacher is sampled."""
        assert self.teacher is not None
        return self.teacher.sampling

    def asked(self) -> list[Call]:
        """Calls of a step without gradient, in order."""
        return [Call("student", self.config.batch_size)]

    def calls(self, step: int = 0) -> Calls:
        size = self.config.batch_size
        return Calls([Call("student", size)], self.asked(), size if self.perceptual is not None else 0)

    def judge(self, x: Tensor, reference: Tensor) -> Tensor:
        assert self.perceptual is not None
        return self.perceptual(x, reference)

    def model(self, network: nn.Module, step: int) -> Model:
        """The student. After ect it gets the boundary scalings of diffusers' pipeline, which differ from EDM's by about sigma_min."""
        assert isinstance(network, NetworkDenoiser)
        network = self.bounded(copy.copy(network), "consistency")
        null = bool(self.config.label_dropout)  # no dropout, no trained null class
        lineage = student_of(self.start.lineage, self.config.method, self.teacher_hash, self.source.name)
        conditioner = self.start.conditioner.taught(self.source.learned, null)
        return replace(self.start, denoiser=network, conditioner=conditioner, lineage=lineage, sampler=self.sampler)


class Following(Consistency):
    """Methods whose target is an average of the student."""

    def __init__(self, config: CMConfig, teacher: Model | None, data: Images | PairStore) -> None:
        super().__init__(config, teacher, data)
        self.kept["target"] = copy.deepcopy(self.student).requires_grad_(False)

    def target(self) -> nn.Module:
        return self.kept["target"]

    def asked(self) -> list[Call]:
        return [Call("target", self.config.batch_size)]

    def decay(self, step: int) -> float:
        """Decay of the target's average."""
        raise NotImplementedError

    def after(self, step: int) -> None:
        """Update the target's average."""
        follow(self.target(), self.network("student"), 1 - self.decay(step))


class CD(Following):
    """Distillation: the neighbour lies on the teacher's ODE (2303.01469, algorithm 2)."""

    config: CDConfig

    def __init__(self, config: CDConfig, teacher: Model, data: Images | PairStore) -> None:
        if config.solver == "heun" and not teacher.denoiser.schedule.signal:
            ends = f"the schedule of {config.teacher} ends without signal, where Heun's steps divide by 0"
            if "solver" in config.model_fields_set:
                raise UsageError(f"solver heun: {ends}", "solver=euler")
            say(f"solver euler: {ends}")
            config = config.model_copy(update={"solver": "euler"})
        super().__init__(config, teacher, data)
        self.guidance = self.sampling().guidance_scale
        self.hold(teacher)

    def prepare(self, where: torch.device, run: Run) -> None:
        super().prepare(where, run)
        assert self.teacher is not None
        self.real = self.teacher.guided(self.sampling())

    def decay(self, step: int) -> float:
        return self.config.target_decay

    def sampling(self) -> Sampling:
        assert self.teacher is not None
        return self.teacher.with_defaults(None, None, self.config.guidance_scale)

    def asked(self) -> list[Call]:
        images = self.config.batch_size * (2 if self.sampling().combines else 1)
        return [*[Call("teacher", images)] * self.config.teacher_steps * maths.ORDER[self.config.solver], *super().asked()]

    def times(self, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        intervals, weights, uniform = self.config.scales - 1, self.config.time_weights, draws.uniform("time")
        if weights is None:
            return maths.neighbours(self.schedule, (uniform * intervals).long(), intervals)
        return maths.neighbours(self.schedule, maths.weighted_index(uniform, torch.tensor(weights, dtype=torch.float64)), intervals)

    def nearer(self, x: Tensor, noise: Tensor, noisy: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """By steps of the teacher's ODE."""
        return maths.ode_steps(self.real, self.schedule, noisy, t, r, condition, self.config.solver, self.config.teacher_steps)


class New(Consistency):
    """Methods on a grid that grows, from a teacher's weights or new ones."""

    config: NewConfig
    growth: Callable[[int, int, int, int], int]
    """The curriculum: the grid's times at a step, by step, steps, scales and scales_end."""

    def scales(self, step: int) -> int:
        """N, the number of times on the grid at a step."""
        config = self.config
        return self.growth(min(step, config.steps - 1), config.steps, config.scales, config.scales_end)

    def begin(self, data: Images | PairStore) -> Model:
        if self.teacher is not None:
            return super().begin(data)
        config, name = self.config, str(self.config.data)
        if isinstance(data, PairStore):
            raise UsageError(f"--data {name}: holds pairs, and a network without a teacher learns from images")
        lineage = Lineage(name=Path(name).name, data=name)
        student: Model = load(data.kind.new)(data, config.network, EDMSchedule(), "consistency", lineage, config.seed)
        return student


class CT(New, Following):
    """Training (2303.01469, algorithm 3)."""

    config: CTConfig
    growth = staticmethod(maths.ct_scales)

    def times(self, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        intervals = self.scales(step) - 1
        return maths.neighbours(self.schedule, (draws.uniform("time") * intervals).long(), intervals)

    def decay(self, step: int) -> float:
        return maths.ct_decay(self.scales(step), self.config.scales, self.config.target_decay, self.config.decay_over)


class ICT(New):
    """Improved training (2310.14189): the student is its own target."""

    config: ICTConfig
    growth = staticmethod(maths.ict_scales)

    def times(self, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        intervals = self.scales(step) - 1
        index = maths.lognormal_index(self.schedule, draws.uniform("time"), intervals, self.config.p_mean, self.config.p_std)
        return maths.neighbours(self.schedule, index, intervals)


class ECT(Consistency):
    """Easy tuning (2406.14548): it trains with EDM's scalings, whose boundary is at 0."""

    config: ECTConfig
    parameterisation = "edm"
    on_grid = False

    def times(self, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        config = self.config
        level = (config.p_mean + config.p_std * draws.normal("time").double()).exp()
        stage = min(step, config.steps - 1) * config.stages // config.steps
        nearer = maths.ect_neighbour(level, stage, config.q, config.k, config.b)
        return self.schedule.time(level), self.schedule.time(nearer)


def own_times(config: CMConfig, schedule: EDMSchedule) -> tuple[EDMSchedule, list[float]]:
    """The schedule with the student's grid, and the student's own times for several steps."""
    schedule = replace(schedule, grid=config.grid or GRID)
    return schedule, parse(config.times, schedule, 2, "times") if config.times else nearest(schedule, PUBLISHED)


def opened(kind: type[Consistency], config: CMConfig, job: Job) -> Objective:
    """Read teacher and images. The config's times, label dropout and data get their resolved values."""
    teacher = led(job.teacher(config.teacher, config.device), config, teaching=True, dry_run=job.dry_run) if config.teacher else None
    # runs saved before students had their own grid counted times on 40 points
    if job.resume is not None and config.times is not None and not config.times.startswith("sigma:"):
        config = config.model_copy(update={"times": spelled(parse(config.times, EDMSchedule(), 2))})
    config, said = without_null(config, teacher, job.resume is None and "label_dropout" in config.model_fields_set)
    if said:
        say(said)
    config, data = read(config, teacher, job, f"method {config.method}")
    objective = kind(config, teacher, data)
    if job.dry_run or isinstance(data, PairStore):
        return objective
    known, images = objective.start.conditioner.classes, data
    if images.classes and not known:
        say(f"the teacher knows no classes: those of {config.data} are left aside")
    elif list(images.classes) != list(known):
        say(f"the classes {', '.join(images.classes[:3])}, ... of {config.data} are taken for the teacher's in their order")
    if objective.schedule.grid:
        objective.config = config.model_copy(update={"times": spelled(objective.sampler.times)})
    return objective


cd, ct, ict, ect = (partial(opened, kind) for kind in (CD, CT, ICT, ECT))

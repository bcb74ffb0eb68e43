"""Progressive distillation (Salimans & Ho 2202.00512): each round's student makes in one DDIM step what its teacher makes in two.

A round's student begins as its teacher, and its average is the next round's teacher, so the steps are halved from round to round.
Students keep the teacher's parameterisation. Dropout is off everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.data import Images
from distill_cli.diffusion.condition import GUIDANCE_SCALE
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.guidance import Told, scales
from distill_cli.diffusion.losses import distance, regression_loss
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.schedule import add_noise
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.methods.pd import maths
from distill_cli.methods.pd.config import PDConfig
from distill_cli.models import load
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler, Sampling
from distill_cli.models.steering import led, led_by
from distill_cli.pairs.store import PairStore
from distill_cli.processes import say
from distill_cli.runs import Run
from distill_cli.training.ema import follow
from distill_cli.training.examples import without_null
from distill_cli.training.job import Job
from distill_cli.training.objective import Call, Calls, Full, Loss, Objective, Phase, Row, Rows, phase_at, refuse_student, student_of
from distill_cli.training.source import Source, read

SHOWN = 4
"""Most steps of the students in the comparison."""


def open(config: PDConfig, job: Job) -> Objective:
    """Read the teacher and what noise is added to; label dropout and data of the config become what they are by default."""
    teacher = job.teacher(config.teacher, config.device)
    refuse_student(teacher, config.teacher, "pd")
    teacher = led(teacher, config, teaching=True, dry_run=job.dry_run)
    sampling, span = teacher.taught_by(config.guidance_scale, config.guidance_range), config.guidance_range
    how = f"{span[0]:g} to {span[1]:g}" if span else teacher.said(sampling) if sampling.guidance_scale != 1 or teacher.guides else ""
    why = f"guidance {how} goes into the student, which has no null class" if how else ""
    config, said = without_null(config, teacher, job.resume is None and "label_dropout" in config.model_fields_set, why)
    if said:
        say(said)
    config, data = read(config, teacher, job, "pd")
    return Progressive(config, teacher, sampling, data)


class Progressive(Objective):
    """The objective: a phase for each round, whose teacher is kept in checkpoints."""

    config: PDConfig
    order: Order

    def __init__(self, config: PDConfig, teacher: Model, sampling: Sampling, data: Images | PairStore) -> None:
        super().__init__(config, "student")
        self.rounds = maths.rounds(config.first_steps, config.last_steps)
        """Steps of the student of each round."""
        last = len(self.rounds) - 1
        parts = zip(self.rounds, shared(config, len(self.rounds)), strict=True)
        self.phases = [Phase(count, f"student-{n}" if k < last else "student", anew=True) for k, (n, count) in enumerate(parts)]
        self.teacher_hash = teacher.weights_hash()
        self.identity |= {"teacher": self.teacher_hash, **led_by(teacher)}
        self.source = Source(config, teacher, data, planned=not self.teacher_hash)
        self.teacher, self.images, self.order = self.source.model, self.source.images, self.source.order
        self.identity |= self.source.identity
        self.schedule, self.sampling, self.guidance = teacher.denoiser.schedule, sampling, sampling.guidance_scale
        self.spacing = config.spacing or ("angle" if self.schedule.bins is None else "schedule")
        self.grid = maths.grid(self.schedule, config.first_steps, self.spacing)
        maths.check_falling(self.grid, self.spacing)
        start = self.begun_from(self.teacher, "base").eval().requires_grad_(True)
        self.trained["student"] = Full(start, config.lr)
        self.kept["teacher"] = copy.deepcopy(start).requires_grad_(False)
        self.frozen |= {**teacher.codec.parts(), **teacher.guiding()}

    def prepare(self, where: torch.device, run: Run) -> None:
        self.examples = self.source.prepare(where, run)

    def times(self, number: int) -> Tensor:
        """(2 N + 1,) float64 times of the teacher of a round, the last of them END; every second one is the student's."""
        return self.grid[:: 2**number]

    def before(self, step: int) -> None:
        """In the first step of a round the student, which is the average of the round before, becomes its teacher."""
        self.number = phase_at(self.phases, step)
        if self.number and step == sum(phase.steps for phase in self.phases[: self.number]):
            follow(self.kept["teacher"], self.network("student"), 1.0)

    def ahead(self, step: int, draws: Draws) -> None:
        self.examples.ahead(draws)

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        x, condition = self.examples.batch(draws, self.device)
        times, count = self.times(self.number), self.rounds[self.number]
        index = (draws.uniform("time") * count).long().clamp(max=count - 1)
        t, middle, end = (sent(times[2 * index + k], x.device, x.dtype) for k in range(3))
        noisy = add_noise(self.schedule, x, sent(draws.normal("noise", x.shape[1:]), x.device), t)
        span = self.config.guidance_range
        teacher: Any = self.kept["teacher"]
        if span:
            condition = condition.plus(GUIDANCE_SCALE, sent(scales(span, draws), self.device))
        if not self.number:  # later rounds' teachers have learned guidance
            teacher = self.teacher.guided(self.sampling, span is not None, Told(teacher, 1.0) if span else teacher)
        with torch.no_grad():
            target = maths.target(teacher, self.schedule, noisy, t, middle, end, condition)
        torch.clear_autocast_cache()  # casts made without gradient must not serve the call with it (pytorch issue 112583)
        estimate = self.network("student")(noisy, t, condition)
        squared = distance("l2", estimate, target, 0.0)
        if self.config.loss == "huber":
            loss = regression_loss("huber", estimate, target)
        else:
            loss = maths.weight(self.config.loss, self.schedule, t).to(x) * squared
        yield Loss("student", loss.mean(), {"x0_error": squared.mean(), "student_steps": squared.new_full((), float(count))})

    def model(self, network: nn.Module, step: int) -> Model:
        """The student of the round in which the last of `step` steps was made.

        One of diffusers' own times is sampled by diffusers' DDIM, which has them where its whole steps are as long as ours.
        """
        assert isinstance(network, NetworkDenoiser)
        number = phase_at(self.phases, max(0, step - 1))
        times, bins = self.times(number)[:-1:2].tolist(), self.schedule.bins
        theirs = bins is not None and self.spacing == "schedule" and bins % len(times) == 0
        scheduler = self.teacher.scheduler
        if scheduler is not None:
            own = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
            scheduler = {**scheduler, **own}  # latents have no range
        sampler, learned = Sampler.walking("ddim" if theirs else "euler", times), self.config.guidance_range
        return replace(
            self.teacher,
            denoiser=network,
            conditioner=self.teacher.conditioner.taught(self.source.learned, null=bool(self.config.label_dropout)),
            lineage=student_of(self.teacher.lineage, "pd", self.teacher_hash, self.source.name),
            sampler=sampler.with_told(self.sampling.guidance_scale, learned) if learned else sampler,
            scheduler=scheduler,
        )

    def reference(self) -> Row:
        """The teacher at its steps."""
        walking = Sampler.walking("euler", self.grid[:-1].tolist())
        usual = walking.model_copy(update={"guidance_scale": self.teacher.sampler.guidance_scale})
        teacher = replace(self.teacher, sampler=usual)
        return teacher, Sampling(solver="euler", steps=self.config.first_steps, guidance_scale=self.sampling.guidance_scale)

    def compared(self, made: Model) -> Rows:
        """The teacher, and the students of few steps."""
        teacher, asked = self.reference()
        rows = {f"teacher, {asked.steps} steps": (teacher.to(next(made.denoiser.parameters()).device), asked)}
        for count, phase in zip(self.rounds, self.phases, strict=True):
            if phase is self.phases[-1] or count <= SHOWN:
                student = made if phase is self.phases[-1] else self.student_in(phase, made)
                rows[f"student, {count} step{'s' * (count > 1)}"] = (student, student.sampling)
        return rows

    def student_in(self, phase: Phase, like: Model) -> Model:
        """The student that a round has left in the run's folder, where `like` is, with its other networks."""
        assert self.config.out is not None
        found = load(str(self.config.out / phase.result))
        denoiser = found.denoiser.to(next(like.denoiser.parameters()).device)
        return replace(like, denoiser=denoiser, sampler=found.sampler, scheduler=found.scheduler)

    def remarks(self, made: Model) -> tuple[dict[str, Any], str]:
        folders = {
            str(n): str(self.config.out / phase.result) for n, phase in zip(self.rounds, self.phases, strict=True) if self.config.out
        }
        return {"students": folders}, f"--model {self.config.out} --steps {'|'.join(folders)} takes the student of a round"

    def calls(self, step: int = 0) -> Calls:
        """The first round's teacher may be guided; later ones are not."""
        combines = (self.sampling.combines or self.config.guidance_range) and not phase_at(self.phases, step)
        size = self.config.batch_size
        return Calls([Call("student", size)], [Call("teacher", 2 * size if combines else size)] * 2)


def shared(config: PDConfig, count: int) -> list[int]:
    """The optimizer steps of each of `count` rounds."""
    shares = config.shares or [1.0] * count
    if len(shares) != count:
        raise UsageError(f"shares: {len(shares)} numbers for {count} rounds, from {config.first_steps} steps to {config.last_steps}")
    ends = [round(config.steps * sum(shares[:k]) / sum(shares)) for k in range(count + 1)]
    steps = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    if min(steps) < 1:
        raise UsageError(f"--steps {config.steps}: too few for {count} rounds")
    return steps

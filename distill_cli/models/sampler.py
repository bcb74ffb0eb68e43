"""How a model is sampled and what it knows: one value that solvers, plans, edits, cards and folders ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill_cli.config.base import GuidanceRule, Positive, Solver
from distill_cli.diffusion import solvers
from distill_cli.diffusion.condition import GUIDANCE_SCALE, Condition
from distill_cli.diffusion.denoiser import Denoiser, NetworkDenoiser
from distill_cli.diffusion.schedule import FlowSchedule, NoiseSchedule
from distill_cli.errors import UsageError
from distill_cli.models import schedulers
from distill_cli.models.times import parse


@dataclass(frozen=True)
class Task:
    """The arguments of a solver: standard-normal noise x (B, C, H, W), decreasing `times` (N,), and the denoiser."""

    denoiser: Denoiser
    network: NetworkDenoiser
    """The denoiser without guidance."""
    x: Tensor
    times: Tensor
    condition: Condition
    noise: solvers.Noise
    project: Callable[[Tensor], Tensor]
    scheduler: dict[str, Any] | None
    """Configuration of diffusers' scheduler, if the model has one."""
    own: bool = False
    """Whether the times are a student's own, which no scheduler spaces."""

    @property
    def schedule(self) -> NoiseSchedule:
        return self.network.schedule

    @property
    def start(self) -> Tensor:
        """x at the largest time."""
        return self.schedule.prior_std * self.x


def _heun(task: Task, noise: solvers.Noise | None = None) -> Tensor:
    return solvers.heun(task.denoiser, task.schedule, task.start, task.times, task.condition, noise)


def _straight(task: Task, noise: solvers.Noise | None = None) -> Tensor:
    return solvers.ddim(task.denoiser, task.schedule, task.start, task.times, task.condition, noise)


def _spaced(task: Task, name: str) -> Tensor:
    """By diffusers' scheduler if the model has one, which spaces the times; else, and at a student's own times, by DDIM's steps."""
    return _straight(task) if task.scheduler is None or task.own else _diffusers(task, name)


def _multistep(task: Task) -> Tensor:
    """By diffusers' scheduler where time is counted, which rounds it; by our own steps where it is not, on EDM."""
    schedule = task.schedule
    counted = schedule.bins or schedule.points
    return _diffusers(task, "dpm++") if counted else solvers.dpm(task.denoiser, schedule, task.start, task.times, task.condition)


def _few_step(task: Task) -> Tensor:
    """Estimates in pixels are clamped, as in diffusers' pipeline."""
    schedule, x = task.schedule, task.schedule.prior(task.times[0].item()) * task.x
    options: dict[str, Any] = {"sigma_min": schedule.floor, "noise": task.noise, "project": task.project}
    return solvers.few_step(task.denoiser, schedule, x, task.times, task.condition, **options)


def _diffusers(task: Task, name: str) -> Tensor:
    schedule: Any = task.schedule
    if isinstance(schedule, FlowSchedule):
        config = schedulers.flow_config(schedule, len(task.times))
    else:
        config = task.scheduler or schedulers.config_of(schedule, task.network.parameterisation)
    return schedulers.run(config, name, len(task.times), task.denoiser, task.network, task.start, task.condition)


def _above_zero(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Times for solvers that need noise at the last time: on a table, evenly spaced times that end above 0."""
    if schedule.bins is None:
        return schedule.times(steps)
    return torch.linspace(schedule.t_max, schedule.t_max / steps / 2, steps, dtype=torch.float64)


@dataclass(frozen=True)
class Algorithm:
    """A solver: its function, the network evaluations of N steps, and its needs."""

    run: Callable[[Task], Tensor]
    evaluations: Callable[[int], int] = lambda steps: steps
    times: Callable[[NoiseSchedule, int], Tensor] = lambda schedule, steps: schedule.times(steps)
    table: bool = False
    """Works only on a table of times."""
    whole: bool = False
    """Takes whole times of the schedule's `points`, where it has them."""
    signal: bool = False
    """Divides by alpha, so alpha must be above 0 at the largest time."""
    few: bool = False
    """Needs estimates of the ODE's end, and adds new noise between the steps."""


SOLVERS: dict[str, Algorithm] = {
    "heun": Algorithm(_heun, lambda steps: 2 * steps - 1, _above_zero, signal=True),
    "heun-churn": Algorithm(lambda task: _heun(task, task.noise), lambda steps: 2 * steps - 1, _above_zero, signal=True),
    "euler": Algorithm(partial(_spaced, name="euler")),
    "ddim": Algorithm(partial(_spaced, name="ddim")),
    "ancestral": Algorithm(lambda task: _straight(task, task.noise)),
    "few-step": Algorithm(_few_step, few=True),
    "pndm": Algorithm(partial(_diffusers, name="pndm"), lambda steps: steps + (steps > 1), table=True, signal=True),
    "dpm++": Algorithm(_multistep, whole=True),
}


class Sampling(BaseModel):
    """Settings of one sampling."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    solver: Solver = "heun"
    steps: Positive = 18
    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """0: the unconditional denoiser, which a guide leads."""
    guidance_calls: Literal[0, 1, 2] = 1
    """Calls for guidance: 1 of twice the batch, or 2; 0 where the network is told the scale."""

    @property
    def combines(self) -> bool:
        """Whether guidance combines a conditional and an unconditional evaluation."""
        return self.guidance_scale not in (0, 1) and self.guidance_calls > 0

    @property
    def evaluations(self) -> int:
        """Network evaluations for an image; guidance that combines two doubles them."""
        return SOLVERS[self.solver].evaluations(self.steps) * (2 if self.combines else 1)


class Sampler(Sampling):
    """The default sampling of a model, and what else it can do. Teachers know every level and answer with the mean."""

    knows: Literal["every level", "own times", "pure noise"] = "every level"
    """The noise levels at which the model was trained; a student with times of its own has them in `times`."""
    rule: GuidanceRule = "plain"
    """What becomes of uncond + scale (cond - uncond): a row of RULES."""
    answers: Literal["mean", "endpoint"] = "mean"
    """What the denoiser estimates: E[x0 | x_t], for ODE solvers, or the end of the ODE, to which new noise may be added."""
    guidance: Literal["outside", "inside", "told"] = "outside"
    """Outside: from a conditional and an unconditional evaluation. Inside: learned by the student. Told: the network is told the scale."""
    told: tuple[float, float] | None = None
    """The smallest and the largest scale that a told student has learned, where they are known."""
    times: tuple[float, ...] = ()
    """A student's own times, decreasing; () for teachers."""

    @classmethod
    def one_step(cls, schedule: NoiseSchedule, time: float | None = None) -> Sampler:
        """The sampler of a one-step student, trained at pure noise only, as by distribution matching; it is told `time`, or the last."""
        times = (schedule.t_max if time is None else time,)
        return cls(solver="few-step", steps=1, knows="pure noise", answers="endpoint", guidance="inside", times=times)

    @classmethod
    def consistency(cls, times: Sequence[float]) -> Sampler:
        """The sampler of a consistency model, which estimates x0 from every level; `times` are for sampling in several steps."""
        return cls(solver="few-step", steps=1, answers="endpoint", guidance="inside", times=tuple(times))

    @classmethod
    def renoising(cls, times: Sequence[float], steps: int = 1) -> Sampler:
        """The sampler of a student that estimates x0 from its own times alone, as latent consistency models do."""
        own = tuple(times)
        return cls(solver="few-step", steps=steps, knows="own times", answers="endpoint", guidance="inside", times=own)

    @classmethod
    def walking(cls, solver: Solver, times: Sequence[float]) -> Sampler:
        """The sampler of a student that goes through all of its own times in order, as by progressive distillation."""
        return cls(solver=solver, steps=len(times), knows="own times", guidance="inside", times=tuple(times))

    @property
    def settings(self) -> Sampling:
        """The default sampling settings."""
        return Sampling(**self.model_dump(include=set(Sampling.model_fields)))

    def with_told(self, scale: float, learned: tuple[float, float] | None) -> Sampler:
        """The sampler of a network that is told the guidance scale, by default `scale`."""
        return self.model_copy(update={"guidance": "told", "told": learned, "guidance_scale": scale, "guidance_calls": 0})

    def telling(self, condition: Condition, scale: float | Tensor | None = None) -> Condition:
        """The condition with the guidance scale, one or (B,), which a told student's network takes as a part of it; default its own."""
        if self.guidance != "told":
            return condition
        like = next(iter(condition.parts.values()))
        scale = self.guidance_scale if scale is None else scale
        return condition.plus(GUIDANCE_SCALE, torch.as_tensor(scale, dtype=torch.float32, device=like.device).expand(len(like)))

    @property
    def dial(self) -> str:
        """The guidance scale in words, with the range that a told student has learned."""
        return f"{self.guidance_scale:g}{f' ({self.told[0]:g} to {self.told[1]:g} learned)' if self.told else ''}"

    @property
    def teaches(self) -> bool:
        """Whether it can be a teacher: it estimates the mean at every level."""
        return self.knows == "every level" and self.answers == "mean"

    @property
    def edits(self) -> bool:
        """Whether it estimates x0 from every level, as edits and `--times` need."""
        return self.knows == "every level" and self.answers == "endpoint"

    @property
    def coherent(self) -> bool:
        """Whether its parts fit: a teacher has no times of its own; a student has them, and a solver and steps that go with its answers."""
        if not self.times:
            return self.teaches and self.guidance == "outside"
        few, own = SOLVERS[self.solver].few, len(self.times)
        fits = few and (self.edits or self.steps <= own) if self.answers == "endpoint" else not few and self.steps == own
        low, high = self.told or (1.0, self.guidance_scale)
        scaled = low <= self.guidance_scale <= high if self.guidance == "told" else self.told is None
        combined = (self.guidance_calls > 0) == (self.guidance != "told")
        return fits and self.guidance != "outside" and scaled and combined and not self.teaches

    def times_for(self, schedule: NoiseSchedule, solver: str, steps: int) -> Tensor:
        """(steps,) decreasing times for a solver. Raises UsageError if a student cannot take so many steps."""
        own = torch.tensor(self.times, dtype=torch.float64)
        if not self.times:
            return SOLVERS[solver].times(schedule, steps)
        if self.answers == "mean":
            if steps != len(own):
                raise UsageError(f"--steps {steps}: this student takes {len(own)} steps, no more and no fewer", "leave --steps out")
            return own
        if not self.edits:
            if steps > len(own):
                made = f"--steps {steps}: the student was made for at most {len(own)}"
                raise UsageError(made, "fewer steps; consistency students of EDM teachers take more")
            return own[[k * len(own) // steps for k in range(steps)]]
        if steps <= len(own):
            return own[:steps]
        if steps > schedule.grid:
            raise UsageError(f"--steps {steps}: this consistency student takes 1 to {schedule.grid}")
        return torch.tensor(parse("even", schedule, steps), dtype=torch.float64)

    def with_times(self, times: Sequence[float]) -> Sampler:
        """The same sampler with other times; it then takes as many steps by default."""
        return self.model_copy(update={"times": tuple(times), "steps": len(times)})

    def asked(self, schedule: NoiseSchedule, solver: str | None, steps: int | None, scale: float | None, calls: Literal[1, 2]) -> Sampling:
        """The sampling settings for a user's options. Raises UsageError if the model cannot be sampled that way."""
        if self.times and solver not in (None, self.solver):
            raise UsageError(f"--solver {solver}: a student is sampled by {self.solver} alone", "leave --solver out")
        if self.guidance == "inside" and scale not in (None, 1):
            raise UsageError(f"--guidance-scale {scale}: a student's guidance is built in", "leave --guidance-scale out")
        if self.told and scale is not None and not self.told[0] <= scale <= self.told[1]:
            raise UsageError(f"--guidance-scale {scale:g}: this student has learned scales from {self.told[0]:g} to {self.told[1]:g}")
        if self.guidance != "outside" and calls != 1:
            raise UsageError(f"guidance_calls {calls}: a student is called once a step", "leave it out")
        name = solver or self.solver
        usual = self.steps if name == self.solver else 1 if SOLVERS[name].few else schedule.usual_steps
        scale = self.guidance_scale if scale is None else scale
        combined: Literal[0, 1, 2] = 0 if self.guidance == "told" else calls
        out = Sampling(solver=name, steps=steps or usual, guidance_scale=scale, guidance_calls=combined)
        if scale < 1:
            raise UsageError(f"--guidance-scale {scale:g}: below 1 it leads away from the condition", "1 is without guidance")
        chosen = SOLVERS[name]
        if chosen.table and schedule.bins is None:
            raise UsageError(f"--solver {name}: for models with a table of times, such as Stable Diffusion's", "use heun or dpm++")
        if chosen.whole and schedule.points and out.steps >= schedule.points:
            raise UsageError(f"--steps {out.steps}: {name} takes whole times of {schedule.points}", "a few dozen steps are plenty")
        if SOLVERS[name].signal and not schedule.signal:
            raise UsageError(f"--solver {name}: the model's schedule ends without signal (zero terminal SNR)", "use --solver ddim")
        self.times_for(schedule, name, out.steps)
        return out

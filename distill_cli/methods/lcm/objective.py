"""Latent consistency distillation (Luo et al. 2310.04378): a consistency model whose guided teacher takes long DDIM steps.

One step of the teacher's DDIM goes from one time of a short grid to the next, so it skips the times between. The teacher's guidance
scale is fixed, and goes into the student; or each image has its own, drawn from a range, which the student is told.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from distill_cli.data import Images
from distill_cli.diffusion import consistency as maths
from distill_cli.diffusion.condition import GUIDANCE_SCALE, Condition
from distill_cli.diffusion.guidance import scales
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import NoiseSchedule
from distill_cli.diffusion.solvers import ddim_step
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.methods.cm.objective import Following, opened
from distill_cli.methods.lcm.config import LCMConfig
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler, Sampling
from distill_cli.pairs.store import PairStore
from distill_cli.runs import Run
from distill_cli.training.objective import Call


class LCM(Following):
    """The objective."""

    config: LCMConfig

    def __init__(self, config: LCMConfig, teacher: Model, data: Images | PairStore) -> None:
        super().__init__(config, teacher, data)
        self.hold(teacher)
        self.guidance = self.sampling().guidance_scale

    def grid(self, schedule: NoiseSchedule) -> tuple[NoiseSchedule, Sampler]:
        count = self.config.original_steps
        if schedule.bins is not None and schedule.bins % count:
            uneven = f"original_steps {count}: does not divide the {schedule.bins} times of {self.config.teacher}"
            raise UsageError(f"{uneven}, so LCMScheduler would take others", "original_steps=50")
        schedule, sampler = super().grid(schedule)
        sampler, learned = sampler.model_copy(update={"steps": self.config.student_steps}), self.config.guidance_range
        return schedule, sampler.with_told(self.sampling().guidance_scale, learned) if learned else sampler

    def sampling(self) -> Sampling:
        """As the teacher is sampled in the comparison: at the student's default scale."""
        assert self.teacher is not None
        return self.teacher.taught_by(self.config.guidance_scale, self.config.guidance_range)

    def decay(self, step: int) -> float:
        return self.config.target_decay

    def prepare(self, where: torch.device, run: Run) -> None:
        super().prepare(where, run)
        assert self.teacher is not None
        self.real = self.teacher.guided(self.sampling(), told=self.config.guidance_range is not None)

    def asked(self) -> list[Call]:
        combines = self.config.guidance_range or self.sampling().combines
        return [Call("teacher", self.config.batch_size * (2 if combines else 1)), *super().asked()]

    def told(self, condition: Condition, draws: Draws) -> Condition:
        if self.config.guidance_range is None:
            return condition
        return condition.plus(GUIDANCE_SCALE, sent(scales(self.config.guidance_range, draws), self.device))

    def times(self, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        intervals = self.config.original_steps
        return maths.neighbours(self.schedule, (draws.uniform("time") * intervals).long(), intervals)

    def nearer(self, x: Tensor, noise: Tensor, noisy: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """By one DDIM step of the guided teacher (section 4.3)."""
        return ddim_step(self.schedule, noisy, self.real(noisy, t, condition), t, r)


lcm = partial(opened, LCM)

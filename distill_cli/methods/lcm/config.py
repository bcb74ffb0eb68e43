"""Options of `distill cm --method lcm`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill_cli.config import GuidesConfig
from distill_cli.config.base import Fraction, Momentum, Name, Positive, Range, Rate, outside
from distill_cli.config.training import OPTIMIZERS, Optimizer
from distill_cli.methods.cm.config import CMConfig, Scales


class LCMConfig(CMConfig, GuidesConfig):
    """Latent consistency distillation (Luo et al. 2310.04378): guided DDIM steps of the teacher, which skip times of its schedule."""

    method: Literal["lcm"] = Field("lcm", description="latent consistency distillation")
    teacher: Name = Field("shapes", description="the model to distil: a name of `distill models ls`, a folder or a hub id")
    lr: Rate = Field(8e-6, description="learning rate")
    optimizer: Optimizer = Field("adamw", description=OPTIMIZERS)
    label_dropout: Fraction = Field(0.0, description="share of labels or captions replaced by the null one")
    original_steps: Scales = Field(
        50,
        description="times of the student's grid, from one to the next of which the teacher steps; LCMScheduler's original_inference_steps",
    )
    target_decay: Momentum = Field(0.95, description="decay of the target's average at each step")
    guidance_range: Range | None = Field(
        None, description="LOW,HIGH: guidance scales of the teacher, one drawn for each image and told to the student; default one scale"
    )
    guidance_scale: Rate | None = Field(
        None, description="the teacher's guidance scale, which goes into the student; with guidance_range the student's own default"
    )
    student_steps: Positive = Field(4, description="steps by which the student is sampled, unless asked otherwise")

    @property
    def grid(self) -> int:
        return self.original_steps + 1

    def wrong(self) -> dict[str, bool]:
        return (
            super().wrong()
            | outside(self.guidance_range, self.guidance_scale)
            | {
                f"student_steps {self.student_steps}: the grid has {self.original_steps} times": self.student_steps > self.original_steps,
            }
        )

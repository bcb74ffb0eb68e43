"""Options of `distill pd`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill_cli.config import TrainingConfig
from distill_cli.config.base import Fraction, Name, Numbers, Positive, Rate


class PDConfig(TrainingConfig):
    """distill pd: progressive distillation (Salimans & Ho 2202.00512)"""

    teacher: Name = Field("digits", description="a name of `distill models ls`, a folder, or a hub id")
    data: Name | None = Field(
        None, description="what noise is added to: a built-in set, a folder of images or of `distill pairs`; default the teacher's own set"
    )
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder of images needs it")
    flip: bool = Field(False, description="mirror images at random")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the images that are never trained on")
    variants: Positive = Field(1, description="latents of images: random versions of each, encoded once")
    first_steps: Positive = Field(32, description="DDIM steps of the teacher, halved in each round")
    last_steps: Positive = Field(4, description="steps of the student of the last round")
    shares: Annotated[list[Rate], Numbers] | None = Field(
        None, description="how the steps are shared by the rounds, a number for each; default all alike"
    )
    spacing: Literal["angle", "schedule"] | None = Field(
        None, description="times even in arctan(sigma / alpha), or the schedule's own; default schedule over a table of times, else angle"
    )
    loss: Literal["truncated-snr", "snr+1", "huber"] = Field(
        "truncated-snr", description="squared error of x0 with the paper's weights, or pseudo-Huber's distance, all times alike"
    )
    guidance_scale: Rate | None = Field(None, description="of the teacher, which goes into the student; default the teacher's own")
    label_dropout: Fraction = Field(0.1, description="share of labels replaced by the null class; 0 of a guided teacher")
    lr_schedule: Literal["constant", "cosine"] = Field("cosine", description="after the warm-up, in each round")

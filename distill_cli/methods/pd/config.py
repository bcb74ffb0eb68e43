"""Options of `distill pd`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_cli.config import GuidesConfig, StudentConfig
from distill_cli.config.base import Fraction, Name, Numbers, Positive, Range, Rate, check_range


class PDConfig(StudentConfig, GuidesConfig):
    """distill pd: progressive distillation (Salimans & Ho 2202.00512)"""

    teacher: Name = Field("digits", description="a name of `distill models ls`, a folder, or a hub id")
    data: Name | None = Field(
        None,
        description="images to which noise is added: a built-in set, or a folder of images or `distill pairs`; default the teacher's set",
    )
    resolution: Positive | None = Field(None, description="width of the images in pixels; default the set's own; image folders need it")
    flip: bool = Field(False, description="mirror images at random")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the images that are never trained on")
    variants: Positive = Field(1, description="for a latent teacher: random versions of each image, encoded once")
    first_steps: Positive = Field(32, description="DDIM steps of the teacher, halved in each round")
    last_steps: Positive = Field(4, description="steps of the student of the last round")
    shares: Annotated[list[Rate], Numbers] | None = Field(
        None, description="share of the steps that each round gets, a number for each round; default equal shares"
    )
    spacing: Literal["angle", "schedule"] | None = Field(
        None, description="angle: times even in arctan(sigma / alpha); schedule: its own; default schedule for a table of times, else angle"
    )
    loss: Literal["truncated-snr", "snr+1", "huber"] = Field(
        "truncated-snr",
        description="truncated-snr, snr+1: squared error of x0, weighted as in the paper; huber: pseudo-Huber distance, unweighted",
    )
    guidance_scale: Rate | None = Field(
        None, description="guidance scale of the teacher, which the first student learns; default the teacher's own"
    )
    guidance_range: Range | None = Field(
        None, description="LOW,HIGH: guidance scales of the teacher, each image's own, told to the students: a dial; default one scale"
    )
    label_dropout: Fraction = Field(0.1, description="share of labels replaced by the null class; a guided teacher needs 0")
    lr_schedule: Literal["constant", "cosine"] = Field("cosine", description="learning rate after the warm-up, in each round")

    @model_validator(mode="after")
    def _consistent(self) -> PDConfig:
        check_range(self.guidance_range, self.guidance_scale)
        return self

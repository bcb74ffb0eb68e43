"""Options of `distill classifier`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill_cli.config import TrainingConfig
from distill_cli.config.base import Name, Positive


class ClassifierConfig(TrainingConfig):
    """distill classifier"""

    data: Name = Field("digits", description="a built-in set, or a folder of images whose subfolders are classes")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    width: Annotated[int, Field(gt=0, multiple_of=8)] = Field(64, description="channels, and features")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="share of the images that are never trained on, for the accuracy")
    sample_every: Literal[0] = Field(0, description="a classifier makes no images")

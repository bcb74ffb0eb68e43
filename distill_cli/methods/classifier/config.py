"""Options of `distill classifier`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_cli.config import TrainingConfig
from distill_cli.config.base import Name, Positive


class ClassifierConfig(TrainingConfig):
    """distill classifier"""

    data: Name = Field("digits", description="a built-in set, or a folder of images whose subfolders are classes")
    resolution: Positive | None = Field(None, description="image width in pixels; a folder needs it, a built-in set has its own")
    flip: bool = Field(False, description="mirror images at random")
    width: Annotated[int, Field(gt=0, multiple_of=8)] = Field(64, description="channels of the network, and number of features")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="share of the images held out to measure the accuracy")
    noisy: bool = Field(False, description="classify noised data, for classifier guidance: of a model, on its schedule")
    model: Name = Field("digits", description="noisy: the model whose data, pixels or latents, and noise schedule the classifier learns")
    sample_every: Literal[0] = Field(0, description="always 0: a classifier makes no images")

    @model_validator(mode="after")
    def _of_noise(self) -> ClassifierConfig:
        if not self.noisy and self.changed("model"):
            raise ValueError("model is for noisy=true: a classifier of clean pictures is of no model")
        return self

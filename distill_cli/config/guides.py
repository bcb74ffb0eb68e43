"""Options of what leads a teacher besides its own condition."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distill_cli.config.base import Config, Count, Name, Rate


class GuidesConfig(Config):
    """Shared by the commands that sample a teacher, and by the methods that learn from one."""

    classifier_guidance: Name | None = Field(
        None, description="a classifier of `distill classifier --noisy` whose gradient leads the teacher: built in, a folder or a run"
    )
    classifier_scale: Rate = Field(1.0, description="classifier_guidance: factor of the gradient; 1 is Bayes' rule, more is bolder")
    clip_guidance: Name | None = Field(
        None, description="a CLIP model by whose similarity to the prompts the teacher is led: built in, a folder, a run, or a hub id"
    )
    clip_scale: Rate | None = Field(
        None, description="clip_guidance: factor of the gradient; default 300 of a cosine, 8 of a model of noised data"
    )
    clip_through: Literal["network", "estimate"] = Field(
        "estimate", description="clip_guidance: the gradient by the estimate, scaled as for normal data; or through the denoiser too"
    )
    clip_cutouts: Count = Field(
        0, description="clip_guidance: parts of a picture that CLIP sees, at least of its size; 0: the whole picture"
    )

    @model_validator(mode="after")
    def _of_guides(self) -> GuidesConfig:
        if self.classifier_guidance is None and self.changed("classifier_scale"):
            raise ValueError("classifier_scale needs classifier_guidance")
        if self.clip_guidance is None and (given := self.changed("clip_scale", "clip_through", "clip_cutouts")):
            raise ValueError(f"{given[0]} needs clip_guidance")
        return self

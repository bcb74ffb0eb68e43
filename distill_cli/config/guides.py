"""Options of what leads a teacher besides its own condition."""

from __future__ import annotations

from pydantic import Field, model_validator

from distill_cli.config.base import Config, Name, Rate


class GuidesConfig(Config):
    """Shared by the commands that sample a teacher, and by the methods that learn from one."""

    classifier_guidance: Name | None = Field(
        None, description="a classifier of `distill classifier --noisy` whose gradient leads the teacher: built in, a folder or a run"
    )
    classifier_scale: Rate = Field(1.0, description="classifier_guidance: factor of the gradient; 1 is Bayes' rule, more is bolder")

    @model_validator(mode="after")
    def _of_guides(self) -> GuidesConfig:
        if self.classifier_guidance is None and self.changed("classifier_scale"):
            raise ValueError("classifier_scale needs classifier_guidance")
        return self

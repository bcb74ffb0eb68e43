"""Options of `distill train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill_cli.config import NetworkConfig, TextConfig, TrainingConfig
from distill_cli.config.base import Fraction, Name, Place, Positive, Rate

_TABLE, _NORMAL = ("p_mean", "p_std", "shift"), ("beta_schedule",)
UNUSED = {"edm": (*_NORMAL, "shift"), "eps": _TABLE, "v": _TABLE, "flow": _NORMAL}
"""Options that a prediction has no use for."""


class TrainConfig(TrainingConfig):
    """distill train"""

    data: Name = Field("digits", description="a built-in set, or a folder of images (its subfolders are the classes)")
    resolution: Positive | None = Field(None, description="image width in pixels; a folder needs it, a built-in set has its own")
    flip: bool = Field(False, description="mirror images at random")
    prediction: Literal["edm", "eps", "v", "flow"] = Field(
        "edm", description="edm: log-normal sigma; eps (noise), v (velocity): DDPM's table; flow: flow matching"
    )
    p_mean: float = Field(-1.2, description="edm: mean of ln sigma in training; flow: of the logit of t, by default 0")
    p_std: Rate = Field(1.2, description="edm: standard deviation of ln sigma in training; flow: of the logit of t, by default 1")
    shift: Annotated[float, Field(gt=0)] = Field(1.0, description="flow: shift of the times towards the noise")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field("linear", description="eps, v: schedule of 1000 betas")
    label_dropout: Fraction = Field(0.1, description="share of labels or captions replaced by the null one, which guidance needs")
    vae: Place | None = Field(None, description="an autoencoder of `distill vae`: trains a text-to-image teacher on its latents")
    variants: Positive = Field(32, description="vae: random versions of each picture that are encoded, once")
    guidance_scale: Rate = Field(3.0, description="vae: guidance scale that the teacher is sampled with by default")
    text: TextConfig = Field(TextConfig(), description="vae: the text encoder, trained along with the teacher")
    network: NetworkConfig = NetworkConfig()

    @model_validator(mode="before")
    @classmethod
    def _logit_normal(cls, data: Any) -> Any:
        """Flow matching's times are logit-normal with mean 0 and standard deviation 1 (Esser et al. 2403.03206) unless others are given."""
        return {"p_mean": 0.0, "p_std": 1.0, **data} if isinstance(data, dict) and data.get("prediction") == "flow" else data

    @model_validator(mode="after")
    def _of_latents(self) -> TrainConfig:
        if self.vae is not None and self.prediction == "edm":
            raise ValueError("prediction edm is for pixels: latents need eps, v or flow")
        if self.vae is None and (given := self.changed("variants", "guidance_scale", "text")):
            raise ValueError(f"{given[0]} needs vae: the autoencoder of a text-to-image teacher")
        if given := self.changed(*UNUSED[self.prediction]):
            raise ValueError(f"{given[0]} is not used with prediction {self.prediction}")
        return self

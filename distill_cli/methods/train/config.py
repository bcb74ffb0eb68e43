"""Options of `distill train`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distill_cli.config import NetworkConfig, TextConfig, TrainingConfig
from distill_cli.config.base import Fraction, Name, Place, Positive, Rate


class TrainConfig(TrainingConfig):
    """distill train"""

    data: Name = Field("digits", description="a built-in set or a folder of images (subfolders are classes)")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    prediction: Literal["edm", "eps", "v"] = Field("edm", description="edm: preconditioned, ln sigma normal; eps, v: DDPM's table")
    p_mean: float = Field(-1.2, description="edm: mean of ln sigma")
    p_std: Rate = Field(1.2, description="edm: standard deviation of ln sigma")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field("linear", description="eps, v: betas over 1000 times")
    label_dropout: Fraction = Field(0.1, description="share of labels or captions replaced by the null one, so that guidance works")
    vae: Place | None = Field(None, description="a folder of `distill vae`: then a text-to-image teacher; data needs captions")
    variants: Positive = Field(32, description="vae: random versions of each picture, encoded once")
    guidance_scale: Rate = Field(3.0, description="vae: what the teacher is sampled with")
    text: TextConfig = Field(TextConfig(), description="vae: the text encoder, trained with it")
    network: NetworkConfig = NetworkConfig()

    @model_validator(mode="after")
    def _of_latents(self) -> TrainConfig:
        if self.vae is not None and self.prediction == "edm":
            raise ValueError("prediction edm is for pixels: latents need eps or v")
        given = [key for key in ("variants", "guidance_scale", "text") if getattr(self, key) != type(self).model_fields[key].default]
        if self.vae is None and given:
            raise ValueError(f"{given[0]} needs vae: the autoencoder of a text-to-image teacher")
        of_others = ("beta_schedule",) if self.prediction == "edm" else ("p_mean", "p_std")
        for key in of_others:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is not used with prediction {self.prediction}")
        return self

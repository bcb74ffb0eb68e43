"""Options of `distill clip`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distill_cli.config import CLIPNetworkConfig, TextConfig, TrainingConfig
from distill_cli.config.base import Fraction, Name, Positive, Weight


class CLIPConfig(TrainingConfig):
    """distill clip"""

    data: Name = Field("shapes", description="a built-in set with captions")
    resolution: Positive | None = Field(None, description="image width in pixels; a built-in set has its own")
    flip: bool = Field(False, description="mirror images at random")
    captions: Positive = Field(
        256, description="captions among which that of a picture is to be found: those of a step's pictures and more"
    )
    shift: Fraction = Field(0.05, description="pictures are moved by up to this share of their width, in each direction")
    zoom: Fraction = Field(0.05, description="pictures are enlarged or made smaller by up to this share")
    noise: Weight = Field(0.5, description="largest standard deviation of the noise on a picture, whose values are -1 to 1")
    noisy: bool = Field(False, description="see noised data in the place of pictures, for guidance: of a model, on its schedule")
    model: Name = Field("shapes", description="noisy: the model whose data, pixels or latents, and noise schedule are learned")
    versions: Positive = Field(8, description="noisy: random versions of each picture, encoded once for a latent model")
    sample_every: Literal[0] = Field(0, description="always 0: a CLIP model makes no images")
    network: CLIPNetworkConfig = CLIPNetworkConfig()
    text: TextConfig = TextConfig()

    @model_validator(mode="after")
    def _of_noise(self) -> CLIPConfig:
        for key in self.changed(*(("shift", "zoom", "noise") if self.noisy else ("model", "versions"))):
            raise ValueError(f"{key} is for noisy={'false' if self.noisy else 'true'}")
        return self

"""Options of `distill vae`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill_cli.config import TrainingConfig, VAENetworkConfig
from distill_cli.config.base import Name, Positive, Weight


class VAEConfig(TrainingConfig):
    """distill vae"""

    data: Name = Field("shapes", description="a built-in set or a folder of images")
    resolution: Positive | None = Field(None, description="image width in pixels; a folder needs it, a built-in set has its own")
    flip: bool = Field(False, description="mirror images at random")
    kl_weight: Weight = Field(1e-4, description="weight of the latents' KL divergence from a standard normal, a mean over their values")
    sample_every: Literal[0] = Field(0, description="always 0: an autoencoder makes no images from noise")
    network: VAENetworkConfig = VAENetworkConfig()

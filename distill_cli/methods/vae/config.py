"""Options of `distill vae`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill_cli.config import TrainingConfig, VAENetworkConfig
from distill_cli.config.base import Name, Positive, Weight


class VAEConfig(TrainingConfig):
    """distill vae"""

    data: Name = Field("shapes", description="a built-in set or a folder of images")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    kl_weight: Weight = Field(1e-4, description="of the latents' divergence from a standard normal, a mean over their values")
    sample_every: Literal[0] = Field(0, description="an autoencoder makes no images of its own")
    network: VAENetworkConfig = VAENetworkConfig()

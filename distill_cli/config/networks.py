"""Options of networks that are trained from nothing."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill_cli.config.base import Fraction, Numbers, Positive


class NetworkConfig(BaseModel):
    """diffusers' UNet2DModel, as far as people change it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Annotated[list[Positive], Numbers] = Field([32, 64, 64], min_length=1, description="of each resolution, from the finest")
    attention: Annotated[list[bool], Numbers] = Field([False, True, False], description="self-attention at each resolution")
    layers: Positive = Field(1, description="residual blocks a resolution")
    groups: Positive = Field(16, description="of group normalisation")
    head: Positive = Field(32, description="channels of an attention head")
    dropout: Fraction = Field(0.0, description="during training; off everywhere else")

    @model_validator(mode="after")
    def _lengths(self) -> NetworkConfig:
        if len(self.channels) != len(self.attention):
            raise ValueError(f"{len(self.channels)} channels but {len(self.attention)} attention")
        for width in self.channels:
            if width % self.groups:
                raise ValueError(f"channels {width} is not a multiple of groups {self.groups}")
        for width, attends in zip(self.channels, [*self.attention[:-1], True]):  # the middle of the network always attends
            if attends and width % self.head:
                raise ValueError(f"channels {width} with attention is not a multiple of head {self.head}")
        return self


class VAENetworkConfig(BaseModel):
    """diffusers' AutoencoderKL, as far as people change it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Annotated[list[Positive], Numbers] = Field([16, 32, 64, 64], min_length=1, description="of each resolution, from the finest")
    latent_channels: Positive = Field(4, description="of the latents")
    layers: Positive = Field(1, description="residual blocks a resolution")
    groups: Positive = Field(8, description="of group normalisation")

    @model_validator(mode="after")
    def _groups(self) -> VAENetworkConfig:
        for width in self.channels:
            if width % self.groups:
                raise ValueError(f"channels {width} is not a multiple of groups {self.groups}")
        return self


class TextConfig(BaseModel):
    """The text encoder of a text-to-image teacher: transformers' CLIPTextModel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: Positive = Field(96, description="channels of an embedding")
    layers: Positive = Field(2, description="of the transformer")
    heads: Positive = Field(4, description="of its attention")
    length: Annotated[int, Field(ge=3)] = Field(16, description="tokens of a caption, start and end among them")

    @model_validator(mode="after")
    def _even(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

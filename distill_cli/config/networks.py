"""Options of networks that are trained from scratch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill_cli.config.base import Fraction, Numbers, Positive, numbers

Channels = Annotated[list[Positive], Numbers]


def usual_attention(levels: int) -> list[bool]:
    """Whether each of `levels` resolutions has attention, unless one says: the second has."""
    return [level == 1 for level in range(levels)]


class NetworkConfig(BaseModel):
    """A UNet2DModel of diffusers: the options that people change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Channels = Field([32, 64, 64], min_length=1, description="channels at each resolution, finest first")
    attention: Annotated[list[bool], Numbers] = Field(
        [False, True, False], description="self-attention at each resolution, finest first; default at the second alone"
    )
    layers: Positive = Field(1, description="residual blocks at each resolution")
    groups: Positive = Field(16, description="groups of the group normalisation")
    head: Positive = Field(32, description="channels in an attention head")
    dropout: Fraction = Field(0.0, description="dropout during training; off everywhere else")

    @model_validator(mode="before")
    @classmethod
    def _attention(cls, data: Any) -> Any:
        channels = numbers(data["channels"]) if isinstance(data, dict) and "channels" in data else None
        return {"attention": usual_attention(len(channels)), **data} if isinstance(channels, list) else data

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
    """An AutoencoderKL of diffusers: the options that people change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Channels = Field([16, 32, 64, 64], min_length=1, description="channels at each resolution, finest first")
    latent_channels: Positive = Field(4, description="channels of a latent")
    layers: Positive = Field(1, description="residual blocks at each resolution")
    groups: Positive = Field(8, description="groups of the group normalisation")

    @model_validator(mode="after")
    def _groups(self) -> VAENetworkConfig:
        for width in self.channels:
            if width % self.groups:
                raise ValueError(f"channels {width} is not a multiple of groups {self.groups}")
        return self


class CLIPNetworkConfig(BaseModel):
    """The picture half of a CLIP model: transformers' CLIPVisionModel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: Positive = Field(128, description="channels of a patch's embedding")
    layers: Positive = Field(4, description="transformer layers")
    heads: Positive = Field(4, description="attention heads")
    patch: Positive = Field(8, description="pixels of a patch's side")
    features: Positive = Field(128, description="numbers in the embedding of a picture or a text")

    @model_validator(mode="after")
    def _even(self) -> CLIPNetworkConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class TextConfig(BaseModel):
    """The text encoder of a text-to-image teacher: transformers' CLIPTextModel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: Positive = Field(96, description="channels of a token's embedding")
    layers: Positive = Field(2, description="transformer layers")
    heads: Positive = Field(4, description="attention heads")
    length: Annotated[int, Field(ge=3)] = Field(16, description="tokens of a caption, including start and end")

    @model_validator(mode="after")
    def _even(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

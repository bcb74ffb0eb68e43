"""New models of points of the plane: a multilayer perceptron, and the codec of data that have no range."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from distill_cli.config import NetworkConfig
from distill_cli.config.networks import usual_attention
from distill_cli.data import Images
from distill_cli.data.points import POINTS
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.schedule import NoiseSchedule
from distill_cli.errors import DistillError
from distill_cli.models.backbones import Backbone, TimeFeatures
from distill_cli.models.codec import Codec
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.pixel import of_classes

FREQUENCIES = 64
"""Sines and cosines of the time, together."""


class Block(nn.Module):
    """A residual block: two layers, of which the embedding of time and class scales and shifts the first one's output."""

    def __init__(self, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(embedding, 2 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(embedding)).chunk(2, 1)
        return h + self.second(self.dropout(F.silu(self.first(F.silu(h)) * (1 + scale) + shift)))


class PlaneMLP(ModelMixin, ConfigMixin):
    """`network(x, time, class_labels=labels)` for points x (B, 2, 1, 1), time (B,) and labels (B,), if it knows any."""

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (128, 128, 128),
        layers_per_block: int = 1,
        num_class_embeds: int | None = None,
        dropout: float = 0.0,
        in_channels: int = 2,
        sample_size: int = 1,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        embedding = 2 * max(widths)
        self.time = nn.Sequential(TimeFeatures(FREQUENCIES, True, 0), nn.Linear(FREQUENCIES, embedding), nn.SiLU())
        self.time_out = nn.Linear(embedding, embedding)
        self.class_embedding = nn.Embedding(num_class_embeds, embedding) if num_class_embeds else None
        self.first = nn.Linear(in_channels, widths[0])
        self.entries = nn.ModuleList(nn.Linear(before, after) for before, after in zip([widths[0], *widths], widths, strict=False))
        self.blocks = nn.ModuleList(nn.ModuleList(Block(width, embedding, dropout) for _ in range(layers_per_block)) for width in widths)
        self.exit = nn.Linear(widths[-1], in_channels)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = False) -> tuple[Tensor]:
        embedding = self.time_out(self.time(timestep))
        if self.class_embedding is not None:
            assert class_labels is not None
            embedding = embedding + self.class_embedding(class_labels)
        h = (sample.flatten(1)[:, None] * self.first.weight).sum(2) + self.first.bias  # autocast would round the coordinates
        levels: Any = zip(self.entries, self.blocks, strict=True)
        for entry, blocks in levels:
            h = entry(h)
            for block in blocks:
                h = block(h, embedding)
        return (self.exit(F.silu(h)).view_as(sample),)


class Plane(Backbone):
    """The adapter of a PlaneMLP."""

    part = "mlp"
    blocks = ("Block",)
    lora = ("first", "second", "modulation")
    multiple = 1

    def middle(self) -> tuple[nn.Module, int]:
        """The last block of the network's first half."""
        blocks = [(block, width) for level, width in zip(self.net.blocks, self.net.config.block_out_channels) for block in level]
        return blocks[(len(blocks) - 1) // 2]

    def features(self, answer: Any, x: Tensor, condition: Condition) -> Tensor:
        return answer[:, None]


class PlaneCodec(Codec):
    """The identity on points, which have no range."""

    kind = POINTS

    def decode(self, x: Tensor) -> Tensor:
        return x

    def project(self, x: Tensor) -> Tensor:
        """Any point is valid."""
        return x

    def check(self, shape: tuple[int, int, int], where: str) -> None:
        if shape != (2, 1, 1):
            raise DistillError(f"{where}: points of shape {shape}", "(2, 1, 1) is read")

    def sized(self, pixels: int, shape: tuple[int, int, int], multiple: int, most: float = math.inf) -> None:
        self.kind.needs_pictures(f"resolution {pixels}")


def new(images: Images, network: NetworkConfig, schedule: NoiseSchedule, parameterisation: str, lineage: Lineage, seed: int) -> Model:
    """An untrained model of points like those of a set: `channels` are the widths of its layers, with `layers` blocks at each.

    Raises UsageError for options that only networks of pictures have.
    """
    usual: dict[str, Any] = {key: NetworkConfig.model_fields[key].default for key in ("groups", "head")}
    usual["attention"] = usual_attention(len(network.channels))
    if given := [key for key, value in usual.items() if getattr(network, key) != value]:
        images.kind.needs_pictures(f"network.{given[0]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlp = PlaneMLP(  # by keywords: diffusers takes what is given by position for a default
            block_out_channels=tuple(network.channels),
            layers_per_block=network.layers,
            num_class_embeds=len(images.classes) + 1 if images.classes else None,
            dropout=network.dropout,
        )
    return of_classes(Plane(mlp), list(images.classes), schedule, parameterisation, lineage, PlaneCodec())

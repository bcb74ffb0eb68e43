"""A procedural world with captions: one coloured shape on a plain background, 64x64 RGB.

"a large red circle at the top left of a white background": each combination of size, colour, shape, place and background has
one caption. Exact size, centre and colour are random by the picture's index. A tenth of the combinations is held back: captions
that no model trained here has seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_cli.data.kinds import PICTURES
from distill_cli.diffusion.noise import Draws, permutation

PIXELS = 64
SIZES = {"small": 10.0, "large": 18.0}
"""Radius r in pixels; varies by up to 8%."""
COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40),
    "purple": (140, 50, 180), "orange": (245, 130, 30), "cyan": (40, 200, 220), "black": (20, 20, 20),
}  # fmt: skip
"""RGB out of 255; each channel varies by up to 12."""
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {
    "in the centre": (32, 32), "at the top left": (20, 20), "at the top right": (44, 20),
    "at the bottom left": (20, 44), "at the bottom right": (44, 44),
}  # fmt: skip
"""Centres (x, y) in pixels; each coordinate varies by up to 2."""
BACKGROUNDS = {"white": (250, 250, 250), "grey": (150, 150, 150), "pink": (250, 180, 200)}
SIZE_OFF, PLACE_OFF, COLOUR_OFF = 0.08, 2.0, 12.0
HELD_BACK, HELD_BACK_SEED = 0.1, 0


@dataclass(frozen=True)
class Thing:
    """What a picture shows."""

    size: str
    colour: str
    shape: str
    place: str
    background: str

    @property
    def caption(self) -> str:
        """The caption of the picture."""
        return f"a {self.size} {self.colour} {self.shape} {self.place} of a {self.background} background"


THINGS = tuple(Thing(*each) for each in itertools.product(SIZES, COLOURS, SHAPES, PLACES, BACKGROUNDS))
"""All 960."""
_ORDER = permutation(HELD_BACK_SEED, 0, len(THINGS)).tolist()
_FIRST = round(HELD_BACK * len(THINGS))
HELD = tuple(THINGS[k] for k in sorted(_ORDER[:_FIRST]))
"""The 96 that are held back."""
TRAINED = tuple(THINGS[k] for k in sorted(_ORDER[_FIRST:]))


def distance(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels of points (x right, y down from the centre) from the outline; negative inside.

    Circle of radius r; square of half side 0.9 r; upright triangle of circumradius 1.15 r; cross of arms r long, 0.7 r wide.
    """
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * r
    if shape == "triangle":
        slanted = math.cos(math.pi / 6) * x.abs() - 0.5 * y
        return torch.maximum(y, slanted) - 1.15 * r / 2
    if shape == "cross":
        along, across = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(along - r, across - 0.35 * r)
    raise ValueError(f"shape {shape!r} is none of {', '.join(SHAPES)}")


def coverage(shape: str, centre: Tensor, r: Tensor) -> Tensor:
    """(64, 64) share of each pixel covered by a shape of radius r () around `centre` (x, y); pixel centres are at half-integers."""
    grid = torch.arange(PIXELS, dtype=torch.float64) + 0.5
    return (0.5 - distance(shape, grid[None, :] - centre[0], grid[:, None] - centre[1], r)).clamp(0, 1)


def render(thing: Thing, jitter: Tensor) -> Tensor:
    """(3, 64, 64) in [-1, 1]; the six `jitter` values in [0, 1) vary the radius, the centre's x and y, and three colour channels."""
    off = 2 * jitter - 1
    r = SIZES[thing.size] * (1 + SIZE_OFF * off[0])
    centre = torch.tensor(PLACES[thing.place], dtype=torch.float64) + PLACE_OFF * off[1:3]
    colour = (torch.tensor(COLOURS[thing.colour], dtype=torch.float64) + COLOUR_OFF * off[3:]).clamp(0, 255)
    background = torch.tensor(BACKGROUNDS[thing.background], dtype=torch.float64)
    inside = coverage(thing.shape, centre, r)
    return (torch.lerp(background[:, None, None], colour[:, None, None], inside) / 127.5 - 1).float()


class Shapes:
    """Pictures of the combinations for training, with captions and without classes."""

    kind = PICTURES
    classes: list[str] = []
    shape = (3, PIXELS, PIXELS)

    def __init__(self, things: Sequence[Thing] = TRAINED) -> None:
        self.things = things
        self.about = f"{len(things)} pictures with captions in shapes"

    def __len__(self) -> int:
        return len(self.things)

    def batch(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        jitter = torch.stack([draws.uniform("augment", turn) for turn in range(6)], 1)
        images = [render(self.things[position], row) for position, row in zip(positions, jitter, strict=True)]
        return torch.stack(images), torch.zeros(len(images), dtype=torch.long)

    def captions(self, positions: Sequence[int]) -> list[str]:
        return [self.things[position].caption for position in positions]

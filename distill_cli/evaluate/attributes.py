"""Measures of a picture and of what was asked for: CLIP score, the attributes of the world of shapes, and functions of one's own.

A judge is a function of pictures (B, H, W, 3) uint8 and of B texts, their prompts or the names of their classes. It returns scores (B,) by
name. JUDGES has the built-in ones; `module:function` names any other.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_cli import launch, processes
from distill_cli.data.pictures import to_uint8
from distill_cli.data.shapes import BACKGROUNDS, COLOURS, PIXELS, PLACES, SHAPES, SIZES, Thing, distance
from distill_cli.errors import DistillError, UsageError, nearest, reason
from distill_cli.evaluate.measures import share
from distill_cli.evaluate.page import SPREAD
from distill_cli.evaluate.report import Columns, Lowest
from distill_cli.evaluate.sources import Source

Judge = Callable[[np.ndarray, Sequence[str]], Mapping[str, Any]]
PART = 32
"""Pictures that a judge sees at a time."""
FAR = 60.0
"""A colour farther than this from all known ones is none of them; so is what differs less than this from the background no shape."""
OVERLAP, OFF = 0.8, 8.0
"""The least overlap of a shape with a known one, and the most pixels between its centre and a known place."""
ATTRIBUTES = ("size", "colour", "shape", "place", "background")
AREAS = {"circle": 3.1416, "square": 3.24, "triangle": 1.718, "cross": 2.31}
"""Areas of shapes of radius 1 (data/shapes.py, `distance`)."""


def _known(value: Tensor, known: Mapping[str, Sequence[float]], most: float) -> str:
    """The name of the nearest known value; '' if none is within `most`."""
    away = {name: torch.dist(value, torch.tensor(each, dtype=value.dtype)).item() for name, each in known.items()}
    name = min(away, key=lambda each: away[each])
    return name if away[name] <= most else ""


def seen_in(picture: Tensor) -> Thing:
    """What a picture (64, 64, 3) of 0 to 255 shows; '' for an attribute that is not recognised.

    The background is the median of the border, the object all that differs from it by at least half as much as its middle does. The
    shape is the known one that overlaps best with it, drawn around its centroid with its area.
    """
    border = torch.cat([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).median(0).values
    background = _known(border, BACKGROUNDS, FAR)
    off = (picture - border).norm(dim=2)
    if off.max() < FAR:
        return Thing("", "", "", "", background)
    inside = off > 0.5 * off[off > 0.5 * off.max()].median()
    grid, mass = torch.arange(PIXELS, dtype=picture.dtype) + 0.5, inside.to(picture.dtype)
    centre = torch.stack([mass.sum(0) @ grid, mass.sum(1) @ grid]) / mass.sum()
    down, across = torch.meshgrid(grid - centre[1], grid - centre[0], indexing="ij")
    radius = {shape: (inside.sum() / AREAS[shape]).sqrt() for shape in SHAPES}
    fits = {}
    for shape in SHAPES:
        other = distance(shape, across, down, radius[shape]) <= 0
        fits[shape] = ((inside & other).sum() / (inside | other).sum()).item()
    shape = max(fits, key=lambda each: fits[each])
    size = min(SIZES, key=lambda each: abs(torch.log(radius[shape] / SIZES[each]).item()))
    colour = _known(picture[off > 0.8 * off[inside].median()].median(0).values, COLOURS, FAR)
    return Thing(size, colour, shape if fits[shape] >= OVERLAP else "", _known(centre, PLACES, OFF), background)


def shapes(pictures: np.ndarray, asked: Sequence[str]) -> dict[str, Tensor]:
    """Whether pictures of the world of shapes have the size, colour, shape, place and background in their captions, and all five."""
    if pictures.shape[1:3] != (PIXELS, PIXELS):
        raise UsageError(f"attributes shapes: pictures of {PIXELS} pixels, not of {pictures.shape[2]}x{pictures.shape[1]}", "leave it out")
    right = []
    for picture, caption in zip(pictures, asked, strict=True):
        thing = seen_in(torch.from_numpy(picture.astype(np.float64)))
        right.append([bool(value := getattr(thing, name)) and value in caption for name in ATTRIBUTES])
    hits = torch.tensor(right)
    return {**{name: hits[:, k] for k, name in enumerate(ATTRIBUTES)}, "all attributes": hits.all(1)}


JUDGES: Mapping[str, Judge] = {"shapes": shapes}


def judge(name: str) -> Judge:
    """A built-in judge, or the function `module:function`, whose module may lie in the working directory."""
    if name in JUDGES:
        return JUDGES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise UsageError(f"attributes {name}: no built-in judge, and not like module:function", nearest(name, JUDGES, "built in"))
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of someone else's
        raise DistillError(
            f"attributes {name}: cannot be imported ({reason(error)})", "a module here or installed: module:function"
        ) from error


def columns(scores: Mapping[str, Any]) -> Columns:
    """The columns of judges' scores."""
    return {name: (name.replace(" ", "_"), ".3f") for name in scores}


def judged(
    names: Sequence[str], source: Source, asked: Callable[[int], str], where: torch.device
) -> tuple[dict[str, float | None], Columns, list[Lowest]]:
    """The mean of every score over all pictures of a source, with its standard error; the columns; and each judge's last score by picture.

    `asked` gives the text of a picture by its position. Processes share the work.
    """
    if not names:
        return {}, {}, []
    ranges = [range(first, min(len(source), first + PART)) for first in range(0, len(source), PART)]
    found = []
    for k in processes.mine(len(ranges)):
        pictures, texts = to_uint8(source.batch(ranges[k])), [asked(i) for i in ranges[k]]
        scores: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for name in names:
            for title, values in judge(name)(pictures, texts).items():
                scores[name][title] = torch.as_tensor(values).double()
                if scores[name][title].shape != (len(texts),):
                    said = f"attributes {name}: {title} has shape {tuple(scores[name][title].shape)}"
                    raise DistillError(said, f"a judge returns one number for each picture: ({len(texts)},)")
        found.append((k, scores))
    parts = [scores for _, scores in sorted(launch.all_of(found, where), key=lambda each: each[0])]
    of = {name: {title: torch.cat([part[name][title] for part in parts]) for title in parts[0][name]} for name in names}
    whole = {title: values for scores in of.values() for title, values in scores.items()}
    out: dict[str, float | None] = {}
    for title, (key, _) in columns(whole).items():
        out[key], out[key + SPREAD] = share(whole[title])
    return out, columns(whole), [list(scores.items())[-1] for scores in of.values() if scores]

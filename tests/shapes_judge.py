"""The outside judge of the world of shapes: segments by colour, measures shape, place and size, and knows no network.

    python -m tests.shapes_judge FOLDER            # of `distill sample --prompts`: samples.jsonl and its PNG files

Of each picture: the background is the nearest known colour to the border's median; the object is what differs from it by more
than a fifth of the way to the farthest pixel; its colour is the median inside; its place that of the centroid; its shape the one
which, drawn there with the area found, overlaps best (at least 80%); its size that of the radius which this area makes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

SIZES = {"small": 10, "large": 18}
COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40),
    "purple": (140, 50, 180), "orange": (245, 130, 30), "cyan": (40, 200, 220), "black": (20, 20, 20),
}  # fmt: skip
PLACES = {
    "in the centre": (32, 32), "at the top left": (20, 20), "at the top right": (44, 20),
    "at the bottom left": (20, 44), "at the bottom right": (44, 44),
}  # fmt: skip
BACKGROUNDS = {"white": (250, 250, 250), "grey": (150, 150, 150), "pink": (250, 180, 200)}
AREAS = {"circle": np.pi, "square": 1.8**2, "triangle": 0.75 * 3**0.5 * 1.15**2, "cross": 2 * 2 * 0.7 - 0.7**2}
"""Of radius 1."""
FAR, OVERLAP = 60, 0.8
"""Colours farther than this from any known one are none; less overlap than this is no known shape."""


def nearest(value, known, most=np.inf):
    """The name of the nearest known value, or "" where none is within `most`."""
    name = min(known, key=lambda key: np.linalg.norm(np.subtract(value, known[key])))
    return name if np.linalg.norm(np.subtract(value, known[name])) <= most else ""


def drawn(shape: str, x: float, y: float, r: float) -> np.ndarray:
    """(64, 64) whether a pixel's middle is inside."""
    across, down = np.meshgrid(np.arange(64) + 0.5 - x, np.arange(64) + 0.5 - y)
    if shape == "circle":
        return across**2 + down**2 <= r**2
    if shape == "square":
        return np.maximum(abs(across), abs(down)) <= 0.9 * r
    if shape == "triangle":
        return (down <= 0.575 * r) & (abs(across) * 3**0.5 <= down + 1.15 * r)
    return ((abs(across) <= r) & (abs(down) <= 0.35 * r)) | ((abs(across) <= 0.35 * r) & (abs(down) <= r))


def read(image: np.ndarray) -> tuple[str, str, str, str, str]:
    """size, colour, shape, place and background of a uint8 picture (64, 64, 3); "" for what is not recognised."""
    image = image.astype(np.float64)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = nearest(np.median(border, 0), BACKGROUNDS, FAR)
    off = np.linalg.norm(image - np.median(border, 0), axis=2)
    if off.max() < FAR:
        return "", "", "", "", background
    mask = off > 0.5 * np.median(off[off > 0.5 * off.max()])
    rows, columns = np.nonzero(mask)
    x, y, area = columns.mean() + 0.5, rows.mean() + 0.5, mask.sum()
    colour = nearest(np.median(image[off > 0.8 * np.median(off[mask])], 0), COLOURS, FAR)
    fits = {}
    for shape, unit in AREAS.items():
        other = drawn(shape, x, y, (area / unit) ** 0.5)
        fits[shape] = (mask & other).sum() / (mask | other).sum()
    shape = max(fits, key=lambda name: fits[name])
    radius = (area / AREAS[shape]) ** 0.5
    size = min(SIZES, key=lambda name: abs(np.log(radius / SIZES[name])))
    return size, colour, shape if fits[shape] >= OVERLAP else "", nearest((x, y), PLACES, 8), background


def asked(caption: str) -> tuple[str, str, str, str, str]:
    """The same five of a caption."""
    words = caption.split()
    place = next(name for name in PLACES if name in caption)
    return words[1], words[2], words[3], place, words[-2]


def judge(images: np.ndarray, captions: list[str]) -> dict[str, float]:
    """The share of uint8 pictures (N, 64, 64, 3) in which each of the five, and all of them, are as the captions ask."""
    right = np.array([[a == b for a, b in zip(read(image), asked(caption))] for image, caption in zip(images, captions, strict=True)])
    names = ("size", "colour", "shape", "place", "background")
    return {"images": len(images), **dict(zip(names, right.mean(0).tolist())), "all": float(right.all(1).mean())}


if __name__ == "__main__":
    from PIL import Image

    for name in sys.argv[1:]:
        lines = [json.loads(line) for line in Path(name, "samples.jsonl").read_text().splitlines()]
        pictures = np.stack([np.asarray(Image.open(Path(name, line["file"])).convert("RGB")) for line in lines])
        print(json.dumps({"folder": name, **judge(pictures, [line["prompt"] for line in lines])}))

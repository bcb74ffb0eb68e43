"""Convert images between float [-1, 1] (inside) and uint8 or PNG (outside); grids of images."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from distill_cli.errors import DistillError
from distill_cli.files import write_atomic

LETTER = (6, 12)
"""Width and height in pixels of a letter in a caption."""


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded; one channel becomes grey RGB."""
    rounded = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if rounded.shape[1] == 1:
        rounded = rounded.expand(-1, 3, -1, -1)
    return rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def finished(images: Tensor) -> np.ndarray:
    """As `to_uint8`, for images that are kept; raises DistillError if a value is not finite."""
    if not images.isfinite().all():
        raise DistillError("the model's pictures are not numbers, and none of this batch is written", "--precision bf16 or no")
    return to_uint8(images)


def from_uint8(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def png(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def grid(images: np.ndarray, columns: int, scale: int = 1, captions: Sequence[str] | None = None) -> np.ndarray:
    """Images (B, H, W, 3) uint8 as one picture: rows of `columns`, enlarged `scale` times, grey gaps, captions below."""
    count, height, width, _ = images.shape
    lines = [textwrap.wrap(text, max(8, width * scale // LETTER[0])) for text in captions or []]
    rows, gap, under = math.ceil(count / columns), max(1, scale // 2), LETTER[1] * min(4, max(map(len, lines), default=0))
    canvas = np.full((rows * (height * scale + under + gap) + gap, columns * (width * scale + gap) + gap, 3), 128, dtype=np.uint8)
    places = [(gap + i // columns * (height * scale + under + gap), gap + i % columns * (width * scale + gap)) for i in range(count)]
    for image, (y, x) in zip(images, places, strict=True):
        canvas[y : y + height * scale, x : x + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    if not lines:
        return canvas
    picture = Image.fromarray(canvas)
    for wrapped, (y, x) in zip(lines, places, strict=False):
        ImageDraw.Draw(picture).text((x, y + height * scale), "\n".join(wrapped[:4]), fill="white", spacing=0)
    return np.asarray(picture)


def save_grid(images: Tensor, path: Path, columns: int = 10, scale: int = 4) -> None:
    """Write images (B, C, H, W) in [-1, 1] as one PNG."""
    write_atomic(path, png(grid(to_uint8(images), columns, scale)))


def save_comparison(rows: Sequence[tuple[str, np.ndarray]], path: Path, columns: int = 16, scale: int = 4) -> None:
    """Write several sets of images (B, H, W, 3) uint8 as grids, one below the other, each with its title above."""
    panels = [(title, grid(images, columns, scale)) for title, images in rows]
    bar = 18
    canvas = Image.new("RGB", (max(p.shape[1] for _, p in panels), sum(p.shape[0] + bar for _, p in panels)), "white")
    draw, y = ImageDraw.Draw(canvas), 0
    for title, panel in panels:
        draw.text((4, y + 3), title, fill="black")
        canvas.paste(Image.fromarray(panel), (0, y + bar))
        y += panel.shape[0] + bar
    write_atomic(path, png(np.asarray(canvas)))

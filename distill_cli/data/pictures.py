"""Convert images between float [-1, 1] (inside) and uint8 or PNG (outside); grids of images."""

from __future__ import annotations

import io
import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill_cli.errors import DistillError, printable
from distill_cli.files import write_atomic

LETTERS, LINE, SPACE, MARGIN = 13, 17, 4, 4
"""Captions, in pixels: the size of the font, the height of a line, the gap between words (the font's own is too narrow), at the sides."""
ELSEWHERE = ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf")
"""Fonts of Linux, macOS and Windows with the letters of most alphabets."""
NARROW, TITLED = 96, 240
"""Least width, in pixels, of a cell that has a caption, and of a picture that has titles."""
Line = list[tuple[int, str]]
"""The words of a line of text, each with its distance from the left in pixels."""


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded; one channel becomes grey RGB."""
    rounded = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if rounded.shape[1] == 1:
        rounded = rounded.expand(-1, 3, -1, -1)
    return rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def finished(images: Tensor) -> np.ndarray:
    """As `to_uint8`, for images that are kept; raises DistillError if a value is not finite."""
    if not images.isfinite().all():
        raise DistillError("the model's images are not finite numbers; nothing of this batch is written", "--precision bf16 or no")
    return to_uint8(images)


def from_uint8(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def png(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


@cache
def font(ascii: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of a word: Pillow's own, which has ASCII letters alone; for others one of the system's, if it has one."""
    for name in () if ascii else ELSEWHERE:
        with suppress(OSError):
            return ImageFont.truetype(name, LETTERS)
    return ImageFont.load_default(LETTERS)


def broken(word: str, width: int) -> Iterator[tuple[str, int]]:
    """A word in as many parts as it needs to fit into `width` pixels, and the width of each."""
    letters = font(word.isascii())
    while word:
        widths = [math.ceil(letters.getlength(word[:count])) for count in range(1, min(len(word), width) + 1)]
        fits = max(1, bisect(widths, width))
        yield word[:fits], widths[fits - 1]
        word = word[fits:]


def wrapped(text: str, width: int) -> list[Line]:
    """The first 2,000 characters of a caption, in lines of at most `width` pixels."""
    lines: list[Line] = []
    x = width
    for word in printable(text).split():
        for part, wide in broken(word, width):
            if not lines or x + wide > width:
                lines.append([])
                x = 0
            lines[-1].append((x, part))
            x += wide + SPACE
    return lines


def write_lines(picture: Image.Image, lines: Sequence[Line], left: int, top: int, colour: str) -> None:
    """Draw the lines of a caption."""
    draw = ImageDraw.Draw(picture)
    for k, line in enumerate(lines):
        for x, word in line:
            draw.text((left + x, top + k * LINE), word, fill=colour, font=font(word.isascii()))


def grid(images: np.ndarray, columns: int, scale: int = 1, captions: Sequence[str] | None = None) -> np.ndarray:
    """Images (B, H, W, 3) uint8 as one picture: rows of `columns`, enlarged `scale` times, grey gaps, captions below."""
    count, height, width = len(images), images.shape[1] * scale, images.shape[2] * scale
    cell, gap = max(width, NARROW) if captions else width, max(1, scale // 2)
    lines = [wrapped(text, cell - 2 * MARGIN) for text in captions or [""] * count]
    under = [LINE * max(map(len, lines[first : first + columns]), default=0) for first in range(0, count, columns)]
    tops = [gap + k * (height + gap) + sum(under[:k]) for k in range(len(under) + 1)]
    canvas = np.full((tops[-1], columns * (cell + gap) + gap, 3), 128, dtype=np.uint8)
    places = [(tops[i // columns], gap + i % columns * (cell + gap)) for i in range(count)]
    for image, (y, x) in zip(images, places, strict=True):
        canvas[y : y + height, x : x + width] = image.repeat(scale, 0).repeat(scale, 1)
    if not captions:
        return canvas
    picture = Image.fromarray(canvas)
    for caption, (y, x) in zip(lines, places, strict=False):
        write_lines(picture, caption, x + MARGIN, y + height, "white")
    return np.asarray(picture)


def save_grid(images: Tensor, path: Path, columns: int = 10, scale: int = 4) -> None:
    """Write images (B, C, H, W) in [-1, 1] as one PNG."""
    write_atomic(path, png(grid(to_uint8(images), columns, scale)))


def stacked(panels: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Pictures (H, W, 3) uint8, one below the other, each with its title above."""
    width = max(TITLED, *(panel.shape[1] for _, panel in panels))
    titles = [wrapped(title, width - 2 * MARGIN) for title, _ in panels]
    height = sum(panel.shape[0] + LINE * len(title) + 2 * MARGIN for (_, panel), title in zip(panels, titles, strict=True))
    canvas, y = Image.new("RGB", (width, height), "white"), 0
    for title, (_, panel) in zip(titles, panels, strict=True):
        write_lines(canvas, title, MARGIN, y + MARGIN, "black")
        y += LINE * len(title) + 2 * MARGIN
        canvas.paste(Image.fromarray(panel), (0, y))
        y += panel.shape[0]
    return np.asarray(canvas)


def save_comparison(rows: Sequence[tuple[str, np.ndarray]], path: Path, columns: int = 16, scale: int = 4) -> None:
    """Write several sets of images (B, H, W, 3) uint8 as grids, one below the other, each with its title above."""
    write_atomic(path, png(stacked([(title, grid(images, columns, scale)) for title, images in rows])))

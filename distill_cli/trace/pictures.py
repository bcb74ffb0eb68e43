"""The process of pictures: rows of x_t and of the estimates of x0 as PNG, and both as an animated GIF."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distill_cli.config import TraceConfig
from distill_cli.data import Images
from distill_cli.data.pictures import finished, grid, png, stacked
from distill_cli.processes import say
from distill_cli.trace import record
from distill_cli.trace.job import COLUMNS, FRAMES, Trace, Traced
from distill_cli.trace.record import Walk, places

CELL, LARGEST = 128, 256
"""Least and most width of a picture, in pixels: smaller ones are enlarged by a whole factor, larger ones are shrunk."""


def at(t: float) -> str:
    """A time in words."""
    return f"t = {t:.3g}"


@dataclass
class Strip:
    """One sample's process: the states that are shown, pictures (N, H, W, 3) uint8, and what stands below each."""

    title: str
    captions: list[str]
    x: np.ndarray
    x0: np.ndarray

    def of(self, places: Sequence[int]) -> Strip:
        """Some of the states."""
        return Strip(self.title, [self.captions[place] for place in places], self.x[places], self.x0[places])

    def rows(self, columns: int, estimates: bool) -> np.ndarray:
        """The rows as one picture: x_t, and below it the estimates; few states are spread over all columns."""

        def over(pictures: np.ndarray) -> np.ndarray:
            row = np.full((columns, *pictures.shape[1:]), 128, np.uint8)
            row[places(len(pictures), columns)] = pictures
            return row

        captions = [""] * columns
        for caption, place in zip(self.captions, places(len(self.x), columns), strict=True):
            captions[place] = caption
        rows = [over(self.x), *([over(self.x0)] if estimates else [])]
        return grid(np.concatenate(rows), columns, enlarged(self.x), [""] * (len(rows) - 1) * columns + captions)


def enlarged(pictures: np.ndarray) -> int:
    """The factor by which pictures (N, H, W, 3) are enlarged."""
    return max(1, CELL // pictures.shape[2])


def gif(frames: Sequence[np.ndarray], milliseconds: Sequence[int], colours: int = 128) -> bytes:
    """Pictures (H, W, 3) uint8 of any heights as an animation without end. Each frame has a palette of its own."""
    height = max(len(frame) for frame in frames)
    whole = [np.pad(frame, ((0, height - len(frame)), (0, 0), (0, 0)), constant_values=255) for frame in frames]
    first, *others = [Image.fromarray(frame).quantize(colours) for frame in whole]
    buffer = io.BytesIO()
    first.save(buffer, "gif", save_all=True, append_images=others, duration=list(milliseconds), loop=0)
    return buffer.getvalue()


class Pictures(Trace):
    """A PNG and a GIF for each noise. x_t is shown over its spread, so that it stays in the range of pictures."""

    parts, usual = ("forward", "reverse", "animation"), 4

    def __init__(self, config: TraceConfig, traced: list[Traced], images: Images | None) -> None:
        super().__init__(config, traced, images)
        self.most = FRAMES if "animation" in self.show else COLUMNS
        if any(each.model.codec.parts() for each in traced):
            say("trace: x_t is decoded as the estimates are, by an autoencoder that has never seen noise: its colours mean nothing")

    def files(self) -> list[str]:
        kinds = [".png"] * bool({"forward", "reverse"} & {*self.show}) + [".gif"] * ("animation" in self.show)
        return [f"{index:06d}{kind}" for index in range(self.config.num) for kind in kinds]

    def made(self, missing: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        indices = sorted({int(name.partition(".")[0]) for name in missing})
        for first in range(0, len(indices), self.config.batch_size):
            part = indices[first : first + self.config.batch_size]
            past = self.past(part) if self.images is not None else None
            walks = [(each, each.walk(self.config, part)) for each in self.traced]
            for row, index in enumerate(part):
                before = self.forward_strip(past, row) if past else None
                strips = [self.strip(each, walk, row, index) for each, walk in walks]
                for name, draw in ((f"{index:06d}.png", self.sheet), (f"{index:06d}.gif", self.animation)):
                    if name in missing:
                        yield name, draw(before, strips)

    @torch.no_grad()
    def seen(self, each: Traced, x: Tensor) -> np.ndarray:
        """The denoiser's data (N, C, H, W) as pictures (N, H, W, 3) uint8. Raises DistillError if a value is not finite."""
        device = next(each.model.denoiser.parameters()).device
        pictures = each.model.codec.decode(x.to(device)).cpu()
        if pictures.shape[-1] > LARGEST:
            pictures = F.interpolate(pictures, scale_factor=LARGEST / pictures.shape[-1], mode="area")
        return finished(pictures)

    def scaled(self, each: Traced, walk: Walk, states: list[int], row: int) -> Tensor:
        """x_t of one sample over its spread, (N, C, H, W)."""
        wide = record.spread(each.model.denoiser.schedule, walk.times[states], 1.0)
        return walk.x[states, row] / wide.to(walk.x)[:, None, None, None]

    def strip(self, each: Traced, walk: Walk, row: int, index: int) -> Strip:
        """The sampling of one noise, which ends with the sample in both rows."""
        states, end = self.every(len(walk), self.most), walk.end[row][None]
        x = self.seen(each, torch.cat([self.scaled(each, walk, states, row), end]))
        x0 = self.seen(each, torch.cat([walk.x0[states, row], end]))
        title = f"{each.title}{self.asked(index)}: x_t above, its estimate of x0 below"
        return Strip(title, [*(at(t) for t in walk.times[states].tolist()), "sample"], x, x0)

    def forward_strip(self, walk: Walk, row: int) -> Strip:
        """The forward process of one picture, which begins with the picture."""
        first, states = self.traced[0], self.every(len(walk), self.most)
        x0 = self.seen(first, walk.end[row][None])
        x = np.concatenate([x0, self.seen(first, self.scaled(first, walk, states, row))])
        title = f"{self.config.data}: noise is added to a picture, as {first.spec} was trained"
        return Strip(title, ["data", *(at(t) for t in walk.times[states].tolist())], x, x0.repeat(len(x), 0))

    def sheet(self, before: Strip | None, strips: list[Strip]) -> bytes:
        """The rows of all processes as a PNG."""
        rows = [(before, False)] if before and "forward" in self.show else []
        rows += [(strip, True) for strip in strips if "reverse" in self.show]
        few = [(strip.of(self.columns(len(strip.x))), estimates) for strip, estimates in rows]
        widest = max(len(strip.x) for strip, _ in few)
        return png(stacked([(strip.title, strip.rows(widest, estimates)) for strip, estimates in few]))

    def columns(self, count: int) -> list[int]:
        """Which of a strip's states stand in a row: all, where `every` is given."""
        return list(range(count)) if self.config.every else record.kept(count, record.usual(count, COLUMNS + 1))

    def animation(self, before: Strip | None, strips: list[Strip]) -> bytes:
        """Forward, then backward: x_t beside the data, or the estimate; shorter processes are slower. The end of each is held."""
        steps = max(len(strip.x) for strip in strips)
        back = [[(strip, k * len(strip.x) // steps, "estimate") for strip in strips] for k in range(steps)]
        there = [[(before, k, "data")] * len(strips) for k in range(len(before.x))] if before else []
        frames = []
        for states in [*there, *back]:
            named = zip(self.traced, states, strict=True)
            frames.append(stacked([(each.spec, pair(strip, k, beside)) for each, (strip, k, beside) in named]))
        return gif(frames, self.durations(len(there), len(frames)))


def pair(strip: Strip, k: int, beside: str) -> np.ndarray:
    """State k of a process, and beside it the data, or the estimate of them."""
    cells = np.stack([strip.x[k], strip.x0[k]])
    return grid(cells, 2, enlarged(cells), [strip.captions[k], beside])

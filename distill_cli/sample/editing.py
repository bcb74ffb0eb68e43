"""Pictures in, edited pictures out: what `distill edit` does with files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_cli import launch
from distill_cli.config import EditConfig
from distill_cli.data.images import SUFFIXES, fit, open_picture
from distill_cli.data.pictures import png, save_comparison, to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.files import is_empty, write_atomic
from distill_cli.models.model import Model
from distill_cli.models.times import from_indices, parse
from distill_cli.sample import edit

SHOWN = 20


def find(config: EditConfig, folder: Path) -> list[Path]:
    """The pictures that `--input` names, in the order of their names, without the mask."""
    path = config.input
    assert path is not None
    if not path.exists():
        raise UsageError(f"--input {path}: no such file or folder")
    if not path.is_dir():
        return [path]
    if folder.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--out {folder}: lies in --input {path}", "the results would be edited next time: choose another folder")
    mask = config.mask.resolve() if config.mask else None
    found = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file() and f.resolve() != mask)
    if not found:
        raise UsageError(f"--input {path}: no pictures in it", f"file names end in {', '.join(SUFFIXES)}")
    return found


class Pictures:
    """Reads files as the model wants them, and says once for each kind what had to be done to one."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.said: set[str] = set()

    def _say(self, kind: str, text: str) -> None:
        if kind not in self.said:
            print(text, file=sys.stderr)
            self.said.add(kind)

    def read(self, file: Path, patch: int = 1) -> Tensor:
        """(3, height, width) in [-1, 1]; a picture that is smaller by `patch` each way has each pixel repeated."""
        picture, transparent = open_picture(file)
        if transparent:
            self._say("alpha", f"{file}: its alpha channel is laid on white")
        height, width = self.height // patch, self.width // patch
        if patch > 1 and picture.size == (width, height):
            return fit(picture, height, width).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        if picture.size != (self.width, self.height):
            self._say("size", f"{file}: {picture.width}x{picture.height} pixels, scaled and cut to {self.width}x{self.height}")
        return fit(picture, self.height, self.width)

    def mask(self, path: Path, files: list[Path]) -> Tensor:
        """(1, 1, height, width): 1 where the picture stays (the mask is black), 0 where it is painted anew (white)."""
        if not path.is_file():
            raise UsageError(f"--mask {path}: no such file")
        mask, _ = open_picture(path)
        for file in files:
            size = open_picture(file)[0].size
            if size != mask.size:
                raise UsageError(
                    f"--mask {path}: {mask.width}x{mask.height} pixels, {file} has {size[0]}x{size[1]}", "they must be the same"
                )
        known = (fit(mask, self.height, self.width).mean(0, keepdim=True) < 0).float()[None]
        if known.all() or not known.any():
            raise UsageError(f"--mask {path}: all {'black: nothing is' if known.all() else 'white: everything is'} painted anew")
        return known


def _times(config: EditConfig, model: Model) -> list[float]:
    schedule = edit.check_can_edit(model, config.model)
    if config.times is not None:
        return parse(config.times, schedule, len(edit.EVERY_FOURTH))
    if config.task == "interpolate":
        return model.times("few-step", model.sampling.steps).tolist()
    return from_indices(schedule, edit.TIMES.get(config.task, edit.EVERY_FOURTH))


def _projection(config: EditConfig, files: list[Path], pictures: Pictures) -> edit.Projection | None:
    """Onto the part of a picture that the task keeps."""
    if config.task == "superres":
        if pictures.height % config.patch or pictures.width % config.patch:
            raise UsageError(f"--patch {config.patch}: does not divide the model's {pictures.height}x{pictures.width} pixels")
        return edit.patch_means(config.patch)
    if config.task == "inpaint":
        assert config.mask is not None
        return edit.inpainting(pictures.mask(config.mask, files))
    return edit.luminance if config.task == "colorize" else None


def _write(folder: Path, names: list[str], images: Tensor) -> None:
    for name, picture in zip(names, to_uint8(images), strict=True):
        write_atomic(folder / f"{name}.png", png(picture))


def run(config: EditConfig, model: Model, folder: Path) -> dict[str, Any]:
    """Edit what `config` names; writes a picture for each and side-by-side.png into `folder`."""
    times = _times(config, model)
    if not is_empty(folder):
        raise UsageError(f"--out {folder}: exists already", "choose another folder")
    channels, height, width = model.shape
    if channels != 3:
        raise UsageError(f"--model {config.model}: pictures of {channels} channels", "editing is for colour pictures")
    model.to(launch.device(config.device))
    if config.task == "interpolate":
        count = config.frames
        ends = Draws(config.seed, range(2)).normal("prior", model.shape)
        start = times[0] * edit.between(ends[0], ends[1], count)
        labels = edit.labels_of(model, 1, config.classes).expand(count)
        outputs = edit.edit(model, start, times, labels, Draws(config.seed, [0] * count))
        _write(folder, [f"{k:03d}" for k in range(count)], outputs)
        rows = [("from one noise to another", outputs[:SHOWN])]
    else:
        files = find(config, folder)
        count = len(files)
        pictures = Pictures(height, width)
        projection = _projection(config, files, pictures)
        shown: list[tuple[Tensor, ...]] = []
        for first in range(0, count, config.batch_size):
            part = files[first : first + config.batch_size]
            labels = edit.labels_of(model, len(part), config.classes, first)
            draws = Draws(config.seed, range(first, first + len(part)))
            inputs = torch.stack([pictures.read(file, config.patch if config.task == "superres" else 1) for file in part])
            known = inputs if projection is None else projection(inputs)
            start = known + times[0] * draws.normal("prior", model.shape)
            outputs = edit.edit(model, start, times, labels, draws, known, projection)
            _write(folder, [f"{first + i:04d}-{file.stem}" for i, file in enumerate(part)], outputs)
            if first < SHOWN:
                given = known.sum(1, keepdim=True).expand_as(known) / edit.WHITE if config.task == "colorize" else known
                shown.append((inputs, given if projection else start.clamp(-1, 1), outputs))
        rows = list(zip(("input", "what the student is given", config.task), map(torch.cat, zip(*shown, strict=True)), strict=True))
    grid = folder / "side-by-side.png"
    save_comparison([(title, to_uint8(images[:SHOWN])) for title, images in rows], grid, min(SHOWN, count), config.scale)
    return {"folder": str(folder), "pictures": count, "network_evaluations": len(times), "picture": str(grid)}

"""The files of `distill edit`: pictures in, edited pictures out."""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_cli import launch
from distill_cli.config import EditConfig
from distill_cli.data.folders import EDITS as SETTINGS
from distill_cli.data.folders import SHEET, SUFFIXES, pictures_below
from distill_cli.data.images import fit
from distill_cli.data.opened import header, open_picture
from distill_cli.data.pictures import finished, png, save_comparison, to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.edit import zero_shot as edit
from distill_cli.errors import UsageError
from distill_cli.files import LONGEST, bounded, digest, remove_temporaries, write_atomic
from distill_cli.models.model import Model
from distill_cli.models.times import nearest, parse
from distill_cli.runs import settle

SHOWN = 20


def find(config: EditConfig, folder: Path) -> tuple[list[Path], str]:
    """Pictures that `--input` names, sorted by name, without the mask, and a line on what was read and left out."""
    path = config.input
    assert path is not None
    if not path.exists():
        raise UsageError(f"--input {path}: no such file or folder")
    if not path.is_dir():
        return [path], f"the picture {path}"
    if folder.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--out {folder}: lies in --input {path}", "the results would be edited next time: choose another folder")
    mask = config.mask.resolve() if config.mask else None
    found = pictures_below(path)
    files = [file for file in found.files if file.resolve() != mask]
    if not files:
        raise UsageError(f"--input {path}: no pictures in it{found.without}", f"file names end in {', '.join(SUFFIXES)}")
    if len(files) < len(found.files):
        found.left_out["mask"] += 1
    return files, f"{len(files)} picture{'s' * (len(files) > 1)} in {path}{found.without}"


def names_of(files: list[Path]) -> list[str]:
    """The names of the results, without .png."""
    return [bounded(f"{k:04d}-{file.stem}", LONGEST - len(".png")) for k, file in enumerate(files)]


class Pictures:
    """Reads files in the model's size and colours. Each kind of conversion is reported once."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.said: set[str] = set()

    def _say(self, kind: str, text: str) -> None:
        if kind not in self.said:
            print(text, file=sys.stderr)
            self.said.add(kind)

    def read(self, file: Path, patch: int = 1) -> Tensor:
        """(3, height, width) in [-1, 1]. In a picture that is `patch` times smaller each pixel is repeated."""
        picture, transparent, dark = open_picture(file)
        if dark:
            self._say("depth", dark)
        if header(file):
            self._say("frames", f"{file}: several frames, of which the first is taken")
        if transparent:
            self._say("alpha", f"{file}: its alpha channel is laid on white")
        height, width = self.height // patch, self.width // patch
        if patch > 1 and picture.size == (width, height):
            return fit(picture, height, width).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        if picture.size != (self.width, self.height):
            self._say("size", f"{file}: {picture.width}x{picture.height} pixels, scaled and cut to {self.width}x{self.height}")
        return fit(picture, self.height, self.width)

    def mask(self, path: Path, files: list[Path]) -> Tensor:
        """(1, 1, height, width): 1 where the picture stays (black in the mask), 0 where it is repainted (white)."""
        if not path.is_file():
            raise UsageError(f"--mask {path}: no such file")
        mask, transparent, dark = open_picture(path)
        if dark:
            self._say("mask depth", dark)
        if transparent:
            self._say("mask", f"{path}: its alpha channel is laid on white, which is painted anew")
        for file in files:
            size = open_picture(file)[0].size
            if size != mask.size:
                wrong = f"--mask {path}: {mask.width}x{mask.height} pixels, {file} has {size[0]}x{size[1]}"
                raise UsageError(wrong, "they must be the same")
        known = (fit(mask, self.height, self.width).mean(0, keepdim=True) < 0).float()[None]
        if known.all() or not known.any():
            raise UsageError(f"--mask {path}: all {'black: nothing is' if known.all() else 'white: everything is'} painted anew")
        return known


class Task:
    """The pictures of one `distill edit`, by position: inputs, starting points, results."""

    indices: tuple[int, ...] = edit.EVERY_FOURTH
    """Default noise levels, as points of the grid of 40."""

    def __init__(self, config: EditConfig, model: Model, folder: Path) -> None:
        self.config, self.model, self.folder = config, model, folder
        model.codec.kind.needs_pictures(f"edit {config.task}", f"--model {config.model} makes {model.codec.kind.name}")
        self.schedule = edit.check_can_edit(model, config.model)
        usual = min(len(edit.EVERY_FOURTH), self.schedule.grid - 1)
        self.times = self.own_times() if config.times is None else parse(config.times, self.schedule, usual)
        channels, height, width = model.shape
        if channels != 3:
            raise UsageError(f"--model {config.model}: pictures of {channels} channels", "editing is for colour pictures")
        self.files, self.names, self.about = self.found()
        self.pictures = Pictures(height, width)
        edit.labels_of(model, 1, config.classes)

    def own_times(self) -> list[float]:
        """Default noise levels."""
        return nearest(self.schedule, self.indices)

    def found(self) -> tuple[list[Path], list[str], str]:
        """The input files, the names of the results without .png, and a line on what was read."""
        files, about = find(self.config, self.folder)
        return files, names_of(files), about

    @cached_property
    def projection(self) -> edit.Projection | None:
        """The projection onto the part of a picture that the task keeps. Raises UsageError for a mask or patch that does not fit."""
        return None

    def given(self, known: Tensor, start: Tensor) -> Tensor:
        """(B, 3, H, W): the known part of the inputs, to look at."""
        return known if self.projection else start.clamp(-1, 1)

    def check(self) -> None:
        """Raise UsageError for options or files that do not fit, before anything is planned or made."""
        _ = self.projection

    def digest(self) -> str:
        """SHA-256 of the input files. Raises DistillError for a picture that cannot be read, before any is edited."""
        files = [*self.files, *([self.config.mask] if self.config.mask else [])]
        for file in files:
            open_picture(file)
        return digest(files)

    def file(self, place: int) -> Path:
        return self.folder / f"{self.names[place]}.png"

    def inputs(self, part: range) -> Tensor:
        """(B, 3, H, W) in [-1, 1]: the input pictures."""
        return torch.stack([self.pictures.read(self.files[place]) for place in part])

    def begin(self, inputs: Tensor, part: range) -> tuple[Tensor, Tensor]:
        """The known part of the inputs, and the starting points."""
        known = inputs if self.projection is None else self.projection(inputs)
        return known, known + self.times[0] * Draws(self.config.seed, part).normal("prior", self.model.shape)

    def edited(self, part: range) -> Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        known, start = self.begin(self.inputs(part), part)
        labels = edit.labels_of(self.model, len(part), self.config.classes, part.start)
        return edit.edit(self.model, start, self.times, labels, Draws(self.config.seed, part), known, self.projection)

    def rows(self, part: range, out: Tensor) -> list[tuple[str, Tensor]]:
        """The rows of the picture that shows the edits `out` (B, 3, H, W), with their titles."""
        inputs = self.inputs(part)
        return [("input", inputs), ("what the student is given", self.given(*self.begin(inputs, part))), (self.config.task, out)]

    def side_by_side(self) -> Path:
        """Rows of the first pictures: inputs, their known part, and the results in the folder."""
        part = range(min(SHOWN, len(self.names)))
        _, height, width = self.model.shape
        out = torch.stack([fit(open_picture(self.file(place))[0], height, width) for place in part])
        rows = [(title, to_uint8(images)) for title, images in self.rows(part, out)]
        path = self.folder / SHEET
        save_comparison(rows, path, len(part), self.config.scale or self.model.enlarged)
        return path


class Inpaint(Task):
    """Inpainting: new content where the mask is white."""

    @cached_property
    def projection(self) -> edit.Projection:
        assert self.config.mask is not None
        return edit.inpainting(self.pictures.mask(self.config.mask, self.files))


class Colorize(Task):
    """Colouring: new colours for a given luminance."""

    @property
    def projection(self) -> edit.Projection:
        return edit.luminance

    def given(self, known: Tensor, start: Tensor) -> Tensor:
        return known.sum(1, keepdim=True).expand_as(known) / edit.WHITE


class Superres(Task):
    """Superresolution: new detail for given means of patches."""

    @cached_property
    def projection(self) -> edit.Projection:
        height, width, patch = self.pictures.height, self.pictures.width, self.config.patch
        if height % patch or width % patch:
            raise UsageError(f"--patch {patch}: does not divide the model's {height}x{width} pixels")
        return edit.patch_means(patch)

    def inputs(self, part: range) -> Tensor:
        return torch.stack([self.pictures.read(self.files[place], self.config.patch) for place in part])


class SDEdit(Task):
    """SDEdit (Meng et al. 2108.01073): a picture from coloured strokes."""

    indices = edit.STROKES


class Interpolate(Task):
    """Interpolation: pictures from one noise to another, without input."""

    def own_times(self) -> list[float]:
        sampler = self.model.sampler
        return sampler.times_for(self.schedule, sampler.solver, sampler.steps).tolist()

    def found(self) -> tuple[list[Path], list[str], str]:
        return [], [f"{k:03d}" for k in range(self.config.frames)], ""

    def edited(self, part: range) -> Tensor:
        ends = Draws(self.config.seed, range(2)).normal("prior", self.model.shape)
        start = self.times[0] * edit.between(ends[0], ends[1], self.config.frames)[part.start : part.stop]
        labels = edit.labels_of(self.model, 1, self.config.classes).expand(len(part))
        return edit.edit(self.model, start, self.times, labels, Draws(self.config.seed, [0] * len(part)))

    def rows(self, part: range, out: Tensor) -> list[tuple[str, Tensor]]:
        return [("from one noise to another", out)]


TASKS: dict[str, type[Task]] = {
    "inpaint": Inpaint, "colorize": Colorize, "superres": Superres, "sdedit": SDEdit, "interpolate": Interpolate,
}  # fmt: skip
"""The tasks of `distill edit`. Making one raises UsageError if the model or the input does not fit."""


def run(task: Task) -> dict[str, Any]:
    """Run a task: a result for each picture, and side-by-side.png. A second call makes only what is missing."""
    config, model, folder = task.config, task.model, task.folder
    digest = task.digest()
    settings = config.model_dump(mode="json", exclude={"out", "device", "scale", "model", "times", "input", "mask"})
    settle(folder / SETTINGS, settings | {"model_hash": model.weights_hash(), "times": task.times, "files": digest}, "edits")
    remove_temporaries(folder)
    model.to(launch.device(config.device))
    count = len(task.names)
    parts = [range(first, min(count, first + config.batch_size)) for first in range(0, count, config.batch_size)]
    missing = [part for part in parts if not all(task.file(place).exists() for place in part)]
    progress = launch.Progress(sum(map(len, missing)), config.task, "pictures")
    with launch.stoppable() as stop:
        for part in missing:
            if stop.requested:
                raise stop.interrupted(stop.requested, f"stopped before picture {part.start}", "the same command makes what is missing")
            for place, picture in zip(part, finished(task.edited(part)), strict=True):
                write_atomic(task.file(place), png(picture))
            progress.add(len(part))
    shown = str(task.side_by_side())
    made = sum(map(len, missing))
    return {"folder": str(folder), "pictures": count, "made": made, "network_evaluations": len(task.times), "picture": shown}

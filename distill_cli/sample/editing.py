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


def find(path: Path) -> list[Path]:
    """The pictures that `--input` names, in the order of their names."""
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not found:
            raise UsageError(f"--input {path}: no pictures in it", f"file names end in {', '.join(SUFFIXES)}")
        return found
    if not path.is_file():
        raise UsageError(f"--input {path}: no such file or folder")
    return [path]


def read(files: list[Path], height: int, width: int) -> Tensor:
    """(N, 3, height, width) in [-1, 1]; what had to be done to a picture is said once for each kind."""
    pictures, said = [], set()
    for file in files:
        picture, transparent = open_picture(file)
        if transparent and "alpha" not in said:
            print(f"{file}: its alpha channel is laid on white", file=sys.stderr)
            said.add("alpha")
        if picture.size != (width, height) and "size" not in said:
            print(f"{file}: {picture.width}x{picture.height} pixels, scaled and cut to {width}x{height}", file=sys.stderr)
            said.add("size")
        pictures.append(fit(picture, height, width))
    return torch.stack(pictures)


def read_mask(path: Path, files: list[Path], height: int, width: int) -> Tensor:
    """(1, 1, height, width): 1 where the picture stays (the mask is black), 0 where it is painted anew (white)."""
    if not path.is_file():
        raise UsageError(f"--mask {path}: no such file")
    mask, _ = open_picture(path)
    for file in files:
        size = open_picture(file)[0].size
        if size != mask.size:
            raise UsageError(f"--mask {path}: {mask.width}x{mask.height} pixels, {file} has {size[0]}x{size[1]}", "they must be the same")
    known = (fit(mask, height, width).mean(0, keepdim=True) < 0).float()[None]
    if known.all() or not known.any():
        raise UsageError(f"--mask {path}: all {'black: nothing is' if known.all() else 'white: everything is'} painted anew")
    return known


def _times(config: EditConfig, model: Model) -> list[float]:
    schedule = edit.check_can_edit(model, config.model)
    if config.times is not None:
        return parse(config.times, schedule, model.sampling.steps)
    if config.task == "interpolate":
        return model.times("few-step", model.sampling.steps).tolist()
    return from_indices(schedule, edit.TIMES.get(config.task, edit.EVERY_FOURTH))


def _known(config: EditConfig, files: list[Path], model: Model) -> tuple[Tensor, edit.Projection]:
    """The pictures' known part and the projection onto it."""
    _, height, width = model.shape
    if config.task == "superres":
        if height % config.patch or width % config.patch:
            raise UsageError(f"--patch {config.patch}: does not divide the model's {height}x{width} pixels")
        small = (width // config.patch, height // config.patch)
        if all(open_picture(file)[0].size == small for file in files):  # as small as what is known of them
            return torch.nn.functional.interpolate(read(files, small[1], small[0]), scale_factor=config.patch), edit.patch_means(
                config.patch
            )
        projection = edit.patch_means(config.patch)
    elif config.task == "inpaint":
        assert config.mask is not None
        projection = edit.inpainting(read_mask(config.mask, files, height, width))
    else:
        projection = edit.luminance
    return projection(read(files, height, width)), projection


def run(config: EditConfig, model: Model, folder: Path) -> dict[str, Any]:
    """Edit what `config` names; writes a picture for each and side-by-side.png into `folder`."""
    times = _times(config, model)
    if not is_empty(folder):
        raise UsageError(f"--out {folder}: exists already", "choose another folder")
    channels, height, width = model.shape
    if channels != 3:
        raise UsageError(f"--model {config.model}: pictures of {channels} channels", "editing is for colour pictures")
    model.to(launch.device(config.device))
    prior = model.denoiser.schedule.prior_std
    if config.task == "interpolate":
        ends = Draws(config.seed, range(2)).normal("prior", model.shape)
        names = [f"{k:03d}" for k in range(config.frames)]
        noise = edit.between(ends[0], ends[1], config.frames)
        labels = edit.labels_of(model, 1, config.classes).expand(config.frames)
        outputs = edit.edit(model, prior * noise, times, labels, Draws(config.seed, [0] * config.frames))
        rows = [("from one noise to another", outputs)]
    else:
        assert config.input is not None
        files = find(config.input)
        names = [f"{i:04d}-{file.stem}" for i, file in enumerate(files)] if len(files) > 1 else [files[0].stem]
        parts = []
        for first in range(0, len(files), config.batch_size):
            parts.append(_edit(config, model, files[first : first + config.batch_size], first, times))
        inputs, shown, outputs = (torch.cat([part[k] for part in parts]) for k in range(3))
        rows = [("input", inputs), ("what the student is given", shown), (config.task, outputs)]
    for name, picture in zip(names, to_uint8(outputs), strict=True):
        write_atomic(folder / f"{name}.png", png(picture))
    grid = folder / "side-by-side.png"
    save_comparison(
        [(title, to_uint8(images[:SHOWN])) for title, images in rows], grid, columns=min(SHOWN, len(outputs)), scale=config.scale
    )
    return {"folder": str(folder), "pictures": len(outputs), "network_evaluations": len(times), "picture": str(grid)}


def _edit(config: EditConfig, model: Model, files: list[Path], first: int, times: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The pictures of `files`, number `first` and on: as read, as the student is given them, and edited."""
    _, height, width = model.shape
    draws = Draws(config.seed, range(first, first + len(files)))
    labels = edit.labels_of(model, len(files), config.classes, first)
    if config.task == "sdedit":
        pictures = read(files, height, width)
        start = pictures + times[0] * draws.normal("prior", model.shape)
        return pictures, start.clamp(-1, 1), edit.edit(model, start, times, labels, draws)
    known, projection = _known(config, files, model)
    start = times[0] * draws.normal("prior", model.shape)
    edited = edit.edit(model, start, times, labels, draws, known, projection)
    shown = known if config.task != "colorize" else known.sum(1, keepdim=True).expand(-1, 3, -1, -1) / _grey()
    return torch.stack([fit(open_picture(file)[0], height, width) for file in files]), shown, edited


def _grey() -> float:
    """The sum over the channels of the luminance part of white."""
    return edit.luminance(torch.ones(1, 3, 1, 1)).sum().item()

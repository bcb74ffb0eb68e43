"""Many images from a model, as files; a job that stops goes on where it was."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import struct
import zipfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from distill_cli import launch, processes
from distill_cli.config import SampleConfig
from distill_cli.data.folders import LIST
from distill_cli.data.pictures import finished, grid, png
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, reason
from distill_cli.files import reading, remove_temporaries, write_atomic, write_atomic_lines
from distill_cli.models.model import Model
from distill_cli.models.sampler import SOLVERS
from distill_cli.runs import settle

SETTINGS = "sampling.json"
GRID = 100
CAPTIONED = 256
"""Pixels that a picture needs to have a caption below it."""


def read_npz(path: Path, hint: str = "delete it and run the same command again") -> tuple[np.ndarray, np.ndarray | None]:
    """arr_0, images, and arr_1, labels where the file has any; raises DistillError that says what else the file is."""
    with reading(path), open(path, "rb") as file:
        begins = file.read(2)
    if begins != b"PK":
        raise DistillError(f"{path}: {'no npz file' if begins else 'empty'}", hint)
    try:
        with np.load(path, allow_pickle=False) as stored:
            there = {name: _array(path, stored, name) for name in ("arr_0", "arr_1") if name in stored.files}
            names = stored.files
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError) as error:
        raise DistillError(f"{path}: corrupt", hint) from error
    except OSError as error:
        what = "corrupt" if error.errno in (None, errno.EINVAL) else os.strerror(error.errno).lower()  # EINVAL: of a place before its start
        raise DistillError(f"{path}: {what}", hint if what == "corrupt" else "") from error
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed as Python cannot
        raise DistillError(f"{path}: cannot be read ({reason(error)})", hint) from error
    if "arr_0" not in there:
        what = "mean and covariance of features, no images" if {"mu", "sigma"} <= set(names) else "no arr_0"
        has = ", ".join(repr(name)[1:-1] for name in names[:8]) or "nothing"
        raise DistillError(f"{path}: {what}: it has {has}", "np.savez(file, arr_0=images) of uint8 (N, H, W, 3)")
    return there["arr_0"], there.get("arr_1")


def _array(path: Path, stored: Any, name: str) -> np.ndarray:
    """An array of an npz file; raises DistillError for one of Python objects, which would have to be unpickled."""
    try:
        array = stored[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DistillError(f"{path}: {name} holds Python objects", "np.savez(file, arr_0=images) of one array of numbers") from error
    except MemoryError as error:
        with stored.zip.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        if math.prod(shape) * dtype.itemsize > stored.zip.getinfo(f"{name}.npy").file_size:  # more than is there
            raise EOFError from error
        raise
    if not isinstance(array, np.ndarray):  # numpy gives the bytes of what is no array
        raise DistillError(f"{path}: {name} is no array")
    return array


def _write_npz(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images, arr_1=labels)
    write_atomic(path, buffer.getvalue())


class Samples:
    """The folder of a sampling job. Batch k holds images k*batch_size ...; a batch is the unit of work."""

    def __init__(self, folder: Path, config: SampleConfig, model: Model) -> None:
        self.folder, self.config, self.enlarged = folder, config, model.enlarged
        self.labels = model.conditioner.labels(config.num, config.classes).numpy()
        self.conditioner = model.conditioner
        self.batches = [range(first, min(config.num, first + config.batch_size)) for first in range(0, config.num, config.batch_size)]
        self.npz = folder / "samples.npz"

    def png(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def part(self, batch: range) -> Path:
        return self.folder / f"part-{batch.start:06d}.npz"

    def done(self, batch: range) -> bool:
        if self.config.format == "npz":
            return self.npz.exists() or self.part(batch).exists()
        return all(self.png(i).exists() for i in batch)

    def write(self, batch: range, images: np.ndarray) -> None:
        if self.config.format == "npz":
            _write_npz(self.part(batch), images, self.labels[batch.start : batch.stop])
        else:
            for i, image in zip(batch, images, strict=True):
                write_atomic(self.png(i), png(image))

    def finish(self) -> None:
        """Join the parts, and write the list of samples and the grid."""
        if self.config.format == "npz" and not self.npz.exists():
            try:
                parts = [read_npz(self.part(batch))[0] for batch in self.batches]
            except DistillError:
                if self.npz.exists():  # another process has joined them
                    return
                raise
            _write_npz(self.npz, np.concatenate(parts), self.labels)
        for batch in self.batches:
            self.part(batch).unlink(missing_ok=True)
        write_atomic_lines(self.folder / LIST, map(self.line, range(self.config.num)))
        if self.config.grid:
            images = self.first(GRID)
            captions = self.conditioner.captions(self.labels[: len(images)].tolist())
            readable = max(1, CAPTIONED // images.shape[2]) if captions else self.enlarged
            write_atomic(self.folder / "grid.png", png(grid(images, min(10, len(images)), self.config.scale or readable, captions)))

    def line(self, i: int) -> str:
        """What samples.jsonl says of image i."""
        place = {"file": self.png(i).name} if self.config.format == "png" else {}
        return json.dumps({"index": i, **place, "seed": self.config.seed, **self.conditioner.named(int(self.labels[i]))}) + "\n"

    def first(self, count: int) -> np.ndarray:
        """The first `count` images (B, H, W, 3) uint8, from disk."""
        if self.config.format == "npz":
            return read_npz(self.npz)[0][:count]
        from PIL import Image

        return np.stack([np.asarray(Image.open(self.png(i))) for i in range(min(count, self.config.num))])


def sample(config: SampleConfig, model: Model, folder: Path, part: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Make the missing images of `config` that fall to this process of part (i, n) of the job; returns counts and images per second."""
    sampling = model.with_defaults(config.solver, config.steps, config.guidance_scale, config.guidance_calls)
    samples = Samples(folder, config, model)
    settings = config.model_dump(
        mode="json", exclude={"out", "device", "grid", "scale", "times", "search_times", "classifier", *sampling.model_dump()}
    )
    settings |= model.conditioner.digests() | {"model": model.lineage.name, "model_hash": model.weights_hash(), **sampling.model_dump()}
    if SOLVERS[sampling.solver].few:
        settings["times"] = model.sampler.times_for(model.denoiser.schedule, sampling.solver, sampling.steps).tolist()
    settle(folder / SETTINGS, settings, "samples")
    remove_temporaries(folder)
    where = launch.device(config.device)
    model.to(where)
    mine = [samples.batches[k] for k in processes.mine(len(samples.batches), part)]
    missing = [batch for batch in mine if not samples.done(batch)]
    if processes.rank() == 0:  # which speaks for all of this part
        absent = [batch for batch in samples.batches[part[0] :: part[1]] if not samples.done(batch)]
        model.conditioner.say_cut(image for batch in absent for image in batch)
    progress = launch.Progress(sum(map(len, missing)), "sample", "images")
    written: Future[None] | None = None
    with launch.stoppable() as stop, ThreadPoolExecutor(1) as writer:  # files are synced while the next batch is made
        for batch in missing:
            if stop.requested:
                raise stop.interrupted(stop.requested, f"stopped before image {batch.start}", "the same command makes what is missing")
            labels = model.conditioner.labels(len(batch), config.classes, start=batch.start)
            with launch.autocast(where, config.precision):
                images = model.sample(Draws(config.seed, batch), labels, sampling)
            if written is not None:
                written.result()
            written = writer.submit(samples.write, batch, finished(images))
            progress.add(len(batch))
        if written is not None:
            written.result()
    progress.close()
    rate = progress.rate()
    left = [k for k, batch in enumerate(samples.batches) if not samples.done(batch)]
    if not left:
        samples.finish()
    made = sum(map(len, missing))
    return {
        "folder": str(folder),
        "made": made,
        "kept": sum(map(len, mine)) - made,
        "missing": sum(len(samples.batches[k]) for k in left),
        "left": sum(k % part[1] == part[0] for k in left),
        "network_evaluations": sampling.evaluations,
        "images_per_second": round(rate, 2) if made else None,
    }

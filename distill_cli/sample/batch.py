"""Images of a model as files. A job that was stopped continues where it was."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from distill_cli import launch, processes
from distill_cli.config import Config, GuidesConfig, SampleConfig
from distill_cli.data.folders import LIST
from distill_cli.data.npz import Rows, read_npz, write_npz
from distill_cli.data.pictures import grid, png
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError
from distill_cli.files import remove_temporaries, write_atomic, write_atomic_lines
from distill_cli.models import compiled
from distill_cli.models.model import Model
from distill_cli.models.sampler import SOLVERS
from distill_cli.runs import settle

SETTINGS = "sampling.json"
GRID = 100
LATER = {"compile", "channels_last", "decoder", "tiles"}
"""Options that folders of older versions lack; such a folder goes on where they have their defaults."""
CAPTIONED = 256
"""Width of a picture, in pixels, that has room for a caption."""


class Samples:
    """The folder of a sampling job. Batch k holds images k*batch_size ...; a batch is the unit of work."""

    def __init__(self, folder: Path, config: SampleConfig, model: Model) -> None:
        self.folder, self.config, self.enlarged, self.kind = folder, config, model.enlarged, model.codec.kind
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
            write_npz(self.part(batch), [images], self.labels[batch.start : batch.stop])
        else:
            for i, image in zip(batch, images, strict=True):
                write_atomic(self.png(i), png(image))

    def finish(self) -> None:
        """Join the parts, and write the list of samples and the grid."""
        if self.config.format == "npz" and not self.npz.exists():
            try:
                write_npz(self.npz, (read_npz(self.part(batch))[0] for batch in self.batches), self.labels)
            except DistillError:
                if self.npz.exists():  # another process has joined the parts
                    return
                raise
        for batch in self.batches:
            self.part(batch).unlink(missing_ok=True)
        write_atomic_lines(self.folder / LIST, map(self.line, range(self.config.num)))
        if self.config.grid:
            images = self.first(GRID)
            captions = self.conditioner.captions(self.labels[: len(images)].tolist())
            readable = max(1, CAPTIONED // images.shape[2]) if captions else self.enlarged
            write_atomic(self.folder / "grid.png", png(grid(images, min(10, len(images)), self.config.scale or readable, captions)))

    def line(self, i: int) -> str:
        """The line of samples.jsonl for image i."""
        place = {"file": self.png(i).name} if self.config.format == "png" else {}
        return json.dumps({"index": i, **place, "seed": self.config.seed, **self.conditioner.named(int(self.labels[i]))}) + "\n"

    def first(self, count: int) -> np.ndarray:
        """The first `count` images (B, H, W, 3) uint8, from disk."""
        if self.config.format == "npz":
            return Rows(self.npz).read(range(min(count, self.config.num)))
        from PIL import Image

        return np.stack([np.asarray(Image.open(self.png(i))) for i in range(min(count, self.config.num))])


def settled(config: SampleConfig, model: Model) -> SampleConfig:
    """The options with the format that the model's samples are written in. Raises UsageError for what only pictures can have."""
    kind = model.codec.kind
    if config.grid:
        kind.needs_pictures("--grid")
    return config.model_copy(update={"format": kind.format(config.format)})


def sample(config: SampleConfig, model: Model, folder: Path, part: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Make this process's share of the missing images, in part (i, n) of the job. Returns counts and images per second."""
    config = settled(config, model)
    sampling = model.with_defaults(config.solver, config.steps, config.guidance_scale, config.guidance_calls)
    samples = Samples(folder, config, model)
    apart = {
        "out",
        "device",
        "grid",
        *LATER - {*config.changed(*LATER)},
        "scale",
        "times",
        "search_times",
        "classifier",
        *GuidesConfig.model_fields.keys() - Config.model_fields.keys(),
        *sampling.model_dump(),
    }
    settings = config.model_dump(mode="json", exclude=apart)
    settings["negative_prompt"] = model.conditioner.negative
    settings |= (
        model.conditioner.digests()
        | model.guidance()
        | {"model": model.lineage.name, "model_hash": model.weights_hash(), **sampling.model_dump()}
    )
    if SOLVERS[sampling.solver].few:
        settings["times"] = model.sampler.times_for(model.denoiser.schedule, sampling.solver, sampling.steps).tolist()
    settle(folder / SETTINGS, settings, "samples")
    remove_temporaries(folder)
    where = launch.device(config.device)
    compiled.prepare(config, model, where)
    mine = [samples.batches[k] for k in processes.mine(len(samples.batches), part)]
    missing = [batch for batch in mine if not samples.done(batch)]
    if processes.rank() == 0:  # one message for all processes of this part
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
            written = writer.submit(samples.write, batch, samples.kind.stored(images))
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

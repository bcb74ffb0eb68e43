"""What a student learns from: images under classes, the latents of captioned images, or the images of `distill pairs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_cli.config import TrainingConfig
from distill_cli.data import Images
from distill_cli.data.captions import HINT
from distill_cli.data.images import Captioned, split
from distill_cli.data.prompts import in_turn
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.errors import UsageError
from distill_cli.launch import Stop, preparing
from distill_cli.models.codec import Codec
from distill_cli.models.model import Model
from distill_cli.pairs.store import MANIFEST, PairStore
from distill_cli.runs import Run
from distill_cli.training.examples import ConfigT, Examples, check_images, expected, images_of
from distill_cli.training.job import Job

ENCODED = 64
"""Pictures that are encoded together."""


class Latents:
    """Means and standard deviations of latents, encoded once: `variants` random versions of each picture."""

    def __init__(self, images: Images, codec: Codec, where: torch.device, variants: int, seed: int, stop: Stop) -> None:
        count = len(images)
        parts = []
        for first in range(0, variants * count, ENCODED):
            if stop.requested:  # the engine stops before the first step
                break
            picks = range(first, min(variants * count, first + ENCODED))
            x, _ = images.batch([k % count for k in picks], Draws(seed, picks))
            with torch.no_grad(), torch.autocast(where.type, enabled=False):
                parts.append([each.cpu() for each in codec.encode(x)])
        self.means, self.spreads = map(torch.cat, zip(*parts, strict=True))

    def batch(self, positions: Sequence[int], noise: Tensor) -> Tensor:
        """Latents (B, c, h, w) at positions, drawn by standard-normal `noise`."""
        return self.means[list(positions)] + self.spreads[list(positions)] * noise


class Encoded:
    """The latents of captioned images as a set; labels are positions of captions."""

    def __init__(self, latents: Latents, count: int) -> None:
        self.latents, self.count = latents, count

    def batch(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        noise = draws.normal("augment", self.latents.means.shape[1:])
        return self.latents.batch(positions, noise), torch.tensor(positions) % self.count


class Stored:
    """The images of pairs as a set: x0 and labels, of classes or positions of prompts."""

    def __init__(self, store: PairStore) -> None:
        self.store = store

    def batch(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        pairs = self.store.batch(positions)
        return pairs["x0"], pairs["label"]


class ToBeMade:
    """Pairs that are not there yet, in a plan: images and conditions that the teacher would take."""

    def __init__(self, teacher: Model) -> None:
        self.kind, self.classes, self.shape = teacher.codec.kind, list(teacher.conditioner.classes), expected(teacher)
        self.about = f"pairs of {teacher.lineage.name}, which are not there yet"

    def __len__(self) -> int:
        return 1

    def batch(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a plan reads no data")

    def captions(self, positions: Sequence[int]) -> list[str]:
        return [""] * len(positions)


def read(config: ConfigT, teacher: Model | None, job: Job, method: str) -> tuple[ConfigT, Images | PairStore]:
    """What the key `data` names, by default the teacher's own set, and the config with its resolved name. Pairs are verified.

    A plan takes a folder that is not there for pairs that will be made.
    """
    asked: Any = config
    if job.dry_run and teacher is not None and asked.data and Path(asked.data).name != asked.data and not Path(asked.data).exists():
        planned = ToBeMade(teacher)
        job.say_read(teacher, planned)
        return config, planned
    if asked.data and (Path(asked.data) / MANIFEST).is_file():
        unused(config, "flip", "resolution", "variants", why=f"--data {asked.data} holds pairs")
        store = PairStore(Path(asked.data), config.out)
        job.say_read(teacher, store)
        if not job.dry_run:
            store.verify()
        return config, store
    config = config.model_copy(update={"data": images_of(asked.data, asked.teacher, teacher, method)})
    return config, job.images(config, teacher)


def unused(config: TrainingConfig, *keys: str, why: str) -> None:
    """Raise UsageError where one of the keys is given, though it changes nothing."""
    if given := config.changed(*keys):
        raise UsageError(f"{given[0]} has no use here: {why}", "leave it out")


class Source:
    """Training data for a model that exists: `model` is the given one at the size and for the prompts of the data."""

    def __init__(self, config: Any, model: Model, data: Images | PairStore, planned: bool) -> None:
        self.config = config
        self.store = data if isinstance(data, PairStore) else None
        self.images = None if isinstance(data, PairStore) else data
        self.model = prompted(config, model, data)
        self.captioned = self.images is not None and bool(self.model.conditioner.prompts)
        if not self.captioned and self.store is None:
            unused(config, "variants", why=f"{model.lineage.name} works on pixels")
        self.identity: dict[str, Any] = {}
        folder, dtype = (config.out or Path(), "float16") if self.store is None else (self.store.folder, self.store.manifest.dtype)
        if not planned:  # a plan has no embeddings
            self.identity |= self.model.conditioner.digests()
            self.model = replace(self.model, conditioner=self.model.conditioner.stored(folder, dtype))
        if self.store is not None:
            self.identity["data"] = self.store.manifest.settings_hash
        variants = config.variants if self.captioned else 1
        some, _ = split(data, getattr(config, "holdout", 0.0), config.seed)  # type: ignore[arg-type]
        self.seen = [k * len(data) + position for k in range(variants) for position in some]
        self.order = Order(config.seed, len(self.seen))

    def prepare(self, where: torch.device, run: Run) -> Examples:
        """Encode captioned images, and make the embeddings of prompts that are missing; the text encoder is on the CPU then."""
        source: Any = self.images if self.store is None else Stored(self.store)
        if self.store is not None:
            self.store.verified.save(elsewhere=True)  # of a read-only store, in the run's folder
        with preparing(where, f"resume with --resume {run.folder}") as stop:
            if self.images is not None and self.captioned:
                latents = Latents(self.images, self.model.codec, where, self.config.variants, self.config.seed, stop)
                source = Encoded(latents, len(self.images))
            self.model.conditioner.complete(where, stop)
        return Examples(source, self.order, self.model.conditioner, getattr(self.config, "label_dropout", 0.0), self.seen)

    @property
    def name(self) -> str:
        """The images' name for a student's lineage; '' for pairs, whose images are the teacher's."""
        return self.config.data or "" if self.store is None else ""

    @property
    def learned(self) -> list[int] | None:
        """The classes of pairs that are of some alone."""
        classes = sorted(self.store.manifest.classes) if self.store is not None else []
        return classes if 0 < len(classes) < len(self.model.conditioner.classes) else None


def prompted(config: Any, model: Model, data: Images | PairStore) -> Model:
    """The model at the size and for the prompts of what noise is added to. Raises UsageError for what it has not learned."""
    takes = model.conditioner.takes == "prompts"
    if isinstance(data, PairStore):
        manifest = data.manifest
        if model.codec.factor > 1:
            model = model.with_size(manifest.shape[1:])
        if tuple(manifest.shape) != model.shape or bool(manifest.prompts) != takes:
            told = "prompts" if manifest.prompts else f"{len(manifest.classes)} classes"
            raise UsageError(f"--data {config.data}: pairs of {tuple(manifest.shape)} and {told}, the teacher's are {model.shape}")
        return model.with_prompts(in_turn(data.prompts(), len(data)), manifest.negative_prompt) if takes else model
    check_images(config.data, model, data)
    if not takes:
        return model
    if not isinstance(data, Captioned):
        raise UsageError(f"--data {config.data}: has no captions", HINT)
    return model.with_prompts(data.captions(range(len(data))))

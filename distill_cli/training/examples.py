"""Training data: pictures and their conditions, a share of which is replaced by the null condition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill_cli.config import BUILTIN_SETS, TrainingConfig
from distill_cli.data import Images
from distill_cli.data.images import ReadAhead
from distill_cli.diffusion.condition import Condition, dropped
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.models.conditioners import Conditioner
from distill_cli.models.model import Model

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


class Examples:
    """Pictures in the order of `order` over the positions `seen` (default: all), with class conditions; a share `dropout` is null."""

    def __init__(self, images: Images, order: Order, conditioner: Conditioner, dropout: float, seen: Sequence[int] | None = None) -> None:
        self.images, self.order, self.conditioner, self.dropout = images, order, conditioner, dropout
        self.seen = range(len(images)) if seen is None else seen

    def positions(self, draws: Draws) -> list[int]:
        """Of the samples of `draws`."""
        return [self.seen[self.order[i]] for i in draws.indices]

    def ahead(self, draws: Draws) -> None:
        """Begin to read the samples of `draws`."""
        read_ahead(self.images, self.positions(draws))

    def batch(self, draws: Draws, where: torch.device) -> tuple[Tensor, Condition]:
        """x0 (B, C, H, W) and the condition of the samples of `draws`, on a device."""
        x, labels = self.images.batch(self.positions(draws), draws)
        conditioner, uniform = self.conditioner, draws.uniform("label_dropout")
        return sent(x, where), dropped(conditioner(labels), conditioner.null, uniform, self.dropout).to(where)  # one copy, not three


def read_ahead(images: Images, positions: Sequence[int]) -> None:
    """Begin to read what a set has at `positions`, if it is not in memory."""
    if isinstance(images, ReadAhead):
        images.ahead(positions)


def images_of(given: str | None, name: str | None, teacher: Model | None, method: str) -> str:
    """The set of real images: the one given, else that which the teacher called `name` has learned, where it is at hand."""
    known = given or (name if name in BUILTIN_SETS else teacher.lineage.data if teacher is not None else "")
    if given or (known and (known in BUILTIN_SETS or Path(known).is_dir())):
        return str(known)
    raise UsageError(f"--data: {method} learns from real images, and none are given", "--data FOLDER --resolution PIXELS, or --data digits")


def expected(model: Model) -> tuple[int, int, int]:
    """(C, H, W) of the images that a model learns from."""
    channels, height, width = model.shape
    factor = model.codec.factor
    return (channels if factor == 1 else 3, height * factor, width * factor)


def check_images(data: str | None, model: Model, images: Images) -> None:
    """Refuse images of another shape or with other classes than the model's."""
    if tuple(images.shape) != expected(model):
        raise UsageError(f"--data {data}: {images.kind.name} of {tuple(images.shape)}, the teacher's are {expected(model)}")
    if model.conditioner.classes and len(images.classes) != len(model.conditioner.classes):
        raise UsageError(f"--data {data}: {len(images.classes)} classes, the teacher has {len(model.conditioner.classes)}")


def without_null(config: ConfigT, teacher: Model | None, asked: bool, why: str = "") -> tuple[ConfigT, str]:
    """The config without label dropout for a teacher that has classes and no null class, or `why` else, and the line that says so.

    Raises UsageError where label dropout was `asked` for.
    """
    dropout: Any = getattr(config, "label_dropout", 0.0)
    if not why and teacher is not None and teacher.conditioner.classes and teacher.conditioner.null is None:
        why = f"{teacher.lineage.name} was trained without label dropout: it has no null class"
    if not why or not dropout:
        return config, ""
    if asked:
        raise UsageError(f"label_dropout {dropout:g}: {why}", "label_dropout=0, or leave it out")
    return config.model_copy(update={"label_dropout": 0.0}), f"label_dropout 0: {why}"

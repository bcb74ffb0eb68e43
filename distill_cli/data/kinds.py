"""Kinds of data: what sets hold and models make, how it is written to files, and what knows how to learn and measure it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from torch import Tensor

from distill_cli.data.pictures import finished, from_uint8
from distill_cli.errors import UsageError


class Kind(ABC):
    """A kind of data, (B, C, H, W) float32 inside. What lies on higher floors is named as "module:attribute" inside this package."""

    name: ClassVar[str]
    """What one calls several of them."""
    new: ClassVar[str]
    """The function that makes an untrained model: (images, network options, schedule, parameterisation, lineage, seed) -> Model."""
    measure: ClassVar[str]
    """The class of evaluate that measures against a set (evaluate/report.py, Measure)."""
    trace: ClassVar[str]
    """The class that shows the process (trace/job.py, Trace)."""
    formats: ClassVar[tuple[str, ...]]
    """How samples may be written; the first is the default."""
    drawn: ClassVar[bool]
    """Whether they are pictures: they have a resolution, and stand in grids and comparisons."""

    def needs_pictures(self, what: str, hint: str = "leave it out") -> None:
        """Raise UsageError, which names the option or command `what`, unless they are pictures."""
        if not self.drawn:
            raise UsageError(f"{what}: for pictures, not for {self.name}", hint)

    def format(self, asked: str | None) -> str:
        """The format of samples. Raises UsageError for one that they cannot have."""
        if asked not in (None, *self.formats):
            raise UsageError(f"--format {asked}: for pictures, not for {self.name}", f"--format {self.formats[0]}")
        return asked or self.formats[0]

    @abstractmethod
    def size(self, picture: str) -> str:
        """What a model makes, in words; `picture` is its size in pixels."""

    @abstractmethod
    def written(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape (C, H, W) of a model's data once they are read again from a file."""

    @abstractmethod
    def stored(self, x: Tensor) -> np.ndarray:
        """Data (B, C, H, W) as they are written. Raises DistillError if a value is not finite."""

    @abstractmethod
    def read(self, stored: np.ndarray, where: str) -> Tensor:
        """Data (N, C, H, W) of arr_0 in an npz file. Raises UsageError, which begins with `where`, for another type or layout."""


class Pictures(Kind):
    """Pictures (B, C, H, W) in [-1, 1], grey or in colour; uint8 in files."""

    name, new, measure, trace = "images", "models.pixel:new", "evaluate.pictures:Against", "trace.pictures:Pictures"
    formats, drawn = ("png", "npz"), True

    def size(self, picture: str) -> str:
        return f"{picture} pixels"

    def written(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return 3, *shape[1:]  # grey pictures are stored as colour ones

    def stored(self, x: Tensor) -> np.ndarray:
        return finished(x)

    def read(self, stored: np.ndarray, where: str) -> Tensor:
        check_pictures(stored, where)
        return from_uint8(stored)


def check_pictures(stored: np.ndarray, where: str) -> None:
    """Raise UsageError, which begins with `where`, unless arr_0 of an npz file is pictures."""
    if stored.dtype != np.uint8 or stored.ndim != 4 or stored.shape[3] != 3:
        raise UsageError(f"{where}: arr_0 is {stored.dtype} {stored.shape}, not uint8 (N, H, W, 3)", _as_expected(stored))


def _as_expected(images: np.ndarray) -> str:
    """A hint: how to turn images of another type or layout into uint8 (N, H, W, 3)."""
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        return "channels come last: x.transpose(0, 2, 3, 1)"
    if images.dtype.kind == "f":
        return "for values in [0, 1]: (255 * x).round().astype('uint8')"
    return "three channels of 0 to 255, channels last"


PICTURES: Kind = Pictures()

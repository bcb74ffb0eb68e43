"""Where samples come from that are measured: npz files, folders, sets. Pictures are read a part at a time, and never all together."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_cli.data import Images
from distill_cli.data.folders import pictures_below
from distill_cli.data.images import Folder
from distill_cli.data.kinds import PICTURES, Kind, check_pictures
from distill_cli.data.npz import Rows
from distill_cli.data.opened import unread
from distill_cli.data.pictures import from_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.files import reading
from distill_cli.models.sources.registry import MARKS, PARTS

AGAIN = "write it again with `distill sample --format npz`"
RUN = "recipe.yaml"
READERS = 16
ORIENTATION, TURNED = 274, (5, 6, 7, 8)
"""Tag of EXIF, and its values for pictures that lie on their side."""


class Source(ABC):
    """Samples that are read by position. `shape` is (C, H, W), `about` says what was read."""

    kind: Kind = PICTURES
    shape: tuple[int, int, int]
    about: str
    classes: tuple[str, ...] = ()
    """The names of the labels, where the source knows them."""
    labels: Tensor | None = None
    """(N,) the class that each sample is of, or was asked to be."""
    place: Path | None = None
    """The folder in which features of the samples are kept; None: in that of the evaluation."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, part: range) -> Tensor:
        """Samples `part` (B, C, H, W) float32, pictures in [-1, 1]."""

    @abstractmethod
    def state(self, part: range) -> Any:
        """What changes when samples `part` change: it tells whether features that are kept are theirs still."""

    def digest(self, part: range) -> str:
        """SHA-256 of `state`."""
        return hashlib.sha256(json.dumps([self.shape, self.state(part)]).encode()).hexdigest()


class Given(Source):
    """Samples in memory."""

    def __init__(self, x: Tensor, labels: Tensor | None, kind: Kind, about: str) -> None:
        self.x, self.labels, self.kind, self.about = x, labels, kind, about
        self.shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, part: range) -> Tensor:
        return self.x[part.start : part.stop]

    def state(self, part: range) -> Any:
        return hashlib.sha256(self.batch(part).numpy().tobytes()).hexdigest()


class File(Source):
    """Pictures of an npz file: arr_0, uint8 (N, H, W, 3), and arr_1, labels (N,), which count if one is not 0."""

    def __init__(self, path: Path, flag: str) -> None:
        if not path.exists():
            raise UsageError(f"{flag} {path}: no such file")
        self.rows = Rows(path, AGAIN)
        check_pictures(np.broadcast_to(np.zeros((), self.rows.dtype), self.rows.shape), f"{flag} {path}")
        self.shape = (3, self.rows.shape[1], self.rows.shape[2])
        self.labels = labels_of(self.rows.labels, len(self.rows), f"{flag} {path}")
        self.place = path.with_name(f".{path.name}.features")
        self.path = path
        self.about = f"{len(self)} images of {path}"

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, part: range) -> Tensor:
        return from_uint8(self.rows.read(part).copy())

    def state(self, part: range) -> Any:
        with reading(self.path):
            found = os.stat(self.path)
        return [found.st_size, found.st_mtime_ns, part.start, part.stop]


def labels_of(labels: np.ndarray | None, count: int, where: str) -> Tensor | None:
    """Labels (N,) of an npz file; None if there are none, or all are 0, as models without classes have them."""
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (count,)):
        raise UsageError(f"{where}: arr_1 is {labels.dtype} {labels.shape}", "whole numbers, one an image, are expected")
    return torch.from_numpy(np.asarray(labels, np.int64)) if labels is not None and labels.any() else None


class Pictures(Source):
    """The pictures below a folder, in the order of their paths; the first level of subfolders, if any, names their classes.

    With a `resolution` they are scaled and cropped as for training; without one all must have the same size, and are taken as they are.
    """

    def __init__(self, path: Path, flag: str, resolution: int | None = None) -> None:
        try:
            self.images = Folder(path, resolution or 1)
        except DistillError as error:
            error.message = error.message.replace("--data", flag, 1)
            raise
        if resolution is None:
            self.images.shape = (3, *self._size(flag))
        self.shape, self.root = self.images.shape, path
        self.classes = tuple(self.images.classes)
        self.labels = torch.tensor(self.images.labels) if self.classes else self._asked()
        self.place = path / ".features"
        self.about = self.images.about

    def _size(self, flag: str) -> tuple[int, int]:
        """Height and width of the pictures, from their headers. Raises UsageError if not all have the same."""
        from PIL import Image

        def size(path: Path) -> tuple[int, int]:
            try:
                with Image.open(path) as opened:
                    turned = opened.getexif().get(ORIENTATION) in TURNED
                    return opened.size if turned else (opened.size[1], opened.size[0])
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
                raise unread(path, error) from error

        with ThreadPoolExecutor(READERS) as pool:
            sizes = list(pool.map(size, self.images.files))
        for file, found in zip(self.images.files, sizes, strict=True):
            if found != sizes[0]:
                said = [f"{name.name} is {width}x{height}" for name, (height, width) in ((self.images.files[0], sizes[0]), (file, found))]
                raise UsageError(
                    f"{flag} {self.images.root}: pictures of mixed sizes: {', '.join(said)}", "resolution=N crops them to N pixels"
                )
        return sizes[0]

    def _asked(self) -> Tensor | None:
        """The labels in samples.jsonl, if `distill sample` has written these pictures for classes; else None."""
        try:
            lines = [json.loads(line) for line in (self.root / "samples.jsonl").read_text().splitlines()]
            asked = {line["file"]: int(line["label"]) for line in lines}
            return torch.tensor([asked[file.name] for file in self.images.files])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, part: range) -> Tensor:
        return self.images.batch(part, Draws(0, part))[0]

    def state(self, part: range) -> Any:
        out = []
        with reading(self.root):
            for file in self.images.files[part.start : part.stop]:
                found = os.stat(file)
                out.append([str(file.relative_to(self.root)), found.st_size, found.st_mtime_ns])
        return out


class Drawn(Source):
    """Pictures of a built-in set, by `positions`; what is random in them is drawn with `seed`."""

    def __init__(self, images: Images, positions: Sequence[int], seed: int) -> None:
        self.images, self.positions, self.seed = images, positions, seed
        self.shape = tuple(images.shape)  # type: ignore[assignment]
        self.classes, self.about, self.kind = tuple(images.classes), images.about, images.kind
        labels = getattr(images, "labels", None)
        self.labels = torch.as_tensor(labels)[list(positions)] if self.classes and labels is not None else None

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, part: range) -> Tensor:
        return self.images.batch([self.positions[i] for i in part], Draws(self.seed, part))[0]

    def state(self, part: range) -> Any:
        return [self.about, self.seed, part.start, [self.positions[i] for i in part]]


def is_pictures(spec: str) -> bool:
    """Whether a name is that of a folder with pictures which is no model's and no run's."""
    path = Path(spec)
    if not path.is_dir() or any((path / each / name).exists() for each in ("", *PARTS) for name in (*MARKS, RUN)):
        return False
    return bool(pictures_below(path).files)


def open_source(spec: str, flag: str, resolution: int | None = None) -> Source | None:
    """The pictures of an npz file or of a folder of pictures; None for another name."""
    if spec.lower().endswith(".npz"):
        return File(Path(spec), flag)
    return Pictures(Path(spec), flag, resolution) if is_pictures(spec) else None

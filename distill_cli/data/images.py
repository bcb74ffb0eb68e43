"""Sets of labelled images, read by position."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from distill_cli.config import BUILTIN_SETS
from distill_cli.data.captions import captions_of
from distill_cli.data.folders import SUFFIXES, pictures_below
from distill_cli.data.kinds import PICTURES, Kind
from distill_cli.data.opened import open_picture
from distill_cli.data.pictures import from_uint8
from distill_cli.diffusion.noise import Draws, permutation
from distill_cli.errors import DistillError, UsageError, nearest, printable
from distill_cli.methods.registry import load
from distill_cli.processes import local_world_size, say, say_hidden, usable_cpus

if TYPE_CHECKING:
    import PIL.Image


class Images(Protocol):
    """A labelled set: `classes` are the names of the labels (may be empty), `shape` is (C, H, W), `about` reports what was read."""

    kind: Kind
    classes: list[str]
    shape: tuple[int, int, int]
    about: str

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        """Data (B, C, H, W) float32, pictures in [-1, 1], and labels (B,) int64; random augmentation comes from `draws`."""


@runtime_checkable
class ReadAhead(Protocol):
    """A set whose data are read when they are asked for."""

    def ahead(self, positions: Sequence[int]) -> None:
        """Begin to read the data at `positions`, for which `batch` is asked soon."""


@runtime_checkable
class Captioned(Images, Protocol):
    """A set whose pictures have captions."""

    def captions(self, positions: Sequence[int]) -> list[str]:
        """The captions of the pictures at `positions`."""


def hue_to_rgb(hue: Tensor) -> Tensor:
    """Fully saturated colours (B, 3) in [0, 1], largest channel 1, from hues (B,) in [0, 1): 0 red, 1/3 green, 2/3 blue."""
    ramp = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    return 1 - torch.minimum(ramp, 4 - ramp).clamp(0, 1)


class Digits:
    """The 1,797 handwritten digits of scikit-learn, enlarged to 16x16, in coloured ink on black.

    A pixel is its grey level in [0, 1] times an ink of random hue, scaled to [-1, 1]; the maximum over channels is the grey picture.
    """

    kind = PICTURES
    classes = [str(digit) for digit in range(10)]
    shape = (3, 16, 16)
    about = "1797 pictures of 10 classes in digits"

    def __init__(self) -> None:
        stored = load_file(Path(__file__).with_name("digits.safetensors"))
        grey = stored["images"][:, None].float() / 16
        self.grey = F.interpolate(grey, size=16, mode="bilinear", align_corners=False)
        self.labels = stored["labels"].long()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        ink = hue_to_rgb(draws.uniform("augment").float())
        return self.grey[list(positions)] * ink[:, :, None, None] * 2 - 1, self.labels[list(positions)]


def cover(picture: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """The picture scaled to cover height x width and cropped at the centre; unchanged if it has that size."""
    from PIL import Image, ImageOps

    return picture if picture.size == (width, height) else ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def fit(picture: PIL.Image.Image, height: int, width: int) -> Tensor:
    """The picture as (3, height, width) in [-1, 1], resized by `cover`."""
    return from_uint8(np.asarray(cover(picture, height, width))[None].copy())[0]


class Folder:
    """Image files below a folder; the first level of subfolders, if any, names the classes. Captions are read when they are asked for.

    Pictures are read on demand, scaled so that the shorter side fits, and cropped at the centre; alpha is composed onto white.
    """

    kind = PICTURES

    def __init__(self, path: Path, resolution: int, flip: bool = False) -> None:
        if not path.is_dir():
            raise DistillError(f"--data {path}: {'no folder' if path.exists() else 'no such folder'}")
        found = pictures_below(path)
        self.files = found.files
        if not self.files:
            raise DistillError(f"--data {path}: no images in it{found.without}", f"file names end in {', '.join(SUFFIXES)}")
        tops = [f.relative_to(path).parts for f in self.files]
        names = sorted({parts[0] for parts in tops if len(parts) > 1})
        self.classes = [printable(name) for name in names]
        if names and any(len(parts) == 1 for parts in tops):
            stray = next(f for f, parts in zip(self.files, tops, strict=True) if len(parts) == 1)
            raise DistillError(f"--data {path}: {stray.name} is in no class", "move it into a subfolder, or have no subfolders")
        self.labels = [names.index(parts[0]) if names else 0 for parts in tops]
        self.words: dict[Path, str] | None = None
        self.root, self.digest = path, ""  # listing.prepare fills in the digest
        self.rows: list[list[Any]] = []  # and these rows of pictures.jsonl
        self.shape = (3, resolution, resolution)
        self.resolution, self.flip = resolution, flip
        self.said = False
        of = f" of {len(self.classes)} class{'es' * (len(self.classes) > 1)}" if self.classes else ""
        self.about = f"{len(self.files)} picture{'s' * (len(self.files) > 1)}{of} in {path}{found.without}"
        self.readers = ThreadPoolExecutor(max(1, usable_cpus() // local_world_size()))  # PIL releases Python's lock
        self.coming: dict[int, Future[tuple[np.ndarray, str]]] = {}

    def __len__(self) -> int:
        return len(self.files)

    def captions(self, positions: Sequence[int]) -> list[str]:
        """The captions of the pictures at `positions`. Raises UsageError where the folder lacks some."""
        if self.words is None:
            self.words = dict(zip(self.files, captions_of(self.root, self.files), strict=True))
        return [self.words[self.files[position]] for position in positions]

    def _read(self, position: int) -> tuple[np.ndarray, str]:
        picture = open_picture(self.files[position])
        return np.asarray(cover(picture.image, *self.shape[1:])), picture.dark

    def ahead(self, positions: Sequence[int]) -> None:
        self.coming |= {each: self.readers.submit(self._read, each) for each in dict.fromkeys(positions) if each not in self.coming}

    def batch(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        self.ahead(positions)
        coming = [self.coming[position] for position in positions]
        for position in positions:
            self.coming.pop(position, None)  # a position may come twice
        read, dark = zip(*(each.result() for each in coming), strict=True)
        if any(dark) and not self.said:
            self.said = True
            say(printable(next(filter(None, dark))))
        images = from_uint8(np.stack(read))
        if self.flip:
            mirrored = draws.uniform("augment") < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return images, torch.tensor([self.labels[p] for p in positions])


HELD_OUT_EPOCH = 2**40
"""Epoch whose permutation chooses the held-out images; no training gets that far."""


def split(images: Images, holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions of training images, and of held-out images: the share `holdout`, chosen by `seed`."""
    positions = permutation(seed, HELD_OUT_EPOCH, len(images)).tolist()
    count = round(holdout * len(images))
    if count == len(images):
        raise UsageError(f"holdout {holdout:g}: leaves none of {count} images to train on")
    return positions[count:], positions[:count]


def open_images(name: str, resolution: int | None = None, flip: bool = False) -> Images:
    """A built-in set by name, or a folder at `resolution` pixels."""
    if name in BUILTIN_SETS:
        say_hidden("data", name, "the built-in set")
        images: Images = load(BUILTIN_SETS[name])()
        if resolution is not None:
            images.kind.needs_pictures(f"resolution {resolution}")
        if resolution not in (None, images.shape[-1]):
            raise UsageError(f"resolution {resolution}: {name} has {images.shape[-1]} pixels")
        if flip:
            raise UsageError(f"flip: {name} must not be mirrored")
        return images
    if not Path(name).exists():
        raise UsageError(f"--data {name}: no built-in set and no folder of that name", nearest(name, BUILTIN_SETS, "built in"))
    if not Path(name).is_dir():
        raise UsageError(f"--data {name}: a file, and a set is a folder or built in", f"built in: {', '.join(BUILTIN_SETS)}")
    if resolution is None:
        raise UsageError(f"--data {name}: a folder needs resolution=PIXELS")
    return Folder(Path(name), resolution, flip)

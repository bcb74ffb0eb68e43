"""Sets of labelled images that training draws from by position."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from distill_cli.config import BUILTIN_SETS
from distill_cli.data.folders import SUFFIXES, pictures_below
from distill_cli.data.listing import unread
from distill_cli.data.pictures import from_uint8
from distill_cli.data.shapes import Shapes
from distill_cli.diffusion.noise import Draws, permutation
from distill_cli.errors import DistillError, UsageError, nearest, printable
from distill_cli.processes import say_hidden

if TYPE_CHECKING:
    import PIL.Image


class Images(Protocol):
    """A labelled set: `classes` names the labels (empty: none), `shape` is (C, H, W), `about` says what was read and left out."""

    classes: list[str]
    shape: tuple[int, int, int]
    about: str

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 in [-1, 1] and labels (B,) int64; what is random in them comes from `draws`."""


@runtime_checkable
class Captioned(Images, Protocol):
    """A set whose pictures have captions."""

    def captions(self, positions: Sequence[int]) -> list[str]:
        """What the pictures at `positions` show."""


def hue_to_rgb(hue: Tensor) -> Tensor:
    """Fully saturated colours (B, 3) in [0, 1], largest channel 1, of hues (B,) in [0, 1): 0 red, 1/3 green, 2/3 blue."""
    ramp = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    return 1 - torch.minimum(ramp, 4 - ramp).clamp(0, 1)


class Digits:
    """The 1,797 handwritten digits of scikit-learn, enlarged to 16x16, in coloured ink on black.

    Grey level in [0, 1] times an ink of uniform hue, scaled to [-1, 1]: the maximum over the channels is the grey picture.
    """

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


BITS, PHOTOMETRIC = 258, 262
"""Tags of TIFF: bits a sample, and whether 0 is black (1) or white (0)."""
DARK = 16
"""Of 255: the largest value of 12 bits in 16."""


class Picture(NamedTuple):
    """A picture upright, as RGB, with an alpha channel laid on white."""

    image: PIL.Image.Image
    transparent: bool
    """Whether it had an alpha channel that showed."""
    dark: str
    """What is to be said of one that fills a small part of its 16 bits; '' of others."""


def open_picture(path: Path) -> Picture:
    """Read a picture. Its depth is the format's: 8 bits a channel or fewer, 16 bits, or floats from 0 to 1; others are refused."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            deep = ";16" in str(opened.tile)  # as its data are packed: Pillow takes the upper 8 of colours' 16 bits
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):  # Pillow would cut off what is over 255
                upright = _of_white(np.asarray(upright).astype(np.float64), opened)
            picture = upright.convert("RGBA")
    except DistillError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
        raise unread(path, error) from error
    background = Image.new("RGBA", picture.size, "white")
    colours: Any = picture.convert("RGB").getextrema() if deep else ()
    dark = deep and max(most for _, most in colours) <= DARK
    transparent = picture.getchannel("A").getextrema() != (255, 255)
    said = f"{path}: 16 bits a channel, and no value over a sixteenth of white: read as they stand, so it is dark" if dark else ""
    return Picture(Image.alpha_composite(background, picture).convert("RGB"), transparent, said)


def _of_white(grey: np.ndarray, opened: PIL.Image.Image) -> PIL.Image.Image:
    """Grey values (H, W) of more than 8 bits as a picture of 8; raises DistillError where nothing says which of them is white."""
    from PIL import Image

    tags = getattr(opened, "tag_v2", {})
    bits = tags.get(BITS, (0,))[0]
    white = 1 if opened.mode == "F" else 4095 if bits == 12 else 65535
    if opened.mode == "I" and opened.format not in ("PNG", "PPM"):  # whose 16 bits Pillow gives in 32
        raise _depth(opened, "signed integers of 16 bits" if bits == 16 else "integers of 32 bits")
    if not (grey.min() >= 0 and grey.max() <= white):
        raise _depth(opened, f"floats from {grey.min():.4g} to {grey.max():.4g}")
    if tags.get(PHOTOMETRIC) == 0:  # white is zero
        grey = white - grey
    return Image.fromarray((grey / (white / 255)).round().astype(np.uint8))


def _depth(opened: PIL.Image.Image, what: str) -> DistillError:
    path = getattr(opened, "filename", "")
    return DistillError(f"{path}: {what}: nothing says which is white", "save it with 8 or 16 bits a channel, or as floats from 0 to 1")


def cover(picture: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """The picture scaled so that it covers height x width, cut in the centre; as it is where it fits."""
    from PIL import Image, ImageOps

    return picture if picture.size == (width, height) else ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def fit(picture: PIL.Image.Image, height: int, width: int) -> Tensor:
    """(3, height, width) in [-1, 1], by `cover`."""
    return from_uint8(np.asarray(cover(picture, height, width))[None].copy())[0]


class Folder:
    """Image files below a folder; the first level of subfolders, if any, names the classes.

    Pictures are scaled so that the shorter side fits, cut in the centre, and read on demand; an alpha channel is
    laid on white.
    """

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
        self.root, self.digest = path, ""  # the digest is listing.prepare's
        self.shape = (3, resolution, resolution)
        self.resolution, self.flip = resolution, flip
        self.said = False
        of = f" of {len(self.classes)} class{'es' * (len(self.classes) > 1)}" if self.classes else ""
        self.about = f"{len(self.files)} picture{'s' * (len(self.files) > 1)}{of} in {path}{found.without}"
        self.readers = ThreadPoolExecutor(torch.get_num_threads())  # PIL decodes and scales without Python's lock

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, position: int) -> np.ndarray:
        picture = open_picture(self.files[position])
        if picture.dark and not self.said:
            self.said = True
            print(picture.dark, file=sys.stderr)
        return np.asarray(cover(picture.image, self.resolution, self.resolution))

    def batch(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor]:
        images = from_uint8(np.stack(list(self.readers.map(self._read, positions))))
        if self.flip:
            mirrored = draws.uniform("augment") < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return images, torch.tensor([self.labels[p] for p in positions])


BUILTIN = dict(zip(BUILTIN_SETS, (Digits, Shapes), strict=True))
HELD_OUT_EPOCH = 2**40
"""The permutation that chooses the held-out images: one that no training reaches."""


def split(images: Images, holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions to train on, and those held out: the share `holdout`, chosen by `seed`."""
    positions = permutation(seed, HELD_OUT_EPOCH, len(images)).tolist()
    count = round(holdout * len(images))
    if count == len(images):
        raise UsageError(f"holdout {holdout:g}: leaves none of {count} images to train on")
    return positions[count:], positions[:count]


def open_images(name: str, resolution: int | None = None, flip: bool = False) -> Images:
    """A built-in set by name, or a folder at `resolution` pixels."""
    if name in BUILTIN:
        say_hidden("data", name, "the built-in set")
        images = BUILTIN[name]()
        if resolution not in (None, images.shape[-1]):
            raise UsageError(f"resolution {resolution}: {name} has {images.shape[-1]} pixels")
        if flip:
            raise UsageError(f"flip: {name} must not be mirrored")
        return images
    if not Path(name).exists():
        raise UsageError(f"--data {name}: no built-in set and no folder of that name", nearest(name, BUILTIN, "built in"))
    if resolution is None:
        raise UsageError(f"--data {name}: a folder needs resolution=PIXELS")
    return Folder(Path(name), resolution, flip)

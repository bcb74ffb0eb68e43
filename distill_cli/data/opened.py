"""Open picture files: broken ones, bit depth, transparency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distill_cli.errors import DistillError, reason
from distill_cli.files import unreadable

if TYPE_CHECKING:
    import PIL.Image


class BrokenPicture(DistillError):
    """A readable file that is not a usable picture."""

    def __init__(self, path: Path, what: str, hint: str = "remove or replace the file") -> None:
        super().__init__(f"{path}: {what}", hint)
        self.path = path


def unread(path: Path, error: Exception) -> DistillError:
    """The error to raise if PIL cannot open or decode `path`: the system's error, or BrokenPicture."""
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, DistillError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable(path, error)
    return BrokenPicture(path, f"not a readable image ({reason(error)})")


BITS, PHOTOMETRIC, KIND = 258, 262, 339
"""Tags of TIFF: bits per sample; 0 is black (1) or white (0); samples are unsigned (1), signed (2) or floats (3)."""
DARK = 16
"""Largest 8-bit value of a picture that keeps 12 bits in 16."""


class Picture(NamedTuple):
    """A picture: upright, RGB, an alpha channel composed onto white."""

    image: PIL.Image.Image
    transparent: bool
    """Whether it had an alpha channel that is not opaque."""
    dark: str
    """A warning if it uses a small part of its 16 bits, else ''."""


def header(path: Path) -> bool:
    """Whether a picture has several frames, from its header; raises DistillError if the header is wrong."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            _check_depth(opened, path)
            return bool(getattr(opened, "is_animated", False) or getattr(opened, "n_frames", 1) > 1)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
        raise unread(path, error) from error


def open_picture(path: Path) -> Picture:
    """Read the first frame of a picture.

    Channels may have up to 8 bits, 16 bits, or be floats from 0 to 1; other depths raise BrokenPicture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            _check_depth(opened, path)
            deep = ";16" in str(opened.tile)  # the packed format; for colours Pillow keeps the upper 8 of 16 bits
            clear = opened.info.get("transparency")  # one value, or one for each channel
            if deep and isinstance(clear, tuple):
                opened.info["transparency"] = tuple(value >> 8 for value in clear)
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):  # Pillow would clip at 255
                grey = np.asarray(upright).astype(np.float64)
                upright = _of_white(grey, opened, path)
                if isinstance(clear, int):
                    upright.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
            picture = upright.convert("RGBA")
    except Exception as error:
        raise unread(path, error) from error
    background = Image.new("RGBA", picture.size, "white")
    colours: Any = picture.convert("RGB").getextrema() if deep else ()
    dark = deep and max(most for _, most in colours) <= DARK
    transparent = picture.getchannel("A").getextrema() != (255, 255)
    said = f"{path}: 16 bits a channel, and no value over a sixteenth of white: read as they stand, so it is dark" if dark else ""
    return Picture(Image.alpha_composite(background, picture).convert("RGB"), transparent, said)


def _check_depth(opened: PIL.Image.Image, path: Path) -> None:
    """Raise BrokenPicture for a depth at which the value of white is unknown."""
    tags = getattr(opened, "tag_v2", {})
    bits = tags.get(BITS, (0,))[0]
    if opened.mode == "I" and bits != 16 and opened.format not in ("PNG", "PPM"):  # Pillow opens these formats' 16 bits as 32
        raise _depth(path, "integers of 32 bits")
    if 2 in tags.get(KIND, ()):
        raise _depth(path, f"signed integers of {bits} bits")


def _of_white(grey: np.ndarray, opened: PIL.Image.Image, path: Path) -> PIL.Image.Image:
    """Grey values (H, W) of more than 8 bits as an 8-bit picture; raises BrokenPicture if the value of white is unknown."""
    from PIL import Image

    tags = getattr(opened, "tag_v2", {})
    white = 1 if opened.mode == "F" else 4095 if tags.get(BITS, (0,))[0] == 12 else 65535
    if not (grey.min() >= 0 and grey.max() <= white):
        raise _depth(path, f"floats from {grey.min():.4g} to {grey.max():.4g}")
    if tags.get(PHOTOMETRIC) == 0:  # white is zero
        grey = white - grey
    return Image.fromarray((grey / (white / 255)).round().astype(np.uint8))


def _depth(path: Path, what: str) -> BrokenPicture:
    return BrokenPicture(path, f"{what}: nothing says which is white", "save it with 8 or 16 bits a channel, or as floats from 0 to 1")

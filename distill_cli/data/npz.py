"""npz files of images: arr_0, uint8 (N, H, W, 3), and arr_1, labels (N,). Nothing in them is unpickled."""

from __future__ import annotations

import errno
import io
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from distill_cli.errors import DistillError, reason
from distill_cli.files import reading, write_atomic


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


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images and labels to `path`, complete or absent."""
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images, arr_1=labels)
    write_atomic(path, buffer.getvalue())

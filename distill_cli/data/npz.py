"""npz files of images: arr_0, uint8 (N, H, W, 3), and arr_1, labels (N,). Nothing in them is unpickled."""

from __future__ import annotations

import errno
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from distill_cli.errors import DistillError, reason
from distill_cli.files import open_atomic, reading

PIECE = 1 << 20
"""Bytes of a member read at a time."""


@contextmanager
def opened(path: Path, hint: str) -> Iterator[Any]:
    """numpy's view of an npz file. What goes wrong inside the body becomes a DistillError that says what else the file is."""
    with reading(path), open(path, "rb") as file:
        begins = file.read(2)
    if begins != b"PK":
        raise DistillError(f"{path}: {'no npz file' if begins else 'empty'}", hint)
    try:
        with np.load(path, allow_pickle=False) as stored:
            yield stored
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError) as error:
        raise DistillError(f"{path}: corrupt", hint) from error
    except OSError as error:
        what = "corrupt" if error.errno in (None, errno.EINVAL) else os.strerror(error.errno).lower()  # EINVAL: of a place before its start
        raise DistillError(f"{path}: {what}", hint if what == "corrupt" else "") from error
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed as Python cannot
        raise DistillError(f"{path}: cannot be read ({reason(error)})", hint) from error


def read_npz(path: Path, hint: str = "delete it and run the same command again") -> tuple[np.ndarray, np.ndarray | None]:
    """arr_0, images, and arr_1, labels where the file has any; raises DistillError that says what else the file is."""
    with opened(path, hint) as stored:
        there = arrays(path, stored, ("arr_0", "arr_1"))
        names = stored.files
    if "arr_0" not in there:
        raise _without(path, names)
    return there["arr_0"], there.get("arr_1")


def arrays(path: Path, stored: Any, names: Collection[str]) -> dict[str, np.ndarray]:
    """Those arrays of an opened file that have one of these names."""
    return {name: _array(path, stored, name) for name in names if name in stored.files}


def _without(path: Path, names: list[str]) -> DistillError:
    """The error for a file without images."""
    what = "mean and covariance of features, no images" if {"mu", "sigma"} <= set(names) else "no arr_0"
    has = ", ".join(repr(name)[1:-1] for name in names[:8]) or "nothing"
    return DistillError(f"{path}: {what}: it has {has}", "np.savez(file, arr_0=images) of uint8 (N, H, W, 3)")


def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first index runs fastest, and type, from the head of an npy file."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


class Rows:
    """The images of an npz file, of which only those that are asked for are in memory. `shape` is arr_0's.

    The whole of arr_0 is read once, in pieces, and held against its checksum. Raises DistillError as `read_npz` does.
    """

    def __init__(self, path: Path, hint: str = "delete it and run the same command again") -> None:
        self.path, self.hint = path, hint
        self._read: Any = None
        self._whole: np.ndarray | None = None
        with opened(path, hint) as stored:
            if "arr_0" not in stored.files:
                raise _without(path, stored.files)
            self.labels = arrays(path, stored, ("arr_1",)).get("arr_1")
            with stored.zip.open("arr_0.npy") as member:
                self.shape, fortran, self.dtype = _header(member)
                self.begins = member.tell()
                if self.dtype.hasobject or fortran or not self.shape:
                    self._whole = _array(path, stored, "arr_0")  # raises for Python objects
                    return
                left = math.prod(self.shape) * self.dtype.itemsize
                while piece := member.read(PIECE):
                    left -= len(piece)
                if left:
                    raise ValueError("another length than its header says")
            entry = stored.zip.getinfo("arr_0.npy")
            self.packed = entry.compress_type != zipfile.ZIP_STORED
        self.place = self._member_begins(entry) + self.begins

    def _member_begins(self, entry: zipfile.ZipInfo) -> int:
        """The place in the file of a member's first byte: after its local header, which has a name and an extra field of its own."""
        with open(self.path, "rb") as file:
            file.seek(entry.header_offset)
            name, extra = struct.unpack("<26xHH", file.read(30))
        return entry.header_offset + 30 + name + extra

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, part: range) -> np.ndarray:
        """Images `part`. Of a compressed file what lies before is unpacked too, unless `part` follows what was read last."""
        if self._whole is not None:
            return self._whole[part.start : part.stop]
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if self.packed:
            content = self._unpacked(part.start * row, len(part) * row)
        else:
            with reading(self.path), open(self.path, "rb") as file:
                file.seek(self.place + part.start * row)
                content = file.read(len(part) * row)
        if len(content) != len(part) * row:
            raise DistillError(f"{self.path}: changed while it was read")
        return np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])

    def _unpacked(self, begins: int, count: int) -> bytes:
        """Bytes of a compressed arr_0."""
        with reading(self.path):
            if self._read is None or self._read.tell() - self.begins > begins:
                self._read = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115  read on by the next call
                _header(self._read)
            while (before := begins - (self._read.tell() - self.begins)) > 0:
                self._read.read(min(PIECE, before))
            return self._read.read(count)


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
            shape, _, dtype = _header(file)
        if math.prod(shape) * dtype.itemsize > stored.zip.getinfo(f"{name}.npy").file_size:  # more than is there
            raise EOFError from error
        raise
    if not isinstance(array, np.ndarray):  # numpy gives the bytes of what is no array
        raise DistillError(f"{path}: {name} is no array")
    return array


def write_npz(path: Path, parts: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write images, a part of them at a time, and their labels (N,) to `path`, complete or absent: the bytes of np.savez."""
    rest = iter(parts)
    first = next(rest)
    head = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": (len(labels), *first.shape[1:])}
    with open_atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, head)
            for part in chain([first], rest):
                member.write(np.ascontiguousarray(part).data)
        with archive.open("arr_1.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, labels, allow_pickle=False)

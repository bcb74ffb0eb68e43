"""Files that are complete or absent: write to a temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill_cli.errors import DistillError

TEMPORARY = ".tmp-"
A_DAY = 24 * 3600
LONGEST = 255
"""Most bytes that a file name may have."""
NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
NO_FOLDER_SYNC = NO_SYNC | {errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}
"""Errors of fsync on file systems that lack it, and of fsync on a folder: network disks and mounted object stores."""


def bounded(name: str, most: int = LONGEST) -> str:
    """`name`; if it has more than `most` bytes, its beginning and a digest of the whole."""
    content = os.fsencode(name)
    if len(content) <= most:
        return name
    digest = hashlib.sha256(content).hexdigest()[:12]
    return f"{content[: most - 13].decode(errors='ignore')}-{digest}"


_OURS = f"{TEMPORARY}{bounded(socket.gethostname(), 64)}+"  # no host name has a +


def _code(error: Exception) -> int | None:
    """The errno of an error, also of one that safetensors or tokenizers raise with it in the text; None for other errors."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"Os \{ code: (\d+)|\(os error (\d+)\)", str(error))
    return int(found[1] or found[2]) if found else None


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors (disk full, read-only, no permission) into a DistillError of one line."""
    try:
        yield
    except Exception as error:
        code = _code(error)
        if code is None or isinstance(error, DistillError):
            raise
        full, closed = "free some space and start again: finished files are kept", "choose a folder that you may write to"
        hints = {errno.EDQUOT: full, errno.ENOSPC: full, errno.EACCES: closed, errno.EROFS: closed}
        what = getattr(error, "strerror", None) or (os.strerror(code) if code else str(error))
        raise DistillError(f"{getattr(error, 'filename', None) or path}: {what.lower()}", hints.get(code, "")) from error


def unreadable(path: Path, error: OSError) -> DistillError:
    """The error for a file that the system does not let us read. Its content is unknown, so the text never calls it damaged."""
    if error.errno == errno.ELOOP:
        return DistillError(f"{path}: a symbolic link, which may lead anywhere", "put the file in its place: cp -rL FOLDER COPY copies so")
    return DistillError(f"{path}: {(error.strerror or str(error)).lower()}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """As os_errors, for reading a file: no hint about writing."""
    try:
        yield
    except OSError as error:
        raise unreadable(Path(error.filename or path), error) from error


@contextmanager
def open_plain(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file to read. Raises FileNotFoundError, and DistillError for a symbolic link or what else the system refuses."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, "rb") as file:
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error


def _temporary(path: Path) -> Path:
    """The name under which this process writes `path`."""
    return path.with_name(bounded(f"{_OURS}{os.getpid()}-{path.name}"))


def _sync(path: Path) -> None:
    """fsync a file or a folder, where the file system can: its content, or its names, then outlive a power cut."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (NO_FOLDER_SYNC if path.is_dir() else NO_SYNC):
            raise


def sync(path: Path) -> None:
    """fsync `path` and its folder, so that lines appended to it outlive a power cut."""
    with os_errors(path):
        if path.exists():
            _sync(path)
            _sync(path.parent)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`, which holds either all of it or its old content, even if the machine dies."""
    write_atomic_lines(path, [content])


def write_atomic_lines(path: Path, parts: Iterable[bytes | str | memoryview]) -> None:
    """As write_atomic, for content in parts that need not be in memory together."""
    with open_atomic(path) as handle:
        for part in parts:
            handle.write(part.encode(errors="backslashreplace") if isinstance(part, str) else part)


@contextmanager
def open_atomic(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write, which becomes `path` if the body succeeds, and is deleted otherwise."""
    path = Path(path)
    temporary = _temporary(path)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as handle:
                yield handle
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` if the body succeeds, replacing an older one, and is deleted otherwise."""
    path = Path(path)
    temporary = _temporary(path)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for name in temporary.rglob("*"):
                _sync(name)
            _sync(temporary)
            old = _temporary(path.with_name(f"old-{path.name}"))
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; whatever is there is deleted when the body ends."""
    temporary = _temporary(Path(path))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Rename a folder, then delete it, so that nobody sees it half deleted."""
    going = _temporary(path)
    os.replace(path, going)
    shutil.rmtree(going)


def is_empty(folder: Path) -> bool:
    """Whether `folder` is missing, or holds only temporary files (being written, or left by a killed process)."""
    return not folder.exists() or (folder.is_dir() and all(p.name.startswith(TEMPORARY) for p in folder.iterdir()))


def lives(process: str) -> bool:
    """Whether a process with this number exists on this machine."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _abandoned(path: Path) -> bool:
    """Whether a temporary file or folder has no writer: its process is dead, or it is another machine's and a day old."""
    if path.name.startswith(_OURS):
        return not lives(path.name[len(_OURS) :].split("-")[0])
    try:
        return time.time() - max(part.stat().st_mtime for part in (path, *path.rglob("*"))) > A_DAY
    except FileNotFoundError:  # finished in this moment
        return False


def remove_temporaries(folder: Path) -> None:
    """Delete temporary files that killed processes left in `folder`."""
    for path in filter(_abandoned, folder.glob(f"{TEMPORARY}*+*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(paths: Iterable[Path]) -> str:
    """The SHA-256 of files, of their names and bytes, in this order."""
    return hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in paths).encode()).hexdigest()


def sha256_plain(path: Path) -> str:
    """As sha256; raises as open_plain does."""
    with open_plain(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


_SEAL = re.compile(r'"seal": "([0-9a-f]{64})"')
_ZEROS = "0" * 64


def sealed(data: dict[str, Any], indent: int | None = None) -> str:
    """JSON of `data` with a field `seal`: the SHA-256 of the whole text, computed with the seal zeroed, so every flipped bit shows."""
    text = json.dumps({**data, "seal": _ZEROS}, indent=indent) + "\n"
    return text.replace(f'"seal": "{_ZEROS}"', f'"seal": "{hashlib.sha256(text.encode()).hexdigest()}"')


def unsealed(content: bytes) -> dict[str, Any]:
    """The data that `sealed` was given; raises ValueError for damaged text."""
    text = content.decode()
    found = _SEAL.search(text)
    if not found or hashlib.sha256(text.replace(found[1], _ZEROS, 1).encode()).hexdigest() != found[1]:
        raise ValueError("its checksum does not match")
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    data.pop("seal", None)
    return data


def read_plain(path: Path) -> bytes:
    """The bytes of a file; raises as open_plain does."""
    with open_plain(path) as file:
        return file.read()

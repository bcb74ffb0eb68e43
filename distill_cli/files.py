"""Files that are complete or absent: write to a temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_cli.errors import DistillError

TEMPORARY = ".tmp-"


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal (disk full, read-only, no permission) into one line."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space and start again: finished files are kept",
            errno.EACCES: "choose a folder that you may write to",
            errno.EROFS: "choose a folder that you may write to",
        }
        hint = hints.get(error.errno or 0, "")
        raise DistillError(f"{error.filename or path}: {(error.strerror or str(error)).lower()}", hint) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` so that `path` holds all of it or what it held before, even if the machine dies."""
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the body ends well and vanishes when it does not.

    An older folder at `path` is replaced.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for name in temporary.rglob("*"):
                _sync(name)
            _sync(temporary)
            if path.exists():
                old = path.with_name(f"{TEMPORARY}{os.getpid()}-old-{path.name}")
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder`.

    Only files of processes of this machine that no longer live are removed.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        owner = path.name[len(TEMPORARY) :].split("-")[0]
        if not (owner.isdigit() and Path(f"/proc/{owner}").exists()):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

"""Files of tensors that carry their own checksum, so every flipped bit shows; and a record of which files were verified already."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from distill_cli import processes
from distill_cli.errors import DistillError
from distill_cli.files import read_plain, sealed, unreadable, unsealed, write_atomic

DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""Types that a store may use for its tensors."""
_ZEROS = b"0" * 64


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to `path`, complete or absent. The header holds `metadata` and the file's SHA-256, computed with that field zeroed."""
    # one metadata key, because safetensors writes several in random order
    content = to_bytes(tensors, {"distill": json.dumps({**metadata, "sha256": _ZEROS.decode()})})
    place = content.index(_ZEROS)
    digest = hashlib.sha256(content).hexdigest().encode()
    write_atomic(path, content[:place] + digest + content[place + 64 :])


def check(path: Path, again: str, whole: bool = True) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The metadata of a file and the shapes of its tensors; raises DistillError, with the hint `again`, if it is damaged.

    `whole`: also compare the checksum; False for a file that was verified before.
    """
    try:
        content = read_plain(path) if whole else b""
        with safe_open(path, "pt") as handle:
            metadata = json.loads((handle.metadata() or {}).get("distill", "{}"))
            stored = str(metadata.get("sha256")).encode()
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise DistillError(f"{path}: missing", again.rpartition("and ")[2]) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, ValueError, AttributeError) as error:
        raise DistillError(f"{path}: corrupt or truncated", again) from error
    if whole and (len(stored) != 64 or hashlib.sha256(content.replace(stored, _ZEROS, 1)).hexdigest().encode() != stored):
        raise DistillError(f"{path}: corrupt: its checksum does not match", again)
    return metadata, shapes


LONG, SAID_EVERY = 1 << 30, 20.0
"""Bytes from which verification prints a line first, and seconds between its later lines."""


class Check(NamedTuple):
    """The verification of a file: `run` raises DistillError; `what` names the content that was verified."""

    path: Path
    what: str
    run: Callable[[], Any]


class Verified:
    """A record of verified files below `folder`: size, modification time and content (`Check.what`) of each.

    It is kept in verified-K.json, written by process K and read by all. For a read-only folder it is kept in `elsewhere`.
    """

    def __init__(self, folder: Path, elsewhere: Path | None = None, who: int | None = None) -> None:
        self.places = [Path(folder).resolve(), *([Path(elsewhere).resolve()] if elsewhere is not None else [])]
        self.name = f"verified-{processes.rank() if who is None else who}.json"
        self.files: dict[Path, list[Any]] = {}
        self.current, self.saved = False, True
        self._read()

    def _read(self) -> None:
        for place in self.places:
            for path in sorted(place.glob("verified-*.json")):
                try:
                    found = unsealed(read_plain(path))["files"]
                    self.files = {place / name: state for name, state in found.items()} | self.files
                except (OSError, DistillError, ValueError, KeyError, AttributeError):  # damaged, or being replaced: verify anew
                    continue

    @staticmethod
    def _state(path: Path, what: str) -> list[Any] | None:
        try:
            found = path.lstat()
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns, what]

    def _key(self, path: Path) -> Path:
        return path.parent.resolve() / path.name

    def knows(self, path: Path, what: str) -> bool:
        """Whether a file is unchanged since it was verified, by this process or another."""
        state, key = self._state(path, what), self._key(path)
        if self.files.get(key) != state and not self.current:
            self.current = True
            self._read()
        return state is not None and self.files.get(key) == state and os.access(path, os.R_OK)

    def verify(self, checks: Iterable[Check], anew: bool = False, all_of_them: bool = False) -> list[DistillError]:
        """Check files that are not yet verified, in threads, and record the good ones; returns the first error, or all of them."""
        todo = [check for check in checks if anew or not self.knows(check.path, check.what)]
        if not todo:
            return []
        states = [self._state(check.path, check.what) for check in todo]  # before they are read
        size = sum(state[0] for state in states if state)
        if size > LONG:
            self._say(f"verifying {len(todo)} files of {self.places[0]}, {size / 1e9:.1f} GB; {self.name} remembers it")
        wrong: list[DistillError] = []
        pool = ThreadPoolExecutor(max(1, min(8, processes.usable_cpus() // processes.local_world_size())))
        said = time.monotonic()
        try:
            for k, (check, state, error) in enumerate(zip(todo, states, pool.map(_error_of, todo), strict=True)):
                self.files.pop(self._key(check.path), None)
                if error is not None:
                    wrong.append(error)
                    if not all_of_them:
                        break
                elif state is not None:
                    self.files[self._key(check.path)], self.saved = state, False
                if time.monotonic() - said > SAID_EVERY:
                    said = time.monotonic()
                    self._say(f"verifying: {k + 1} of {len(todo)} files")
                    if not anew:
                        self.save()
        finally:
            pool.shutdown(cancel_futures=True)
            self.current = False
            self.save(alone=anew)
        return wrong

    @staticmethod
    def _say(text: str) -> None:
        if processes.rank() == 0:
            print(text, file=sys.stderr)

    def save(self, alone: bool = False, elsewhere: bool = False) -> None:
        """Write the record, if it is new. `alone`: replace other processes' records; `elsewhere`: try the second folder too."""
        if self.saved and not alone:
            return
        if not alone:
            self._read()
        for place in self.places[: 1 + elsewhere]:
            inside = {str(path.relative_to(place)): state for path, state in self.files.items() if path.is_relative_to(place)}
            apart = {
                str(path): state for path, state in self.files.items() if place != self.places[0] and path.is_relative_to(self.places[0])
            }
            try:
                if not place.is_dir():
                    continue
                write_atomic(place / self.name, sealed({"files": inside | apart}))
                self.saved = True
            except DistillError:  # a read-only store
                continue
            for other in place.glob("verified-*.json") if alone else ():
                if other.name != self.name:
                    with suppress(OSError):
                        other.unlink()
            return


def _error_of(check: Check) -> DistillError | None:
    try:
        check.run()
    except DistillError as error:
        return error
    return None

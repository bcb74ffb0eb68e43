"""Which files of a folder were verified already: a record by size and modification time, so that large stores are read once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from distill_cli import processes
from distill_cli.errors import DistillError
from distill_cli.files import read_plain, sealed, unsealed, write_atomic

LONG, SAID_EVERY = 1 << 30, 20.0
"""Bytes from which verification prints a line first, and seconds between its later lines."""
RECORDS = "verified-*.json"


class Check(NamedTuple):
    """The verification of a file: `run` raises DistillError; `what` names the content that was verified."""

    path: Path
    what: str
    run: Callable[[], Any]

    def error(self) -> DistillError | None:
        try:
            self.run()
        except DistillError as error:
            return error
        return None

    def state(self) -> list[Any] | None:
        """Size and modification time of the file, and what is verified of it; None for a missing file."""
        try:
            found = self.path.lstat()
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns, self.what]

    def key(self) -> Path:
        return self.path.parent.resolve() / self.path.name


class Verified:
    """A record of verified files below `folder`: the state of each (Check.state).

    It is kept in verified-K.json, written by process K and read by all. For a read-only folder it is kept in `elsewhere`.
    """

    def __init__(self, folder: Path, elsewhere: Path | None = None, who: int | None = None) -> None:
        self.folder, self.elsewhere = Path(folder).resolve(), elsewhere and Path(elsewhere).resolve()
        self.name = RECORDS.replace("*", str(processes.rank() if who is None else who))
        self.files: dict[Path, list[Any]] = {}
        self.current, self.saved = False, True
        self._read()

    def _read(self) -> None:
        """Add what any process has recorded."""
        for place in filter(None, (self.folder, self.elsewhere)):
            for path in sorted(place.glob(RECORDS)):
                with suppress(OSError, DistillError, ValueError, KeyError, AttributeError):  # damaged, or being replaced: verify anew
                    self.files = {place / name: state for name, state in unsealed(read_plain(path))["files"].items()} | self.files

    def knows(self, check: Check) -> bool:
        """Whether a file is unchanged since it was verified, by this process or another."""
        state, key = check.state(), check.key()
        if self.files.get(key) != state and not self.current:
            self.current = True
            self._read()
        return state is not None and self.files.get(key) == state and os.access(check.path, os.R_OK)

    def verify(self, checks: Iterable[Check], anew: bool = False) -> list[DistillError]:
        """Check files in threads, and record the good ones. `checks` that are known are left out, and the first error is returned.

        `anew`: every file is checked, all errors are returned, and the record takes the place of other processes'.
        """
        todo = [check for check in checks if anew or not self.knows(check)]
        if not todo:
            return []
        states = [check.state() for check in todo]  # before they are read
        size = sum(state[0] for state in states if state)
        if size > LONG:
            processes.say(f"verifying {len(todo)} files of {self.folder}, {size / 1e9:.1f} GB; {self.name} remembers it")
        wrong: list[DistillError] = []
        pool = ThreadPoolExecutor(max(1, min(8, processes.usable_cpus() // processes.local_world_size())))
        said = time.monotonic()
        try:
            for k, (check, state, error) in enumerate(zip(todo, states, pool.map(Check.error, todo), strict=True)):
                self.files.pop(check.key(), None)
                if error is not None:
                    wrong.append(error)
                    if not anew:
                        break
                elif state is not None:
                    self.files[check.key()], self.saved = state, False
                if time.monotonic() - said > SAID_EVERY:
                    said = time.monotonic()
                    processes.say(f"verifying: {k + 1} of {len(todo)} files")
                    if not anew:
                        self.save()
        finally:
            pool.shutdown(cancel_futures=True)
            self.current = False
            if anew:
                self.saved = False
                for record in self.folder.glob(RECORDS):
                    with suppress(OSError):
                        record.unlink()
            self.save()
        return wrong

    def save(self, elsewhere: bool = False) -> None:
        """Write the record, if it is new; `elsewhere`: where `folder` is read-only, into the second folder."""
        if self.saved:
            return
        self._read()
        below = {path: state for path, state in self.files.items() if path.is_relative_to(self.folder)}
        self.saved = self._written(self.folder, below)
        if elsewhere and self.elsewhere is not None and not self.saved:
            self.saved = self._written(self.elsewhere, self.files)

    def _written(self, place: Path, files: dict[Path, list[Any]]) -> bool:
        """Whether the record could be written to `place`; names below it are relative."""
        named = {str(path).removeprefix(f"{place}/"): state for path, state in files.items()}
        with suppress(DistillError):
            if place.is_dir():
                write_atomic(place / self.name, sealed({"files": named}))
                return True
        return False

"""Files of prompts, read where they stand: memory holds eight bytes a prompt."""

from __future__ import annotations

import csv
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from distill_cli.config import PROMPT_SETS
from distill_cli.data.shapes import HELD, TRAINED
from distill_cli.errors import DistillError, UsageError, nearest
from distill_cli.files import os_errors
from distill_cli.processes import say_hidden

FIELDS = ("prompt", "text", "caption")
"""Where a prompt stands in a line of JSON, or in a table: the first of these that is there."""


class PromptFile(Sequence[str]):
    """The prompts of a text file (a line each; empty lines count for nothing), of .jsonl, or of .csv with a header.

    Raises DistillError that names the line for what is no prompt.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.kind = Path(path), Path(path).suffix.lower()
        self.starts = array("q")
        digest = hashlib.sha256()
        if not self.path.is_file():
            raise DistillError(f"--prompts {path}: no such file", "a line a prompt, or .jsonl or .csv with a column prompt")
        with os_errors(self.path), open(self.path, "rb") as handle:
            if b"\0" in handle.read(1 << 16):
                raise DistillError(f"--prompts {path}: not a text file", "a line a prompt, or .jsonl or .csv with a column prompt")
            handle.seek(0)
            self.columns = self._row(handle, 1) or [] if self.kind == ".csv" else []
            self.field = next((name for name in FIELDS if name in self.columns), "")
            if self.kind == ".csv" and not self.field:
                raise DistillError(f"--prompts {path}: no column called prompt, text or caption in its first line")
            for start, text in self._records(handle):
                self.starts.append(start)
                digest.update(text.encode() + b"\n")
        if not self.starts:
            raise DistillError(f"--prompts {path}: no prompts in it")
        self.digest = digest.hexdigest()
        self._open = open(self.path, "rb")  # noqa: SIM115 - as long as the prompts are read

    def _lines(self, handle: Any) -> Iterator[str]:
        """Lines from where the file is, without a byte-order mark; the file's position is that after the line."""
        while line := handle.readline():
            try:
                yield line.decode().removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise DistillError(f"--prompts {self.path}: not a text file: no UTF-8 at byte {handle.tell()}") from error

    def _row(self, handle: Any, number: int) -> list[str] | None:
        """The next row of a table, None at the end."""
        try:
            return next(csv.reader(self._lines(handle)), None)
        except csv.Error as error:
            raise self._bad(number, f"no table ({error})") from error

    def _record(self, handle: Any, number: int = 0) -> str | None:
        """The next prompt, '' for none in its line, None at the end."""
        if self.kind == ".csv":
            row = self._row(handle, number)
            if row is None or not row:
                return row if row is None else ""
            if len(row) != len(self.columns):
                raise self._bad(number, f"{len(row)} columns, the first line has {len(self.columns)}")
            return row[self.columns.index(self.field)].strip()
        line = next(self._lines(handle), None)
        if line is None or self.kind not in (".jsonl", ".json", ".ndjson") or not line.strip():
            return None if line is None else line.strip()
        try:
            data = json.loads(line)
        except ValueError as error:
            raise self._bad(number, "not JSON") from error
        found = next((data[name] for name in FIELDS if name in data), None) if isinstance(data, dict) else data
        if not isinstance(found, str) or not _is_unicode(found):
            raise self._bad(number, "no text under prompt, text or caption")
        return found.strip()

    def _bad(self, number: int, what: str) -> DistillError:
        return DistillError(f"--prompts {self.path} line {number}: {what}", "each line needs its prompt")

    def _records(self, handle: Any) -> Iterator[tuple[int, str]]:
        number = 1 if self.kind == ".csv" else 0
        while True:
            start, number = handle.tell(), number + 1
            text = self._record(handle, number)
            if text is None:
                return
            if text:
                yield start, text

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        self._open.seek(self.starts[index])
        text = self._record(self._open)
        assert text
        return text

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as handle:
            if self.kind == ".csv":
                next(csv.reader(self._lines(handle)))
            for _, text in self._records(handle):
                yield text


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair, as JSON that was cut off may have."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


BUILTIN = dict(zip(PROMPT_SETS, (TRAINED, HELD), strict=True))


def open_prompts(name: str | Path) -> Sequence[str]:
    """The prompts of a file, or a built-in set of captions."""
    if str(name) in BUILTIN:
        say_hidden("prompts", str(name), "the built-in set")
        return [thing.caption for thing in BUILTIN[str(name)]]
    path = Path(name)
    if not path.is_file() and path.parent == Path(".") and not path.suffix:
        raise UsageError(f"--prompts {name}: no such file", nearest(str(name), BUILTIN, "built in"))
    return PromptFile(path)


def chosen(name: str | None, data: str) -> Sequence[str]:
    """The prompts asked for; by default those of the set that the model has learned, or none."""
    if name is None and data not in BUILTIN:
        return ()
    return open_prompts(name or data)


def in_turn(prompts: Sequence[str], count: int) -> Sequence[str]:
    """The prompts that `count` pairs have in turn: all, or the first of more. Embeddings are large, and the others need none."""
    return prompts if len(prompts) <= count else prompts[:count]


def digest_of(prompts: Sequence[str]) -> str:
    """SHA-256 of prompts, a line each."""
    if isinstance(prompts, PromptFile):
        return prompts.digest
    digest = hashlib.sha256()
    for text in prompts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()

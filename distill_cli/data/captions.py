"""Captions of the pictures in a folder: a list of all in it, or a text beside each picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_cli.errors import DistillError, UsageError, printable
from distill_cli.files import read_plain

LISTS = {"metadata.jsonl": ("file_name", ("text", "caption", "prompt")), "metadata.csv": ("file_name", ("text", "caption", "prompt")),
         "samples.jsonl": ("file", ("prompt",))}  # fmt: skip
"""Lists of a whole folder, as the datasets library and `distill sample` write them -> the key of a picture's path, and of its caption."""
SUFFIX, NAMED = ".txt", 3
HINT = f"a {SUFFIX} file beside each picture, metadata.jsonl with file_name and text, or a folder of `distill pairs`"


def captions_of(root: Path, files: Sequence[Path]) -> list[str]:
    """The captions of pictures below `root`, in their order. Raises UsageError where some lack one, DistillError for wrong files."""
    listed = next((name for name in LISTS if (root / name).is_file()), None)
    if listed is not None:
        known = _listed(root / listed)
        found = [known.get(file.relative_to(root).as_posix(), "") for file in files]
    else:
        found = [_text(file.with_suffix(SUFFIX)) for file in files]
    missing = [file.relative_to(root).as_posix() for file, caption in zip(files, found, strict=True) if not caption]
    if len(missing) == len(files):
        raise UsageError(f"--data {root}: has no captions", HINT)
    if missing:
        names = printable(f"{', '.join(missing[:NAMED])}{', ...' * (len(missing) > NAMED)}")
        where = listed or f"the {SUFFIX} files"
        raise UsageError(f"--data {root}: {len(missing)} of {len(files)} pictures have no caption in {where}: {names}", HINT)
    return found


def _text(path: Path) -> str:
    """The words in a file, on one line; '' where there is no file."""
    try:
        return " ".join(read_plain(path).decode("utf-8-sig").split())
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise DistillError(f"{path}: not text in UTF-8") from error


def _listed(path: Path) -> dict[str, str]:
    """Paths of pictures -> captions, of a list."""
    where, what = LISTS[path.name]
    found = {}
    for number, row in _rows(path):
        name = row.get(where)
        caption = next((row[key] for key in what if key in row), None)
        if not isinstance(name, str) or not isinstance(caption, str):
            raise DistillError(f"{path}: line {number} has no {where} and {what[0]}", f"each line needs both: {where}, {' or '.join(what)}")
        found[name.removeprefix("./")] = " ".join(caption.split())
    return found


def _rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """The rows of a list, with their numbers from 1."""
    try:
        text = read_plain(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistillError(f"{path}: not text in UTF-8") from error
    if path.suffix == ".csv":
        return list(enumerate(csv.DictReader(io.StringIO(text, newline="")), 2))
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise DistillError(f"{path}: line {number} is no JSON") from error
        if row is not None and not isinstance(row, dict):
            raise DistillError(f"{path}: line {number} is no JSON object")
        rows += [(number, row)] if row is not None else []
    return rows

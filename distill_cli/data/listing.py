"""The list of a run's pictures: their headers are read before training, and the run's folder keeps the list for resuming.

    pictures.jsonl             line 1: {"pictures": count, "sha256": of the other lines}; line 2: the names of the classes; then, by
                               position, a line for each picture: ["cat/00.jpg", bytes, modification time in seconds, class]
    broken-pictures-0.jsonl    the names of pictures that process 0 has found broken

A resumed run uses the kept list. A picture that the run has found broken may be removed (the next one of its class in the list
takes its place) or replaced, under its name or with another suffix. All other pictures must be unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from distill_cli.data.opened import BrokenPicture, header, open_picture
from distill_cli.errors import DistillError, UsageError, printable
from distill_cli.files import os_errors, read_plain, reading, write_atomic, write_atomic_lines
from distill_cli.processes import mine, rank, usable_cpus

if TYPE_CHECKING:
    from distill_cli.data.images import Folder

LIST, BROKEN = "pictures.jsonl", "broken-pictures-{}.jsonl"
READERS, AT_A_TIME = 32, 64
"""Threads that read headers (many, because network disks answer slowly), and pictures that a thread takes at a time."""
NAMED = 20
"""Most broken pictures that are named in messages."""
Row = list[Any]


def _trouble(files: Sequence[Path], look: Callable[[Path], Any], threads: int) -> tuple[list[DistillError], int]:
    """Call `look` on every file, in parallel; returns its errors, in the order of the files, and how often it returned true."""

    def check(first: int) -> tuple[list[DistillError], int]:
        wrong, count = [], 0
        for path in files[first : first + AT_A_TIME]:
            try:
                count += bool(look(path))
            except DistillError as error:
                wrong.append(error)
        return wrong, count

    pool = ThreadPoolExecutor(threads)
    try:
        parts = list(pool.map(check, range(0, len(files), AT_A_TIME)))
        return [error for wrong, _ in parts for error in wrong], sum(count for _, count in parts)
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(images: Folder, run: Path | None) -> list[str]:
    """Check the pictures before training, and put them at the positions they had when `run` (if any) began; returns lines to print.

    Each process reads its share of the headers.
    """
    share = [images.files[k] for k in mine(len(images.files))]
    with noting(run, images.root):
        wrong, moving = _trouble(share, header, READERS)
        if wrong:
            broken = [error for error in wrong if isinstance(error, BrokenPicture)]
            if run is not None:
                note(run, images.root, [error.path for error in broken])
            for error in wrong[:NAMED] if len(wrong) > 1 else ():
                print(printable(error.message), file=sys.stderr)
            first = (broken or wrong)[0]
            first.message += f"; {len(wrong) - 1} more of {len(share)} cannot be read" if len(wrong) > 1 else ""
            raise first
        lines = [f"headers of {len(images.files)} pictures read"]
        if moving:
            lines.append(f"{moving} of {len(share)} pictures {'have' if moving > 1 else 'has'} several frames: the first is taken")
        rows = images.rows = rows_of(images)
        kept = read(run) if run is not None else None
        if run is not None and kept is not None:
            lines += follow(images, rows, kept, found_broken(run))
    places = [(_name(file, images.root), label) for file, label in zip(images.files, images.labels, strict=True)]
    images.digest = hashlib.sha256(json.dumps([[row[:2] for row in rows], places]).encode()).hexdigest()
    return lines


def _name(file: Path, root: Path) -> str:
    """The path of a picture below the data folder; faster than Path.relative_to, for millions of files."""
    text, above = str(file), f"{root}/"
    return text[len(above) :] if text.startswith(above) else file.relative_to(root).as_posix()


def rows_of(images: Folder) -> list[Row]:
    """Name, bytes, modification time and label of every picture."""
    rows = []
    with reading(images.root):
        for file, label in zip(images.files, images.labels, strict=True):
            found = os.stat(file)
            rows.append([_name(file, images.root), found.st_size, int(found.st_mtime), label])
    return rows


def keep(images: Folder, run: Path) -> None:
    """Write the run's list of pictures, unless it exists."""
    if (run / LIST).exists():
        return
    lines = [json.dumps(row) + "\n" for row in [images.classes, *(images.rows or rows_of(images))]]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    write_atomic_lines(run / LIST, [json.dumps({"pictures": len(lines) - 1, "sha256": digest}) + "\n", *lines])


def read(run: Path) -> tuple[list[str], list[Row]] | None:
    """The classes and the list of a run; None if it has no list (runs of older versions)."""
    path = run / LIST
    try:
        head, _, rest = read_plain(path).partition(b"\n")
    except FileNotFoundError:
        return None
    try:
        if hashlib.sha256(rest).hexdigest() != json.loads(head)["sha256"]:
            raise ValueError
        classes, *rows = map(json.loads, rest.splitlines())
        return classes, rows
    except (ValueError, KeyError, TypeError) as error:
        raise DistillError(f"{path}: corrupt", "delete it, and the run uses the pictures as they are now") from error


def found_broken(run: Path) -> set[str]:
    """The names of pictures that any process of a run has found broken."""
    found: set[str] = set()
    for path in run.glob(BROKEN.format("*")):
        try:
            with reading(path):
                found |= {json.loads(line) for line in path.read_bytes().splitlines()}
        except (ValueError, TypeError) as error:
            raise DistillError(f"{path}: corrupt", "each line should be the name of a picture, in JSON") from error
    return found


def note(run: Path, root: Path, broken: Sequence[Path]) -> None:
    """Record broken pictures in a run's folder; each process has its own file."""
    path = run / BROKEN.format(rank())
    with os_errors(path):
        before = path.read_text() if path.exists() else ""
    names = [json.dumps(_name(file, root)) for file in broken]
    new = [name for name in names if name not in before.splitlines()]
    if new:
        write_atomic(path, before + "".join(f"{name}\n" for name in new))


@contextmanager
def noting(run: Path | None, root: Path | None, files: Sequence[Path] = ()) -> Iterator[None]:
    """If a broken picture ends the body, record it in `run` (if any), with all other broken ones of `files`: they may then be removed."""
    try:
        yield
    except BrokenPicture as error:
        if run is not None and root is not None:
            try:
                note(run, root, [error.path])
                if files:
                    print(f"{printable(error.path)} is broken: looking at all {len(files)} pictures", file=sys.stderr)
                    wrong, _ = _trouble(sorted({*files}), open_picture, usable_cpus())
                    broken = [other.path for other in wrong if isinstance(other, BrokenPicture)]
                    note(run, root, broken)
                    if len(broken) > 1:
                        names = ", ".join(_name(path, root) for path in broken[:NAMED]) + ", ..." * (len(broken) > NAMED)
                        error.message += f"; {len(broken)} pictures are broken: {names}"
                error.hint = f"{error.hint}, then --resume {run}"
            except DistillError as unwritten:
                error.hint = f"leave the file until --resume {run} has noted it: {unwritten.message}"
        raise


def follow(images: Folder, rows: list[Row], kept: tuple[list[str], list[Row]], broken: set[str]) -> list[str]:
    """Put `images`, whose present rows are `rows`, at the positions of the `kept` list; returns lines to print.

    Raises UsageError that names what has changed, except for pictures that were found `broken`.
    """
    root: Path = images.root
    classes, before = kept
    back = "have the pictures as they were, or begin anew"
    present, then = {row[0]: row for row in rows}, {row[0]: row for row in before}
    stems = {_stem(name): name for name in present if name not in then}
    replaced = [name for name in broken & then.keys() if name not in present and _stem(name) in stems]
    instead: dict[str, str] = {name: stems[_stem(name)] for name in replaced}
    new = [name for name in present if name not in then and name not in instead.values()]
    gone = [name for name in then if name not in present and name not in broken]
    changed = [name for name in then if name in present and name not in broken and present[name][1] != then[name][1]]
    others = [name for name in images.classes if name not in classes]
    for names, what in ((others, "is a new class"), (new, "is new"), (gone, "is gone"), (changed, "has another size")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UsageError(f"--data {root}: {names[0]}{more} {what} since the run has begun", back)
    lines: list[str] = []
    where: list[tuple[Path, int]] = []
    following = _next_of_class(before, present.keys() | instead.keys())
    for name, size, time, label in before:
        taken = str(instead.get(name, name))
        if taken not in present:
            if name not in following:
                raise UsageError(f"--data {root}: {name} was the last picture of its class", "replace it, or begin anew")
            taken = str(instead.get(following[name], following[name]))
            lines.append(f"{name} was found broken and is gone: {taken} takes its place")
        elif name in broken:
            open_picture(root / taken)
            if [taken, *present[taken][1:3]] != [name, size, time]:
                lines.append(f"{name} was found broken and has been replaced: {taken} is read as it is now")
        where.append((root / taken, label))
    images.files, images.labels, images.classes = [file for file, _ in where], [label for _, label in where], classes
    copied = sum(name in present and name not in broken and present[name][2] != then[name][2] for name in then)
    if copied:
        lines.append(f"warning: {copied} pictures have another time than when the run began; their names and sizes are the same")
    return lines


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _next_of_class(before: list[Row], there: set[str]) -> dict[str, str]:
    """For each missing picture, the next existing one of its class in the list; after the last comes the first."""
    out: dict[str, str] = {}
    following: dict[int, str] = {}
    for name, _, _, label in [*before, *before][::-1]:
        if name in there:
            following[label] = name
        elif label in following:
            out[name] = following[label]
    return out

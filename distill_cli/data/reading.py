"""Read text from outside a piece at a time: lines with any line ending, JSON arrays, and pipes."""

from __future__ import annotations

import codecs
import json
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from distill_cli.errors import DistillError, reason

STDIN = ("-", "/dev/stdin")
PIECE = 1 << 16
"""Bytes read at a time."""
UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")
INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10))))
"""Letters and marks that are invisible; so are characters of the UNSEEN categories: control, format, spaces."""
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte-order marks of encodings other than UTF-8, longer marks first."""
UNMARKED = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
COPY = "DISTILL_PROMPTS"
"""Variable with the name of a pipe of prompts, and of the file that keeps its content for child processes."""


class Lines:
    """The lines of a file from byte `end` on, ended by LF, CR LF or CR, without byte-order marks.

    `end` is where the next line begins, `number` the count of lines read. Several readers can share one file.
    """

    def __init__(self, handle: IO[bytes], name: str, end: int = 0, piece: int = PIECE) -> None:
        self.handle, self.name, self.end, self.piece, self.number = handle.fileno(), name, end, piece, 0
        self.ready: deque[bytes] = deque()
        self.rest, self.read = b"", end

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        while not self.ready:
            more = os.pread(self.handle, max(self.piece, len(self.rest)), self.read)
            self.read += len(more)
            self.ready.extend((self.rest + more).splitlines(keepends=True))
            self.rest = b""
            if not self.ready:
                raise StopIteration
            if more and not self.ready[-1].endswith(b"\n"):  # the line, or its CR LF, may continue
                self.rest = self.ready.pop()
        line = self.ready.popleft()
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise DistillError(f"{self.name}: not a text file: no UTF-8 at byte {self.end + error.start}", "save it as UTF-8") from error
        self.end += len(line)
        self.number += 1
        return text.removeprefix("\ufeff")


def code_of(head: bytes) -> str:
    """The encoding of a text that begins with `head` and is not UTF-8, by iconv's name; '' for UTF-8, and for what is no text."""
    marked = [name for mark, name in MARKS.items() if head.startswith(mark)]
    found = {}
    for code in marked or (UNMARKED if b"\0" in head else ()):
        try:
            text = codecs.getincrementaldecoder(code)().decode(head)
        except UnicodeDecodeError:
            continue
        if all(letter.isprintable() or letter.isspace() or letter == "\ufeff" for letter in text):
            found[code] = sum(map(str.isascii, text))
    return max(found, key=lambda code: found[code], default="") if marked or any(found.values()) else ""


def visible(text: str) -> bool:
    """Whether a text has a visible character."""
    first = text[:1]
    return (first.isascii() and first.isalnum()) or any(
        unicodedata.category(letter) not in UNSEEN and letter not in INVISIBLE for letter in text
    )


def begins_array(text: str) -> bool:
    """Whether a line begins a JSON array of texts or objects; a prompt in brackets does not."""
    rest = text.strip()[1:].lstrip()
    if not rest or re.match(r"\{\s*(\"|$)", rest):
        return True
    try:
        element, end = json.JSONDecoder().raw_decode(rest)
    except ValueError:
        return rest == "]"
    return isinstance(element, str | dict | None) and re.match(r"\s*(,|\]?\s*$)", rest[end:]) is not None


def begins_object(text: str) -> bool:
    """Whether a text begins with a complete JSON object."""
    try:
        return isinstance(json.JSONDecoder().raw_decode(text)[0], dict)
    except (ValueError, RecursionError):
        return False


def elements(text: IO[str]) -> Iterator[Any]:
    """The elements of a JSON array in order; raises ValueError if it is damaged."""
    decode, after = json.JSONDecoder().raw_decode, re.compile(r"\s*([,\]])\s*")
    buffer = text.read(PIECE).lstrip()[1:].lstrip()
    ended = buffer.startswith("]")
    place = int(ended)
    while not ended:
        try:
            element, end = decode(buffer, place)
            follows = after.match(buffer, end)
        except ValueError:
            follows = None
        if follows is None or (follows[1] == "," and follows.end() == len(buffer)):
            more = text.read(max(PIECE, len(buffer)))
            if not more:
                raise ValueError("cut off, or damaged")
            buffer, place = buffer[place:] + more, 0
            continue
        yield element
        place, ended = follows.end(), follows[1] == "]"
    if (buffer[place:] + text.read(PIECE)).strip():
        raise ValueError("something follows its end")


def is_pipe(name: str) -> bool:
    """Whether `name` is a pipe, which can be read only once: standard input, a FIFO, <(command)."""
    path = Path(name)
    return name == "-" or (path.exists() and not path.is_file() and not path.is_dir())


def copied(name: str, out: IO[bytes]) -> IO[bytes]:
    """Copy the content of a pipe to `out`, and return `out`."""
    try:
        if name in STDIN:
            shutil.copyfileobj(sys.stdin.buffer, out)
        else:
            with open(name, "rb") as pipe:
                shutil.copyfileobj(pipe, out)
        out.flush()
    except (OSError, AttributeError, ValueError) as error:  # AttributeError, ValueError: standard input is closed
        raise DistillError(f"--prompts {name}: cannot be read ({reason(error)})") from error
    return out


@contextmanager
def kept_for_others(name: str) -> Iterator[None]:
    """Keep the content of a pipe of prompts in a file while the body runs, for the processes that it starts."""
    with tempfile.NamedTemporaryFile(prefix="distill-") as out:
        copied(name, out)
        os.environ[COPY] = f"{out.name}\n{name}"
        try:
            yield
        finally:
            del os.environ[COPY]

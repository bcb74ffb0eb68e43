"""Files of prompts, read on demand: memory holds eight bytes for each prompt.

The content decides the format: JSON (an object or a text in each line, or one array), a table (with a column prompt, text or
caption), or else one prompt in each line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, overload

from distill_cli import processes
from distill_cli.config import PROMPT_SETS
from distill_cli.data.reading import COPY, PIECE, STDIN, Lines, begins_array, begins_object, code_of, copied, elements, is_pipe, visible
from distill_cli.data.shapes import HELD, TRAINED
from distill_cli.errors import DistillError, UsageError, nearest, reason
from distill_cli.files import reading
from distill_cli.processes import say_hidden

FIELDS = ("prompt", "text", "caption")
"""Fields of a JSON object, or columns of a table, that may hold the prompt; the first with text counts. Case is ignored."""
HINT = "a line a prompt, or JSON or a table with prompt, text or caption"
TABLES, JSON = {".csv": ",", ".tsv": "\t"}, (".jsonl", ".json", ".ndjson")
DELIMITERS = ",\t;|"


@dataclass(frozen=True)
class Form:
    """The format of a file of prompts: `kind` is lines, json or table; a table has a delimiter and columns."""

    kind: str
    delimiter: str = ","
    columns: tuple[str, ...] = ()
    """The columns that the header names; without a header, the first line is a prompt."""
    quoting: Any = csv.QUOTE_MINIMAL
    blank: bool = False
    """Whether blanks follow the delimiters."""
    rows_are_lines: bool = False
    """Whether every cell ends with its line."""

    @cached_property
    def fields(self) -> list[int]:
        """Columns that may hold the prompt, in order of preference."""
        return [k for name in FIELDS for k, column in enumerate(self.columns) if column.lower() == name]


class PromptFile(Sequence[str]):
    """The prompts of a text file, whose format comes from its content; raises DistillError that names a line without a prompt.

    `about` reports what was read, left out and assumed. `own` is for copies written by this package: every prompt in them counts.
    """

    def __init__(self, path: Path, own: bool = False) -> None:
        self.path, self.own = Path(path), own
        self.name = "standard input" if str(path) in STDIN else str(path)
        self.unit = "line"
        self._open = self._opened()
        self._state = self._now()
        self.doubt = ""
        forms, first = self._forms(self._head()), None
        for k, form in enumerate(forms):
            try:
                self._index(form)
                break
            except DistillError as error:
                first = first or error
                if k == len(forms) - 1:
                    raise first from error
        if first and not self.doubt:
            self.doubt = f"names a column, but it is no table ({first.message.removeprefix(f'--prompts {self.name} ')})"
        self.as_they_stand = first is not None and form.quoting == csv.QUOTE_NONE
        if not self.starts:
            raise self._fault("no prompts in it" + self._left_out())
        self.about = self._said()

    def _opened(self) -> IO[bytes]:
        """The file, or a copy of a pipe's content; either can be read at any position, repeatedly."""
        copy, _, name = os.environ.get(COPY, "").partition("\n")
        if copy and name == str(self.path):
            return open(copy, "rb")  # noqa: SIM115 - as long as the prompts are read
        if is_pipe(str(self.path)):
            if processes.world_size() > 1:
                raise UsageError(f"--prompts {self.name}: a pipe has one reader, and this is one of several processes", "give a file")
            return copied(str(self.path), tempfile.TemporaryFile())  # noqa: SIM115
        if not self.path.exists():
            raise self._fault("no such file")
        try:
            return open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise DistillError(f"--prompts {self.name}: {(error.strerror or str(error)).lower()}") from error

    def _now(self) -> tuple[int, int]:
        """Size and time of the last change of the file that is open."""
        found = os.fstat(self._open.fileno())
        return found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """Raise DistillError if the file has changed since its prompts were found: positions in it mean other prompts then."""
        if self._now() != self._state:
            raise self._fault("has changed since the run began", "put back what was in it, then --resume")

    def _head(self) -> str:
        """The beginning of the file; raises DistillError if it is not UTF-8 text."""
        head = os.pread(self._open.fileno(), PIECE, 0)
        if code := code_of(head):
            raise self._fault(f"{code[:6]}, not UTF-8", f"iconv -f {code} -t UTF-8 makes a file that can be read")
        if b"\0" in head:
            raise self._fault("not a text file")
        return head.decode(errors="ignore").removeprefix("\ufeff")

    def _forms(self, head: str) -> list[Form]:
        """Possible formats by the beginning of the file, likeliest first; the first one that fits every line is used."""
        suffix = self.path.suffix.lower()
        first = next((line.strip() for line in re.split(r"[\r\n]+", head) if line.strip()), "")
        if first.startswith("[") and (suffix in JSON or begins_array(first)) and not self.own:
            self._unroll()
            self._state = self._now()  # of the copy
            return [Form("json")]
        like = re.match(r"\{\s*\"", first) is not None
        if self.own or suffix in JSON or (like and (len(first) >= PIECE // 2 or begins_object(first))):
            return [Form("json")]
        self.doubt = "begins like JSON and is none" if like else ""
        default = TABLES.get(suffix, ",")
        forms = []
        for delimiter in default + DELIMITERS.replace(default, ""):
            form = Form("table", delimiter, _header(head, delimiter), blank=f"{delimiter} " in first)
            if not form.fields or (len(form.columns) == 1 and delimiter != default):
                continue
            if suffix not in TABLES and form.blank and any(len(name.split()) > 2 for name in form.columns):  # parts of a sentence
                self.doubt = "is taken for a prompt and not for the names of columns"
                continue
            as_they_stand = replace(form, quoting=csv.QUOTE_NONE)
            if delimiter == "\t" and len(form.columns) > 1:  # cells in such tables are rarely quoted
                forms += [replace(form, rows_are_lines=True), as_they_stand, form]
            else:
                forms += [form, as_they_stand]
        forms.sort(key=lambda form: -len(form.columns))
        if suffix not in TABLES:
            return [*forms, Form("lines", columns=forms[0].columns if forms and len(forms[0].columns) == 1 else ())]
        if not forms:
            there = _shown(_header(head, default))
            raise self._fault(f"no column called prompt, text or caption in its first line, which has {there}")
        return forms

    def _unroll(self) -> None:
        """Replace a JSON array by a copy with one element in each line."""
        self.unit = "element"
        out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._open.seek(0)
        with reading(self.path):
            try:
                for element in elements(io.TextIOWrapper(self._open, "utf-8-sig")):
                    out.write(json.dumps(element).encode() + b"\n")
            except (ValueError, RecursionError) as error:
                raise self._fault(f"no JSON array ({reason(error)})") from error
            out.flush()
        self._open = out

    def _index(self, form: Form) -> None:
        """Find the byte at which each prompt begins; raises DistillError for the first line that does not fit the format."""
        self.form, self.starts = form, array("q")
        self.left_out, self.used = 0, Counter[str]()
        digest = hashlib.sha256()
        for start, field, text in self._records(0):
            if not text:
                self.left_out += 1
                continue
            self.starts.append(start)
            self.used[field] += 1
            digest.update(text.encode() + b"\n")
        self.digest = digest.hexdigest()

    def _records(self, start: int, piece: int = PIECE) -> Iterator[tuple[int, str, str]]:
        """From byte `start` on, for each record: its first byte, the field or column with its text, and the text ('' if it has none)."""
        form, lines = self.form, Lines(self._open, f"--prompts {self.name}", start, piece)
        rows: Iterator[Any] = lines
        if form.kind == "table":
            rows = csv.reader(lines, delimiter=form.delimiter, quoting=form.quoting, skipinitialspace=form.blank, strict=True)
        header = start == 0 and bool(form.columns)
        while True:
            start, number = lines.end, lines.number + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                what = "a quote that is not closed" if "unexpected end" in str(error) else str(error)
                raise self._bad(number, f"no table ({what})") from error
            if form.rows_are_lines and lines.number > number:
                raise self._bad(number, "a cell that goes on in the next line")
            if row is None:
                return
            if not row or (isinstance(row, str) and not row.strip()):
                continue
            if header:
                header = False
            else:
                yield start, *self._prompt(row, number)

    def _prompt(self, row: Any, number: int) -> tuple[str, str]:
        form = self.form
        if form.kind == "lines":
            text = row.strip()
            return "", text if self._shows(text) else ""
        if form.kind == "table":
            if len(row) != len(form.columns):
                raise self._bad(number, f"{len(row)} columns, the first line has {len(form.columns)}")
            found = next((k for k in form.fields if self._shows(row[k])), None)
            return ("", "") if found is None else (form.columns[found], row[found].strip())
        try:
            data = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise self._bad(number, "not JSON") from error
        values = {"": data} if not isinstance(data, dict) else {key: data[key] for name in FIELDS for key in data if key.lower() == name}
        for key, value in values.items():
            if isinstance(value, str) and _is_unicode(value) and self._shows(value):
                return key, value.strip()
        if not values or not all(value is None or (isinstance(value, str) and not self._shows(value)) for value in values.values()):
            there = f"; it has {_shown(data)}" if isinstance(data, dict) else ""
            raise self._bad(number, f"no text under prompt, text or caption{there}")
        return "", ""

    def _shows(self, text: str) -> bool:
        return bool(text.strip()) if self.own else visible(text)

    def _fault(self, what: str, hint: str = HINT) -> DistillError:
        return DistillError(f"--prompts {self.name}: {what}", hint)

    def _bad(self, number: int, what: str) -> DistillError:
        return DistillError(f"--prompts {self.name} {self.unit} {number}: {what}", f"each {self.unit} needs its prompt")

    def _left_out(self) -> str:
        unit = ("row" if self.form.kind == "table" else self.unit) + "s" * (self.left_out > 1)
        what = f"{unit} without a visible letter" if self.form.kind == "lines" else f"empty {unit}"
        return f"; {self.left_out} {what} left out" if self.left_out else ""

    def _said(self) -> str:
        names = sorted(filter(None, self.used), key=lambda name: -self.used[name])
        what = "column" if self.form.kind == "table" else "field"
        where = f", {what} {names[0]}" if names else ""
        if len(names) > 1:
            where = f", {what}s " + " and ".join(f"{name} ({self.used[name]})" for name in names)
        said = f"{len(self)} prompt{'s' * (len(self) > 1)}{where} of {self.name}{self._left_out()}"
        if self.form.kind == "lines" and self.form.columns:
            said += f"; its first line, {self.form.columns[0]}, is taken for a header"
        elif self.form.kind == "lines" and self.doubt:
            said += f"; its first line {self.doubt}: each line is taken for a prompt"
        elif self.as_they_stand:
            said += "; quotes are taken as they stand"
        return said

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return next(self._records(self.starts[index], 1 << 10))[2]

    def __iter__(self) -> Iterator[str]:
        return (text for _, _, text in self._records(0) if text)


def _is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair; truncated JSON may have one."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _header(head: str, delimiter: str) -> tuple[str, ...]:
    """The first row of a table that begins with `head`; () if it is no table."""
    try:
        rows = csv.reader(re.split(r"(?<=\n)|(?<=\r)(?!\n)", head), delimiter=delimiter, skipinitialspace=True)
        return tuple(cell.strip() for cell in next((row for row in rows if row), []))
    except csv.Error:
        return ()


def _shown(names: Iterable[str]) -> str:
    """Field names for one line of a message, shortened."""
    return ", ".join(repr(name)[1:41].rstrip("'") for name in islice(names, 8)) or "none"


class Captions(list[str]):
    """Built-in prompts."""

    about = ""


BUILTIN = dict(zip(PROMPT_SETS, (TRAINED, HELD), strict=True))


def open_prompts(name: str | Path) -> Sequence[str]:
    """The prompts of a file, or a built-in set of captions."""
    if str(name) in BUILTIN:
        say_hidden("prompts", str(name), "the built-in set")
        captions = Captions(thing.caption for thing in BUILTIN[str(name)])
        captions.about = f"{len(captions)} prompts of {name}"
        return captions
    path = Path(name)
    if not path.exists() and not is_pipe(str(name)) and path.parent == Path(".") and not path.suffix:
        raise UsageError(f"--prompts {name}: no such file", nearest(str(name), BUILTIN, "built in"))
    return PromptFile(path)


def chosen(name: str | None, data: str) -> Sequence[str]:
    """The prompts `name`; by default the prompts of the set `data` that the model was trained on, or none."""
    if name is None and data not in BUILTIN:
        return ()
    return open_prompts(name or data)


def in_turn(prompts: Sequence[str], count: int) -> Sequence[str]:
    """The prompts that `count` pairs use in turn, at most the first `count`: others need no embeddings, which are large."""
    return prompts if len(prompts) <= count else prompts[:count]


def digest_of(prompts: Sequence[str]) -> str:
    """SHA-256 of prompts, one in each line."""
    if isinstance(prompts, PromptFile):
        return prompts.digest
    return hashlib.sha256("".join(f"{text}\n" for text in prompts).encode()).hexdigest()

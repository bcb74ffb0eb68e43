"""Errors that a user can fix: one line that names the flag, key or file, then a hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistillError(Exception):
    """An error that the user can fix; the command ends with `exit_code` and no traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DistillError):
    """A wrong command line or recipe."""

    exit_code = 2


class Interrupted(DistillError):
    """The command was stopped by the user (exit code 130) or by the scheduler (`preempted`, exit code 0); finished work is kept."""

    def __init__(self, message: str, hint: str = "", preempted: bool = False) -> None:
        super().__init__(message, hint)
        self.exit_code = 0 if preempted else 130


def _escaped(text: str) -> str:
    """`text` with every kind of white space as spaces, and other unprintable characters as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)


def printable(text: object, most: int = 2000) -> str:
    """The first `most` characters of text from outside, as one line that is safe in a terminal, a page or a JSON file.

    White space, line breaks included, becomes spaces. Control characters, marks of writing direction, invisible characters and
    bytes that are not UTF-8 become escapes.
    """
    whole = str(text)
    return _escaped(whole if len(whole) <= most else whole[: most - 3] + "...").strip()


def printable_lines(text: str) -> str:
    """As `printable`, for text of several lines; indentation stays."""
    return "\n".join(map(_escaped, text.split("\n")))


def reason(error: BaseException) -> str:
    """The first line of another library's error message; the error's type if it has none."""
    said = str(error).strip()
    return printable(said.splitlines()[0]) if said else type(error).__name__


def nearest(word: str, known: Iterable[str], what: str = "known") -> str:
    """A hint: the name in `known` that is nearest to `word`, or the first 12 names if none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"{what}: {', '.join(names[:12]) or '(none)'}{', ...' * (len(names) > 12)}"

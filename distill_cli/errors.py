"""Errors that a user can act on: one line that names the flag, key or file, then a hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistillError(Exception):
    """Something the user can fix; the command ends with `exit_code` and no traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DistillError):
    """A wrong command line or recipe."""

    exit_code = 2


class Interrupted(DistillError):
    """The user (exit code 130) or the scheduler (`preempted`: 0, as planned) stopped the command; what was complete is kept."""

    def __init__(self, message: str, hint: str = "", preempted: bool = False) -> None:
        super().__init__(message, hint)
        self.exit_code = 0 if preempted else 130


def _escaped(text: str) -> str:
    """White space of any kind as spaces, and every other character that is not shown as it is as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)


def printable(text: object, most: int = 2000) -> str:
    """Text that came from outside, its first `most` characters, as one line that any terminal, page or JSON file takes as it looks.

    Line breaks and other white space become spaces; control characters, marks that turn the direction of writing, invisible ones and
    bytes that are no UTF-8 are written as their escapes.
    """
    whole = str(text)
    return _escaped(whole if len(whole) <= most else whole[: most - 3] + "...").strip()


def printable_lines(text: str) -> str:
    """As `printable`, of a text of several lines, indented as they are."""
    return "\n".join(map(_escaped, text.split("\n")))


def reason(error: BaseException) -> str:
    """What an error of another library says in its first line, else its kind."""
    said = str(error).strip()
    return printable(said.splitlines()[0]) if said else type(error).__name__


def nearest(word: str, known: Iterable[str], what: str = "known") -> str:
    """A hint: the nearest of `known` to `word`, or the first of them where nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"{what}: {', '.join(names[:12]) or '(none)'}{', ...' * (len(names) > 12)}"

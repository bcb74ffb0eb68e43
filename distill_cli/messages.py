"""Standard streams whose writes never fail, even with a full disk, a killed `tee`, a dead terminal or a closed descriptor.

So no print, progress bar, warning or library can end a run. The first error is remembered.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO, cast


class _Stream(io.FileIO):
    """A file descriptor whose writes never fail; `lost` is the first error."""

    lost: OSError | None = None

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            written = super().write(data)
            if written is None:  # a full non-blocking pipe: its reader gets one second
                select.select([], [self.fileno()], [], 1.0)
                written = super().write(data)
            if written is None:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return written
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


def _text(number: int, old: TextIO | None) -> TextIO:
    buffer = io.BufferedWriter(cast(Any, _Stream(number, "w", closefd=False)))
    at_once = old is None or getattr(old, "line_buffering", True) or getattr(old, "write_through", True)
    encoding = getattr(old, "encoding", None) or "utf-8"
    return io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=at_once)


def guard() -> None:
    """Replace stdout and stderr by such streams; open /dev/null on closed descriptors, whose numbers a file would get otherwise."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = _text(1, sys.stdout), _text(2, sys.stderr)


def lost() -> OSError | None:
    """The error that kept results from stdout, or None. A closed pipe counts as None: its reader, such as `head`, wanted no more."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Stream):
        return None
    try:
        os.close(os.dup(1))  # some network disks report a full disk only on close
    except OSError as error:
        raw.lost = raw.lost or error
    return None if raw.lost is None or raw.lost.errno == errno.EPIPE else raw.lost


def tell(text: str) -> None:
    """Write a line to stderr from a signal handler, where print is not safe."""
    with suppress(OSError):
        os.write(2, text.encode() + b"\n")

"""One process or many: who we are, when to stop, how progress is shown."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from distill_cli.errors import UsageError


def rank() -> int:
    """This process's number, as torchrun, accelerate and Slurm's templates set it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _keep_freed_memory() -> None:
    """Let glibc keep what networks free instead of giving it back and faulting it in again at every layer (docs/benchmarks.md)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, size in ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, size)


def device(wanted: str) -> torch.device:
    """`auto` is the process's GPU where there is one."""
    _keep_freed_memory()
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("--device cuda: no CUDA device", "distill env shows what torch sees")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def check_precision(where: torch.device, precision: str) -> None:
    if precision == "fp16" and where.type == "cpu":
        raise UsageError("--precision fp16: needs a GPU", "use bf16")


def autocast(where: torch.device, precision: str) -> torch.autocast:
    """The arithmetic of networks outside training: `no` (float32), `bf16`, `fp16`."""
    check_precision(where, precision)
    kinds = {"no": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(where.type, kinds[precision], enabled=precision != "no")


class Stop:
    """Whether ^C or SIGTERM came: `requested` is asked between units of work; a second signal stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, b"stopping after this step; once more stops at once\n")  # print may not be entered twice


@contextmanager
def stoppable() -> Iterator[Stop]:
    stop = Stop()
    old = {number: signal.signal(number, stop._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Progress:
    """tqdm on a terminal, a line now and then elsewhere, on process 0 only. Counts `unit`s."""

    def __init__(self, total: int, what: str, unit: str, done: int = 0, every: float = 20.0) -> None:
        self.total, self.what, self.unit, self.done, self.first, self.every = total, what, unit, done, done, every
        self.started = self.said = time.monotonic()
        self.bar: Any = None
        if rank() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", leave=False)

    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.first) / max(1e-9, time.monotonic() - self.started)

    def add(self, count: int, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(count)
            if note:
                self.bar.set_postfix_str(note, refresh=False)
        elif rank() == 0 and (now - self.said > self.every or self.done == self.total):
            self.said = now
            left = (self.total - self.done) / max(1e-9, self.rate())
            print(
                f"{self.what}: {self.done}/{self.total} {self.unit}, {self.rate():.1f}/s, {left:.0f} s left {note}".rstrip(),
                file=sys.stderr,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

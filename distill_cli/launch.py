"""This process at work: its device and precision, stopping by signal, progress, and exchange with other processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from distill_cli.errors import Interrupted, UsageError, reason
from distill_cli.messages import tell
from distill_cli.processes import PREEMPTION, local_rank, own_arithmetic, preemption, rank, supervised, world_size


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory: returning it costs page faults at every layer of a network (docs/benchmarks.md)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    for option, size in ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, size)


def device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; `auto` is this process's GPU if there is one. Raises UsageError if `cuda` is missing."""
    _keep_freed_memory()
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("--device cuda: no CUDA device", "distill env shows what torch sees")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    number = local_rank()
    if number >= torch.cuda.device_count():
        raise UsageError(f"process {number} of this machine has no GPU: there are {torch.cuda.device_count()}", "start fewer processes")
    return torch.device("cuda", number)


def check_precision(where: torch.device, precision: str) -> None:
    """Raise UsageError for fp16 on the CPU."""
    if precision == "fp16" and where.type == "cpu":
        raise UsageError("--precision fp16: needs a GPU", "use bf16")


def autocast(where: torch.device, precision: str) -> torch.autocast:
    """The autocast for the arithmetic of networks: `no` (float32), `bf16` or `fp16`."""
    check_precision(where, precision)
    kinds = {"no": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(where.type, kinds[precision], enabled=precision != "no")


PATIENCE = timedelta(days=1)
"""How long processes wait for each other: some have no work, or one writes a large checkpoint to a slow disk."""


def plain_links(where: torch.device) -> None:
    """Before accelerate: turn off NCCL's direct links between GPUs if the driver lacks them; accelerate would raise an error."""
    own_arithmetic()
    from accelerate.utils import check_cuda_p2p_ib_support

    if where.type == "cuda" and not check_cuda_p2p_ib_support():
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")


class Stop:
    """`requested` is the number of the signal (^C or PREEMPTION) that has come, or 0; read it between units of work.

    A second ^C stops at once.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._since = 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._since > 1:  # a terminal and torchrun both send the first
                raise KeyboardInterrupt
            return
        self.requested, self._since = number, time.monotonic()
        if rank() == 0:
            tell("stopping after this step" if supervised() else "stopping after this step; ^C once more stops at once")

    @staticmethod
    def interrupted(number: int, message: str, hint: str) -> Interrupted:
        """The error that ends a command stopped by signal `number`."""
        return Interrupted(message, hint, preempted=number in PREEMPTION)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Listen for signals while the body runs. A nested call shares the outer Stop."""
    outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(outer, Stop):
        yield outer
        return
    stop = Stop()
    old = {number: signal.signal(number, stop._handle) for number in (signal.SIGINT, *preemption())}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def preparing(where: torch.device, hint: str) -> Iterator[Stop]:
    """Run long work before the first step; the body reads `requested` between its parts.

    Waits for all processes. A signal to one of them ends the command in all.
    """
    with stoppable() as stop:
        yield stop
    number = max(all_of([stop.requested], where))
    if number:
        raise stop.interrupted(number, "stopped before the first step", hint)


def spared(what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Make a call that the job can do without: a failure prints one warning and ends nothing."""
    try:
        call(*arguments, **options)
    except Exception as error:  # trackers raise types of their own
        if what not in _FAILED:
            print(f"warning: {what}: {reason(error)}; going on without it", file=sys.stderr)
        _FAILED.add(what)


_FAILED: set[str] = set()


def all_of(mine: list[Any], where: torch.device) -> list[Any]:
    """The lists of all processes, joined in the order of process numbers; waits for all of them."""
    if world_size() == 1:
        return mine
    from accelerate import PartialState
    from accelerate.utils import gather_object

    plain_links(where)
    PartialState(cpu=where.type == "cpu", timeout=PATIENCE)
    return list(gather_object(mine))


def whole(values: Tensor) -> Tensor:
    """Gather a tensor that FSDP has sharded; every process must call this. Other tensors are returned unchanged."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def like(values: Tensor, pattern: Tensor) -> Tensor:
    """Shard a tensor, known to all processes, as `pattern` is sharded, if both have the same shape."""
    if not isinstance(pattern, DTensor) or values.shape != pattern.shape:
        return values
    return distribute_tensor(values.to(pattern.device), pattern.device_mesh, pattern.placements)


class Progress:
    """Progress on process 0: tqdm on a terminal, elsewhere a line every `every` seconds. Counts `unit`s."""

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
        """Count `count` more units as done; `note` is shown beside them."""
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
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

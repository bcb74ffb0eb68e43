"""Time commands and bare network calls in turn, in one process. The result is the ratio."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill_cli.processes import usable_cpus
from distill_cli.runs import versions

WARM_UP = 2
GPU_CALLS = 5
"""Calls that are timed together on a GPU, where the host runs ahead."""


@dataclass
class Case:
    """A command and its bare network calls. `images` is the number that either makes or sees; `bare()` builds the bare calls late."""

    ours: Callable[[], Any]
    bare: Callable[[], Callable[[], Any]]
    images: int
    calls: str
    where: torch.device


def _timed(work: Callable[[], Any], where: torch.device) -> float:
    """Seconds of one call, including the device's work."""
    calls, wait = (GPU_CALLS, partial(torch.cuda.synchronize, where)) if where.type == "cuda" else (1, lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    wait()
    return (time.perf_counter() - start) / calls


def peak_memory(where: torch.device) -> float:
    """Peak memory in megabytes: of the GPU, or of the process."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def machine(where: torch.device) -> str:
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {usable_cpus()} cores, {torch.get_num_threads()} threads"


def measured(command: str, case: Case, repeats: int) -> dict[str, Any]:
    """Time a case and its bare calls in turn, `repeats` times. Returns the medians of both and of the ratios."""
    for _ in range(WARM_UP):
        case.ours()
    memory = peak_memory(case.where)
    bare = case.bare()
    for _ in range(WARM_UP):
        bare()
    ours: list[float] = []
    raw: list[float] = []
    both = [(raw, bare), (ours, case.ours)]
    for turn in range(repeats):
        for kind, work in reversed(both) if turn % 2 else both:
            kind.append(_timed(work, case.where))
    return {
        "bench": command,
        "ratio": round(statistics.median(a / b for a, b in zip(ours, raw, strict=True)), 3),
        "ours_seconds": round(statistics.median(ours), 4),
        "raw_seconds": round(statistics.median(raw), 4),
        "images_per_second": round(case.images / statistics.median(ours), 2),
        "peak_memory_mb": round(memory),
        "raw_calls": case.calls,
        "repeats": repeats,
        "machine": machine(case.where),
        "versions": {name: version for name, version in versions().items() if name in ("python", "torch", "diffusers", "accelerate")},
    }

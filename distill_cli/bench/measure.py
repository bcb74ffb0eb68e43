"""What distill adds to the bare network calls: both are timed in turn in one process, and the ratio is the result."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill_cli.runs import versions

WARM_UP = 2
GPU_CALLS = 5
"""Calls timed together on a GPU, which works ahead of what waits for it."""


@dataclass
class Case:
    """Two ways to the same network calls; `images` is how many either makes or sees. `bare` makes the second when it is time."""

    ours: Callable[[], Any]
    bare: Callable[[], Callable[[], Any]]
    images: int
    calls: str
    where: torch.device


def _timed(work: Callable[[], Any], where: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    calls = GPU_CALLS if where.type == "cuda" else 1
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return (time.perf_counter() - start) / calls


def peak_memory(where: torch.device) -> float:
    """Megabytes: of the GPU's memory, or of the process's."""
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {torch.get_num_threads()} threads"


def measured(command: str, case: Case, repeats: int) -> dict[str, Any]:
    """Time a case of `command` against its bare calls, in turn, `repeats` times; medians of both, and of the ratio turn by turn."""
    for _ in range(WARM_UP):
        case.ours()
    memory = peak_memory(case.where)
    bare = case.bare()
    for _ in range(WARM_UP):
        bare()
    ours: list[float] = []
    raw: list[float] = []
    for turn in range(repeats):
        for kind, work in ((ours, case.ours), (raw, bare)) if turn % 2 else ((raw, bare), (ours, case.ours)):
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

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

from distill_cli.launch import HALF
from distill_cli.processes import usable_cpus
from distill_cli.runs import versions

WARM_UP, PRODUCTS, KERNELS = 2, 10, 10
"""Untimed calls; products of matrices whose fastest is the machine's peak; lines of a profile."""
SIDES = {"cuda": 8192, "cpu": 2048}
"""Sides of those matrices."""
GPU_CALLS = 5
"""Calls that are timed together on a GPU, where the host runs ahead."""


@dataclass
class Case:
    """A command and its bare network calls. `images` is the number that either makes or sees; `bare()` builds the bare calls late.

    `flop` is the arithmetic of its networks in a call, `planned` are the bytes that a plan counts.
    """

    ours: Callable[[], Any]
    bare: Callable[[], Callable[[], Any]]
    images: int
    calls: str
    where: torch.device
    precision: str
    flop: int
    planned: int


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


def peak_of(where: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s of a product of two matrices, and the number type: bf16 on a GPU, that of `precision` on a CPU."""
    kind = torch.bfloat16 if where.type == "cuda" else HALF.get(precision, torch.float32)
    side = SIDES[where.type]
    a, b = (torch.randn(side, side, device=where).to(kind) for _ in range(2))
    fastest = min(_timed(partial(torch.mm, a, b), where) for _ in range(PRODUCTS))
    return 2 * side**3 / fastest, str(kind).removeprefix("torch.")


def profile(work: Callable[[], Any], where: torch.device) -> list[dict[str, Any]]:
    """The KERNELS operations that take most of the time in one call, with their shares: on a GPU its kernels."""
    kinds, on_card = torch.profiler.ProfilerActivity, where.type == "cuda"
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_card else [])]) as seen:
        work()
        if on_card:
            torch.cuda.synchronize(where)
    events = [each for each in seen.key_averages() if not on_card or each.device_type == torch.autograd.DeviceType.CUDA]
    spent = {each.key: each.self_device_time_total if on_card else each.self_cpu_time_total for each in events}
    total, top = sum(spent.values()) or 1, sorted(events, key=lambda each: -spent[each.key])[:KERNELS]
    return [{"operation": each.key, "share": round(spent[each.key] / total, 4), "calls": each.count} for each in top]


def machine(where: torch.device) -> str:
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {usable_cpus()} cores, {torch.get_num_threads()} threads"


def _rounded(value: float) -> float:
    """To four digits, however small it is: what is worked out from several of them holds on a slow machine too."""
    return float(f"{value:.4g}")


def measured(command: str, case: Case, repeats: int, profiled: bool = False) -> dict[str, Any]:
    """Time a case and its bare calls in turn, `repeats` times. Returns the medians of both and of the ratios, and what was `profiled`."""
    begun = time.perf_counter()
    case.ours()
    first = time.perf_counter() - begun
    for _ in range(WARM_UP - 1):
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
    peak, kind_of_peak = peak_of(case.where, case.precision)
    seconds = statistics.median(ours)
    return {
        "bench": command,
        "ratio": _rounded(statistics.median(a / b for a, b in zip(ours, raw, strict=True))),
        "ours_seconds": _rounded(seconds),
        "raw_seconds": _rounded(statistics.median(raw)),
        "first_seconds": _rounded(first),
        "images_per_second": _rounded(case.images / seconds),
        "peak_memory_mb": round(memory),
        "planned_memory_mb": round(case.planned / 1e6),
        "tflop": _rounded(case.flop / 1e12),
        "peak_tflops": _rounded(peak / 1e12),
        "peak_type": kind_of_peak,
        "share_of_peak": _rounded(case.flop / seconds / peak),
        "raw_calls": case.calls,
        "repeats": repeats,
        "machine": machine(case.where),
        "versions": {name: version for name, version in versions().items() if name in ("python", "torch", "diffusers", "accelerate")},
        **({"profile": profile(case.ours, case.where)} if profiled else {}),
    }

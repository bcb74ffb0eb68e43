"""The sections of docs/gpu.sh: python docs/gpu.py SECTION; the timed ones stand in gpu_speed.py. Each adds figures to
$OUT/figures.jsonl; `table` prints them all. Used are the command line, `load`, `Model.sample` and `compile_model`, and diffusers for what
is compared with.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

OUT, WORK = Path(os.environ.get("OUT", "runs/gpu")).resolve(), Path(os.environ.get("WORK", "runs/gpu-work")).resolve()
FULL = WORK / "sd15"  # Stable Diffusion 1.5's architecture with random weights
DEVICE = os.environ.get("DEVICE", "cuda")  # cpu: a try of the timed sections, with tiny-sd for Stable Diffusion and small products
PROMPT = "a small red circle in the centre of a white background"
FIRST = Path(__file__).with_name("gpu-first.jsonl")  # of a card (one H200, torch 2.11, commit f4ea377), and what is wanted


def figure(name: str, value: Any, number: float | None = None) -> None:
    """Note a figure: its text, and the number in it."""
    with open(OUT / "figures.jsonl", "a") as file:
        file.write(json.dumps({"figure": name, "value": str(value), "number": number}) + "\n")
    print(f"{name}: {value}")


def figures() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (OUT / "figures.jsonl").read_text().splitlines()] if (OUT / "figures.jsonl").exists() else []


def known(name: str) -> float:
    """The number of a figure of an earlier section."""
    return next((found["number"] for found in figures() if found["figure"] == name and found["number"]), float("nan"))


def table() -> None:
    """The table in markdown, and gpu.json."""
    rows, first = figures(), {row["figure"]: row for row in map(json.loads, FIRST.read_text().splitlines())}
    print("| figure | measured | first run | wanted |\n|---|---|---|---|")
    for row in rows:
        then = first.get(row["figure"], {"first": "", "wanted": ""})
        print(f"| {row['figure']} | {row['value']} | {then['first']} | {then['wanted']} |")
    (OUT / "gpu.json").write_text(json.dumps(rows, indent=1) + "\n")


def timed(work: Any, count: int = 5, warm: int = 2) -> float:
    """Seconds of a call."""
    import torch

    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    for _ in range(warm):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(count):
        work()
    wait()
    return (time.perf_counter() - start) / count


def begin(*arguments: Any, device: str = "cuda", **env: str) -> subprocess.Popen[str]:
    """A distill command in a process of its own, in WORK."""
    command = [sys.executable, "-m", "distill_cli", *map(str, arguments), *(("--device", device) if device else ())]
    settings = {**os.environ, "OMP_NUM_THREADS": "2", **env}
    return subprocess.Popen(command, cwd=WORK, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        _, err = process.communicate()
        if process.returncode:
            raise SystemExit(f"{process.args}: {err[-1500:]}")


def facts() -> None:
    import torch

    from docs import gpu_speed

    side, room = (8192, 2**30) if DEVICE == "cuda" else (512, 2**20)
    if DEVICE == "cuda":
        figure("card", torch.cuda.get_device_name())
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        figure("driver, memory", subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    import diffusers

    figure("torch, diffusers", f"{torch.__version__}, {diffusers.__version__}")
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * side**3 / timed(lambda: a @ b, 20) / 1e12
    figure(gpu_speed.PEAK, f"{rate:.0f} TFLOP/s", rate)
    x = torch.randn(room, device=DEVICE)
    rate = 2 * 4 * room / timed(x.clone, 10) / 1e12
    figure("copy on the card", f"{rate:.2f} TB/s", rate)
    amount = gpu_speed.flops()
    figure(gpu_speed.UNET, f"{amount:.3f} TFLOP", amount)


def checks() -> None:
    """Arithmetic that means what it says, waits in a step as the fake card counts them."""
    import torch

    from distill_cli import launch

    where = torch.device("cuda")
    x, w = torch.randn(8, 64, 64, 64, device=where), torch.randn(64, 64, 3, 3, device=where)
    a, b = (torch.randn(1024, 1024, device=where) for _ in range(2))
    for precision in ("no", "tf32", "bf16"):
        launch.arithmetic(precision)
        for name, call, exact in (
            ("convolution", lambda: torch.conv2d(x, w), torch.conv2d(x.double(), w.double())),
            ("product", lambda: a @ b, a.double() @ b.double()),
        ):
            error = ((call().double() - exact).norm() / exact.norm()).item()
            figure(f"error of a float32 {name}, precision {precision}", f"{error:.1e}", error)
    os.chdir(WORK)
    for name, command in {
        "dmd tiny-sd": ("dmd", "--teacher", "tiny-sd", "--prompts", "shapes", "--guidance-scale", 3),
        "dmd tiny": ("dmd", "--teacher", "tiny"),
        "cm ect tiny": ("cm", "--method", "ect", "--teacher", "tiny", "--data", "digits"),
    }.items():
        figure(f"waits a step, {name}", waits(name.replace(" ", "-"), *command, "--batch-size", 4))


def fsdp() -> None:
    """A dmd step of two networks under FSDP, clipped; by two processes where there are two cards."""
    import torch

    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    script = Path("tests/training/fsdp_times.py").resolve()
    count = str(min(2, max(1, torch.cuda.device_count())))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, str(script), DEVICE]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    print(done.stderr)
    said = [line for line in done.stdout.splitlines() if line.startswith("SEEN")]
    said += [line for line in done.stderr.splitlines() if re.search(r"Error: |error: ", line)]
    figure(f"FSDP on {count}, bf16, a dmd step of two networks: what the student's network gets", said[0] if said else done.stderr[-200:])


def ddp() -> None:
    """A run of two processes against one process of the same command; on a CPU over gloo."""
    import torch

    name = "two cards (DDP) against one, 4 steps, float32: losses"
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        figure(name, "not run: one card")
        return
    runs = {out: train(DMD, out, 4, "no", True, *more) for out, more in {"ddp-1": (), "ddp-2": ("--num-processes", 2)}.items()}
    finish(*runs.values())
    one, two = ([json.loads(line) for line in (WORK / out / "metrics.jsonl").read_text().splitlines()] for out in runs)
    assert len(one) == len(two) == 4, (len(one), len(two))
    apart = max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(one, two, strict=True) for key in a if "loss" in key and a[key])
    figure(name, f"{'equal' if apart < NEAR else 'NOT equal'} within {NEAR:g}: at most {apart:.1e} apart, relatively", apart)


def waits(out: str, *command: Any) -> int:
    """Operations of a step for which the host waits, copies that block among them."""
    from unittest.mock import patch

    import torch
    from accelerate.state import AcceleratorState

    from distill_cli.cli.app import run
    from distill_cli.training.engine import Engine

    AcceleratorState._reset_state(True)
    counts, plain = [], Engine.advance

    def advance(self: Engine) -> Any:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = plain(self)
        torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(one.message) for one in said))
        return out

    with patch.object(Engine, "advance", advance), patch("distill_cli.cli.common.compare"):
        options = ("--device", "cuda", "--steps", "3", "log_every=1000", "sample_every=0", "--out", f"waits-{out}")
        assert run([str(part) for part in (*command, *options)]) == 0
    return counts[1]


DMD = ("dmd", "--teacher", "shapes", "--prompts", "shapes", "--guidance-scale", 3)
CM = ("cm", "--method", "ict", "--teacher", "digits", "--data", "digits", "dropout=0.1")
SMALL = ("--batch-size", 8, "sample_every=0", "save_every=6", "log_every=1", "warmup_steps=0", "ema_halflife=100", "--lr", "1e-3")


NEAR = 1e-3  # of a loss: how far two processes may be from one, whose sums are rounded in another order


def train(command: tuple[Any, ...], out: str, steps: int, precision: str, key: bool, *more: Any) -> subprocess.Popen[str]:
    settings = ("--steps", steps, "--precision", precision, f"deterministic={str(key).lower()}", "--out", out)
    return begin(*command, *SMALL, *settings, *more, device=DEVICE)


def verdict(one: str, other: str) -> str:
    """Whether the weights, averages and metrics of two runs are the same bits; else the files that differ."""
    files = []
    for name in (one, other):
        newest = sorted((WORK / name / "checkpoints").iterdir())[-1]
        files.append({path.name: path.read_bytes() for path in (WORK / name / "metrics.jsonl", *newest.glob("*.safetensors"))})
    apart = sorted(name for name in files[0] if files[0][name] != files[1].get(name))
    return f"others: {', '.join(apart)}" if apart else "same bits"


def same() -> None:
    """The same commands twice, with and without `deterministic`."""
    runs = {}
    for kind, command in {"dmd": DMD, "cm": CM}.items():
        for key in (False, True):
            for precision in ("no", "bf16"):
                outs = [f"same-{kind}-{key}-{precision}-{turn}" for turn in (1, 2)]
                runs[kind, key, precision] = outs, [train(command, out, 12, precision, key) for out in outs]
    for (kind, key, precision), (outs, processes) in runs.items():
        name = f"same {kind} command twice, {precision.replace('no', 'fp32')}" + (", deterministic" if key else "")
        try:
            finish(*processes)
            figure(name, verdict(*outs))
        except SystemExit as error:
            figure(name, f"failed: {str(error)[-300:]}")


def resume() -> None:
    """A run of 12 steps against one that is resumed at 6, with another number of threads on the host."""
    runs = [train(DMD, "whole", 12, "no", True), train(DMD, "resumed", 6, "no", True)]
    finish(*runs)
    finish(begin("dmd", "--resume", "resumed", "--steps", 12, device="", OMP_NUM_THREADS="8"))
    figure("resumed run, deterministic", verdict("whole", "resumed"))


def equal() -> None:
    """Pictures of the card against the CPU's, of 255, and pairs."""
    import numpy as np

    jobs = {"digits": (), "shapes": ("--prompts", "shapes-held"), "tiny-sd": ("--prompts", "shapes-held", "--steps", 4)}
    made = {}
    for name, more in jobs.items():
        for device, precision in (("cpu", "no"), ("cuda", "no"), ("cuda", "tf32"), ("cuda", "bf16")):
            out = f"equal-{name}-{device}-{precision}"
            options = ("--num", 16, "--seed", 6, "--precision", precision, "format=npz", "--out", out)
            made[name, device, precision] = out, begin("sample", "--model", name, *more, *options, device=device)
    finish(*(process for _, process in made.values()))
    pictures = {key: np.load(WORK / out / "samples.npz")["arr_0"].astype(int) for key, (out, _) in made.items()}
    for (name, device, precision), there in pictures.items():
        if device == "cuda":
            apart = np.abs(there - pictures[name, "cpu", "no"])
            value = f"at most {apart.max()}, mean {apart.mean():.4f}"
            figure(f"pictures of {name}, {precision}: card against CPU, of 255", value, float(apart.max()))


def make() -> None:
    if (FULL / "model_index.json").exists():
        return
    if DEVICE == "cuda":
        from tests.models.full_size import make as write

        write(FULL)
    else:
        from distill_cli.models import formats, load

        formats.save(load("tiny-sd"), FULL)


SECTIONS = {
    "facts": facts,
    "checks": checks,
    "fsdp": fsdp,
    "ddp": ddp,
    "same": same,
    "resume": resume,
    "equal": equal,
    "make": make,
    "table": table,
}


def main(section: str, *rest: str) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    if section == "failed":
        figure(f"section {rest[0]}", f"failed: {rest[1]}")
    elif section in SECTIONS:
        SECTIONS[section]()
    else:
        from docs import gpu_speed

        gpu_speed.run(section)


if __name__ == "__main__":
    main(*sys.argv[1:])

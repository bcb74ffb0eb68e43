"""The sections of docs/gpu.sh: python docs/gpu.py SECTION. Each adds figures to $OUT/figures.jsonl; `table` prints them all.
Only the command line is used, `load` and `Model.sample`, and diffusers for what is compared with.
"""

from __future__ import annotations

import gc
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

    for _ in range(warm):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        work()
    torch.cuda.synchronize()
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

    figure("card", torch.cuda.get_device_name())
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        figure("driver, memory", subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    import diffusers

    figure("torch, diffusers", f"{torch.__version__}, {diffusers.__version__}")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / timed(lambda: a @ b, 20) / 1e12
    figure("bf16 8192^3 product", f"{rate:.0f} TFLOP/s", rate)
    x = torch.randn(2**30, device="cuda")
    rate = 2 * 4 * 2**30 / timed(x.clone, 10) / 1e12
    figure("copy on the card", f"{rate:.2f} TB/s", rate)
    amount = flops()
    figure("UNet, forward, 64x64 latents", f"{amount:.3f} TFLOP", amount)


def unet() -> Any:
    """The UNet of Stable Diffusion 1.5 with random weights on the card."""
    import torch
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(FULL / "unet", torch_dtype=torch.float32).to("cuda")


def flops() -> float:
    """10^12 operations of a forward call of that UNet for one picture."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from distill_cli.models.stable_diffusion import UNETS

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = UNet2DConditionModel(**UNETS["sd15"])
        network(torch.empty(1, 4, 64, 64), torch.empty(1), encoder_hidden_states=torch.empty(1, 77, 768))
    return counter.get_total_flops() / 1e12


def checks() -> None:
    """Arithmetic that means what it says, waits in a step as the fake card counts them, FSDP's times."""
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
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    script = Path("tests/training/fsdp_times.py").resolve()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(torch.cuda.device_count()), str(script), "cuda"]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    print(done.stderr)
    said = [line for line in done.stdout.splitlines() if line.startswith("SEEN")]
    said += [line for line in done.stderr.splitlines() if re.search(r"Error: |error: ", line)]
    figure("FSDP, bf16: what the student's network gets", said[0] if said else done.stderr[:200])
    os.chdir(WORK)
    for name, command in {
        "dmd tiny-sd": ("dmd", "--teacher", "tiny-sd", "--prompts", "shapes", "--guidance-scale", 3),
        "dmd tiny": ("dmd", "--teacher", "tiny"),
        "cm ect tiny": ("cm", "--method", "ect", "--teacher", "tiny", "--data", "digits"),
    }.items():
        figure(f"waits a step, {name}", waits(name.replace(" ", "-"), *command, "--batch-size", 4))


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


def train(command: tuple[Any, ...], out: str, steps: int, precision: str, key: bool, **env: str) -> subprocess.Popen[str]:
    settings = ("--steps", steps, "--precision", precision, f"deterministic={str(key).lower()}", "--out", out)
    return begin(*command, *SMALL, *settings, **env)


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
    from tests.models.full_size import make as write

    if not (FULL / "model_index.json").exists():
        write(FULL)


def dmd(batch: int) -> None:
    """`distill bench dmd` at full size."""
    settings = (f"teacher={FULL}", f"batch_size={batch}", "precision=bf16", "guidance_scale=3", "log_every=50")
    command = [sys.executable, "-m", "distill_cli", "bench", "dmd", "--repeats", "2", "--json", *settings]
    done = subprocess.run(command, cwd=WORK, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-1500:])
    found = json.loads(done.stdout)
    print(found)
    seconds, peak, amount = found["ours_seconds"], known("bf16 8192^3 product"), known("UNet, forward, 64x64 latents")
    # teacher, with and without condition; fake score; student on noise and on pairs, and fake score, each forward and twice that backward
    rate = amount * batch * (2 + 1 + 3 * 2 + 3) / seconds
    figure(f"dmd step, batch {batch}, bf16, pairs, guidance 3", f"{seconds * 1000:.0f} ms", seconds)
    figure(f"dmd, batch {batch}: arithmetic", f"{rate:.0f} TFLOP/s", rate)
    figure(f"dmd, batch {batch}: share of the peak", f"{rate / peak:.1%}", rate / peak)
    figure(f"dmd, batch {batch}: over its raw calls", f"{found['ratio']:.3f}", found["ratio"])
    figure(f"dmd, batch {batch}: images a second", found["images_per_second"], found["images_per_second"])
    memory = found["peak_memory_mb"] * 1e6 / 2**30
    figure(f"dmd, batch {batch}: memory", f"{memory:.1f} GiB", memory)


def network() -> None:
    """The raw UNet at batch 16, forward and forward+backward."""
    import torch

    base, batch = unet().train(), 16
    amount, peak = known("UNet, forward, 64x64 latents"), known("bf16 8192^3 product")
    for name, dtype, form in (
        ("float32 weights under autocast", torch.float32, torch.contiguous_format),
        ("bf16 weights", torch.bfloat16, torch.contiguous_format),
        ("bf16 weights, channels_last", torch.bfloat16, torch.channels_last),
    ):
        net = base.to(dtype=dtype, memory_format=form)
        x = torch.randn(batch, 4, 64, 64, device="cuda", dtype=dtype).to(memory_format=form)
        c = torch.randn(batch, 77, 768, device="cuda", dtype=dtype)
        t = torch.full((batch,), 500.0, device="cuda")

        def forward(net: Any = net, x: Any = x, t: Any = t, c: Any = c, wide: bool = dtype == torch.float32) -> Any:
            with torch.autocast("cuda", torch.bfloat16, enabled=wide):
                return net(x, t, encoder_hidden_states=c, return_dict=False)[0]

        def both(forward: Any = forward, net: Any = net) -> None:
            forward().float().square().mean().backward()
            net.zero_grad(set_to_none=True)

        with torch.no_grad():
            share = amount * batch / timed(forward, 3) / peak
        figure(f"UNet, forward, {name}", f"{share:.1%}", share)
        share = 3 * amount * batch / timed(both, 3) / peak
        figure(f"UNet, forward+backward, {name}", f"{share:.1%}", share)


def one_step() -> None:
    """One step of the few-step sampler, with and without the decoder."""
    import torch

    from distill_cli import launch
    from distill_cli.diffusion.noise import Draws
    from distill_cli.models import load

    model = load(str(FULL)).to("cuda").with_prompts([PROMPT])
    sampling = model.with_defaults("few-step", 1, 1.0)
    for precision in ("no", "tf32", "bf16", "fp16"):
        for batch in (1, 8) if precision == "bf16" else (1,):
            labels = torch.zeros(batch, dtype=torch.long)
            for what, call in (("", model.sample), (", without decoder", model.generate)):

                def work(call: Any = call, labels: Any = labels, precision: str = precision) -> None:
                    with launch.autocast(torch.device("cuda"), precision):
                        call(Draws(0, range(len(labels))), labels, sampling)

                milliseconds = timed(work) / batch * 1000
                each = ", a picture" if batch > 1 else ""
                figure(f"one step, {precision}, batch {batch}{what}{each}", f"{milliseconds:.1f} ms", milliseconds)


def pipeline() -> None:
    """diffusers' own pipeline, and the decoder alone."""
    import diffusers
    import torch

    for name, dtype, last in (("fp16", torch.float16, False), ("bf16 channels_last", torch.bfloat16, True)):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(FULL, torch_dtype=dtype).to("cuda")
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if last:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)

        def work(pipe: Any = pipe) -> None:
            pipe([PROMPT], num_inference_steps=1, guidance_scale=1)

        milliseconds = timed(work) * 1000
        figure(f"diffusers' pipeline, one step, {name}, batch 1", f"{milliseconds:.1f} ms", milliseconds)
        if last:
            z = torch.randn(1, 4, 64, 64, device="cuda", dtype=dtype)
            with torch.no_grad():
                milliseconds = timed(lambda pipe=pipe, z=z: pipe.vae.decode(z, return_dict=False)) * 1000
            figure("decoder, bf16, batch 1", f"{milliseconds:.1f} ms", milliseconds)
        del pipe
        gc.collect()


def compiled() -> None:
    """The UNet as a CUDA graph, batch 1."""
    import torch

    net = torch.compile(unet().to(torch.bfloat16, memory_format=torch.channels_last).eval(), mode="reduce-overhead")
    z = torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    c, t = torch.randn(1, 77, 768, device="cuda", dtype=torch.bfloat16), torch.tensor([999], device="cuda")
    with torch.no_grad():
        start = time.time()
        net(z, t, encoder_hidden_states=c, return_dict=False)
        figure("UNet compiled: seconds to compile", f"{time.time() - start:.0f} s", time.time() - start)
        milliseconds = timed(lambda: net(z, t, encoder_hidden_states=c, return_dict=False), 10, 5) * 1000
    figure("UNet compiled (reduce-overhead), bf16, batch 1", f"{milliseconds:.1f} ms", milliseconds)


SECTIONS = {
    "facts": facts,
    "checks": checks,
    "same": same,
    "resume": resume,
    "equal": equal,
    "make": make,
    "network": network,
    "one-step": one_step,
    "pipeline": pipeline,
    "compile": compiled,
    "table": table,
}


def main(section: str, *rest: str) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    if section == "failed":
        figure(f"section {rest[0]}", f"failed: {rest[1]}")
    elif section.startswith("dmd-"):
        dmd(int(section[4:]))
    else:
        SECTIONS[section]()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Peak memory of loading and training over what has to be in memory, on the CPU: python -m docs.memory FOLDER

`sample`: Stable Diffusion 1.5's size with random weights (2.1 GB on disk, in fp16), from a diffusers folder and from a single file, over
the weights in float32. `dmd`: a start and a resume, up to the end of the first step's preparation, on a pixel network of 456 million
parameters, over the teacher, the student, the fake score and the average; at the resume also the two moments of both trained networks.
Each is a process of its own. `resident` is its largest resident set, the libraries' code among it; `anonymous` is the part that no file
backs.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

from docs.asked import asked

GIB = 2**30


def _watch(found: dict[str, int], done: threading.Event) -> None:
    """Keep the largest anonymous memory of this process, in bytes."""
    while not done.wait(0.01):
        lines = Path("/proc/self/status").read_text().splitlines()
        now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
        found["anonymous"] = max(found.get("anonymous", 0), now)


def command(arguments: list[str], ending: str) -> None:
    """Run a command line, print its largest memory as JSON; a run of `ending` "step" ends before its first step, of "saved" after it."""
    import resource

    from distill_cli.cli.app import run

    found: dict[str, int] = {}
    done = threading.Event()
    threading.Thread(target=_watch, args=(found, done), daemon=True).start()
    if ending:
        from distill_cli.training.engine import Engine

        step = Engine.train_step

        def ended(engine: Engine) -> None:
            if ending == "saved":
                step(engine)
                engine.save()
            raise KeyboardInterrupt

        Engine.train_step = ended  # type: ignore[method-assign]
    code = run(arguments)
    done.set()
    found["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"code": code, **found}))


def measure(*arguments: object, ending: str = "") -> dict[str, int]:
    """The largest memory of a command, in bytes."""
    call = [sys.executable, "-m", "docs.memory", "--command", ending, *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=os.environ)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] in (130 if ending else 0,), done.stderr
    return result


def stable_diffusion(folder: Path) -> int:
    """Make the model at full size as a folder and as a single file beside its configuration; returns its parameters."""
    from distill_cli.tensors import Tensors
    from tests.models import full_size, original

    whole, single = folder / "sd15", folder / "single"
    if not (whole / "model_index.json").exists():
        full_size.make(whole)
    if not (single / "x.safetensors").exists():
        for path in whole.rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                (single / path.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
                (single / path.relative_to(whole)).write_bytes(path.read_bytes())
        original.write(whole, single / "x.safetensors", 4, 2, [True, True, True, False], 4, 2)
    (folder / "prompts.txt").write_text("a small red circle\n")
    shapes = Tensors(single / "x.safetensors").shapes
    return sum(math.prod(shape) for name, shape in shapes.items() if "position_ids" not in name)


def pixels(folder: Path | str, channels: list[int]) -> int:
    """Make a pixel teacher with random weights; returns its parameters."""
    from distill_cli.diffusion.schedule import EDMSchedule
    from distill_cli.models import pixel
    from distill_cli.models.formats import save
    from distill_cli.models.lineage import Lineage

    model = pixel.create(
        resolution=16, channels=channels, attention=[False] * len(channels), classes=["0"], schedule=EDMSchedule(),
        parameterisation="edm", lineage=Lineage(name="teacher"),
    )  # fmt: skip
    save(model, Path(folder))
    return sum(parameter.numel() for parameter in model.denoiser.parameters())


def training(folder: Path, channels: list[int]) -> tuple[int, dict[str, dict[str, int]]]:
    """Bytes of one network, and the largest memory of a start and of a resume of `dmd`, before the first step."""
    size = 4 * pixels(folder / "teacher", channels)
    common = ["--teacher", folder / "teacher", "batch_size=1", "sample_every=0", "save_every=1", "keep=1"]
    started = measure("dmd", *common, "--steps", 1, "--out", folder / "started", ending="step")
    measure("dmd", *common, "--steps", 1, "--out", folder / "run", ending="saved")
    resumed = measure("dmd", "--resume", folder / "run", "--steps", 2, ending="step")
    return size, {"start": started, "resume": resumed}


def row(what: str, held: int, found: dict[str, int]) -> None:
    ratios = " | ".join(f"{found[key] / GIB:.2f} GiB, {found[key] / held:.3f}" for key in ("resident", "anonymous"))
    print(f"| {what} | {held / GIB:.2f} GiB | {ratios} |", flush=True)


def main(folder: Path) -> None:
    print("| | must be held | resident | anonymous |\n|---|---|---|---|")
    count = stable_diffusion(folder)
    for name, model in (("folder", folder / "sd15"), ("single file", folder / "single/x.safetensors")):
        arguments = ["--prompts", folder / "prompts.txt", "--num", 1, "--solver", "ddim", "--steps", 1, "resolution=64", "guidance_scale=1"]
        row(f"sample, {name}", 4 * count, measure("sample", "--model", model, *arguments, "--device", "cpu", "--out", folder / name))
    size, found = training(folder / "dmd", [512, 1024, 1536])
    row("dmd, start", 4 * size, found["start"])
    row("dmd, resume", 8 * size, found["resume"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--command"]:
        command(sys.argv[3:], sys.argv[2])
    else:
        main(asked())

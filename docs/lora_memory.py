"""One LoRA step of dmd at full architecture, with random weights, on the CPU: what it keeps in memory.

    python -m docs.lora_memory sd15:64 sd15:32 sdxl:64

Each model runs in a process of its own, built in bf16, with latents of 32x32 and a batch of 1. It prints the peak of the process's
resident memory, and the numbers in the base and in one LoRA.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch


def measured(name: str, rank: int) -> str:
    """A step of the model called `name`; its peak in words."""
    from distill_cli.bench.stand_ins import StandIns
    from distill_cli.methods.dmd.config import DMDConfig
    from distill_cli.methods.dmd.objective import DMD
    from distill_cli.models.cost import sketch
    from distill_cli.runs import Run
    from distill_cli.training.engine import Engine

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        config = DMDConfig(
            teacher=name, lora=rank, batch_size=1, steps=1, precision="bf16", gradient_checkpointing=True, device="cpu", out=out, lr=1e-4
        )
        bare = sketch(name)
        bare.denoiser.to(torch.bfloat16)
        model = replace(StandIns("dmd", folder=Path(folder), random=True)._filled(bare, name), size=(32, 32))
        begun = getrusage(RUSAGE_SELF).ru_maxrss
        objective = DMD(config, model, None, ["a photograph of a lighthouse", "a drawing of a fox"])
        engine = Engine(config, objective)
        engine.open(Run.create(out, "", "dmd"))
        engine.train_step()
        base = sum(p.numel() for n, p in model.denoiser.named_parameters() if ".lora_" not in n)
        adapter = sum(p.numel() for p in objective.trained["student"].parameters())
    peak = getrusage(RUSAGE_SELF).ru_maxrss
    return f"{name}: base {base:,} numbers, a LoRA of rank {rank} {adapter:,}; {begun / 2**20:.2f} GiB loaded, peak {peak / 2**20:.2f} GiB"


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(measured(sys.argv[2], int(sys.argv[3])), flush=True)
    else:
        for name, rank in (each.split(":") for each in sys.argv[1:]):
            subprocess.run([sys.executable, "-m", "docs.lora_memory", "--one", name, rank], check=True)

"""What sharing one run between two processes costs, against two runs of their own, one thread each, on the digits.

    python -m docs.overhead runs/overhead      # 5 minutes on 2 idle cores

One run of two processes with batch 32 against two independent runs with batch 16 side by side: the same work on the same cores,
so the ratio of the seconds a step is what exchanging gradients and waiting for one another costs. Steps are timed by the runs
themselves (speed.jsonl), the first ten left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from docs.asked import asked

BATCH, STEPS = 32, 60
OPTIONS = ("--teacher", "digits", "--steps", str(STEPS), "log_every=5", "sample_every=0", "save_every=1000", "warmup_steps=1")


def start(out: Path, batch: int, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "distill_cli", "dmd", *OPTIONS, f"batch_size={batch}", *options, "--out", str(out)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seconds_a_step(run: Path) -> float:
    """The median over the logged stretches of a run, without the first ten steps."""
    lines = [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()]
    pairs = zip(lines, lines[1:], strict=False)
    return median((b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairs if a["step"] >= 10)


def main(folder: Path, repeats: int = 3) -> float:
    """Print each turn's ratio and return their median."""
    ratios = []
    for turn in range(repeats):
        alone = [start(folder / f"alone-{turn}-{k}", BATCH // 2) for k in range(2)]
        for process in alone:
            assert process.wait() == 0
        assert start(folder / f"together-{turn}", BATCH, "--num-processes", "2").wait() == 0
        one = max(seconds_a_step(folder / f"alone-{turn}-{k}") for k in range(2))
        two = seconds_a_step(folder / f"together-{turn}")
        ratios.append(two / one)
        print(f"two runs alone {one:.3f} s a step, one run of two processes {two:.3f} s: {ratios[-1]:.3f}", flush=True)
    print(f"median ratio: {median(ratios):.3f}")
    return median(ratios)


if __name__ == "__main__":
    main(asked())

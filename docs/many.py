"""The memory of `distill evaluate`: 5,000 and 50,000 pictures of 32 pixels through a small network, from files and from folders.

python -m docs.many make        # the pictures and the network, in runs/many
python -m docs.many measure

The evaluation of 50,000 pictures is killed with half of its features made, and the same command goes on; another one, of the same
pictures under another name, runs in two processes. All have the same scores. Prints the peak of each command's memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER, PIXELS, REAL, FEW, MANY = Path("runs/many").resolve(), 32, 2000, 5000, 50_000


def make() -> None:
    """Pictures of random pixels and a network of random weights."""
    import numpy as np
    import torch
    from PIL import Image

    from distill_cli.models.classifier import Classifier, ClassifierInfo

    FOLDER.mkdir(parents=True)
    torch.manual_seed(0)
    Classifier(ClassifierInfo((3, PIXELS, PIXELS), tuple("0123456789"), 8, "nothing")).save(FOLDER / "network")
    generator = np.random.default_rng(0)
    for count in (REAL, FEW, MANY):
        pictures = generator.integers(0, 256, (count, PIXELS, PIXELS, 3), dtype=np.uint8)
        np.savez(FOLDER / f"{count}.npz", arr_0=pictures, arr_1=generator.integers(0, 10, count))
        if count != REAL:
            (FOLDER / f"pictures-{count}").mkdir()
            for k, picture in enumerate(pictures):
                Image.fromarray(picture).save(FOLDER / f"pictures-{count}/{k:05d}.png", compress_level=1)
    os.link(FOLDER / f"{MANY}.npz", FOLDER / "again.npz")


def evaluate(model: str, *more: str, kill: bool = False) -> dict[str, float]:
    """Measure pictures against the real ones; prints the peak of the memory. `kill`: end it when half of the features are made.

    A process begins with the peak of the one that starts it, so this program imports nothing large here.
    """
    options = ["--data", f"{REAL}.npz", "--classifier", "network", "measures=accuracy,frechet,kid"]
    command = ["evaluate", "--model", model, *options, "--out", f"report-{model}", *more]
    begun = time.time()
    process = subprocess.Popen([sys.executable, "-m", "distill_cli", *command], cwd=FOLDER, stdout=subprocess.DEVNULL)
    while kill and len(list(FOLDER.glob(f".{model}.features/*/0*"))) < MANY // 500 // 2:
        time.sleep(0.1)
    if kill:
        process.kill()
    _, code, used = os.wait4(process.pid, 0)
    ended = "killed" if kill else f"code {code}"
    print(f"{' '.join([model, *more])}: {used.ru_maxrss / 1024:.0f} MB, {time.time() - begun:.0f} s, {ended}", flush=True)
    return {} if kill else dict(json.loads((FOLDER / f"report-{model}/report.json").read_text())["rows"][0], model="")


def measure() -> None:
    few, many = f"{FEW}.npz", f"{MANY}.npz"
    evaluate(few)
    evaluate(many, kill=True)
    rows = [evaluate(many), evaluate("again.npz", "--num-processes", "2")]
    evaluate(f"pictures-{FEW}")
    rows.append(evaluate(f"pictures-{MANY}"))
    print("equal" if rows[0] == rows[1] and rows[0]["frechet"] == rows[2]["frechet"] else f"different: {rows}")


if __name__ == "__main__":
    {"make": make, "measure": measure}[sys.argv[1]]()

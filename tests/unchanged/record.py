"""What must not change while the house is rebuilt: losses and gradient norms of 20 steps of every method, pairs, samples, folders.

    python -m tests.unchanged.record          # writes recorded.safetensors, machine.json and folders/ beside this file

It was run once, before the rebuilding, and its results are tests from then on (test_unchanged.py).
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
ARRAYS, MACHINE, FOLDERS = HERE / "recorded.safetensors", HERE / "machine.json", HERE / "folders"
STEPS = 20
SMALL = ("network.channels=[8,16]", "network.attention=[false,true]", "network.groups=4", "network.head=8")
COMMON = (
    "--steps", STEPS, "--seed", 3, "--device", "cpu", "log_every=1", "sample_every=0", "save_every=1000",
)  # fmt: skip
CM = ("--batch-size", 4, "--data", "digits")
RUNS = {
    "dmd-digits": ("dmd", "--teacher", "digits", "--pairs", "pairs-digits", "--batch-size", 4),
    "dmd-shapes": ("dmd", "--teacher", "shapes", "--pairs", "pairs-shapes", "--batch-size", 2),
    "dmd-tiny": ("dmd", "--teacher", "tiny", "--pairs", "pairs-tiny", "--batch-size", 4, "match_pairs=true", "fake_steps=2"),
    "dmd-tiny-sd": ("dmd", "--teacher", "tiny-sd", "--pairs", "pairs-tiny-sd", "--batch-size", 4, "regression_loss=huber"),
    "cd-digits": ("cm", "--method", "cd", "--teacher", "digits", *CM),
    "cd-tiny": ("cm", "--method", "cd", "--teacher", "tiny", *CM, "dropout=0.1"),
    "ct-tiny": ("cm", "--method", "ct", *CM, *SMALL),
    "ict-tiny": ("cm", "--method", "ict", *CM, *SMALL),
    "ect-tiny": ("cm", "--method", "ect", "--teacher", "tiny", *CM),
    "train-edm": ("train", "--data", "digits", "--batch-size", 4, *SMALL),
    "train-eps": ("train", "--data", "digits", "--batch-size", 4, *SMALL, "prediction=eps", "ema_halflife=20"),
    "train-v": ("train", "--data", "digits", "--batch-size", 4, *SMALL, "prediction=v"),
    "vae": ("vae", "--data", "shapes", "--batch-size", 4, "network.channels=[8,8]", "network.groups=4"),
    "train-latents": (
        "train", "--data", "shapes", "--batch-size", 2, *SMALL, "prediction=v", "vae=vae", "variants=1",
        "text.width=16", "text.layers=1", "text.heads=2",
    ),
    "classifier": ("classifier", "--data", "digits", "--batch-size", 8, "width=16"),
}  # fmt: skip
"""name of the folder -> command line"""
PAIRS = {
    "digits": ("--num", 8, "--steps", 4),
    "shapes": ("--num", 4, "--steps", 4),
    "tiny": ("--num", 8, "--steps", 3),
    "tiny-sd": ("--num", 4, "--steps", 4),
}
PROMPTS = {"shapes", "tiny-sd"}
KEPT = {
    "dmd-tiny": "student", "dmd-tiny-sd": "student", "cd-tiny": "student", "ct-tiny": "student", "ect-tiny": "student",
    "train-eps": "teacher", "train-latents": "teacher", "vae": "vae", "classifier": "classifier",
}  # fmt: skip
"""Small folders that are kept as they were written."""


def call(*arguments):
    from distill_cli.cli.app import run

    code = run([str(argument) for argument in arguments])
    assert code == 0, arguments


def pairs(name, folder):
    """x0 and labels of a small store, made in `folder`."""
    from distill_cli.pairs.store import PairStore

    prompts = ("--prompts", "shapes-held") if name in PROMPTS else ()
    call(
        "pairs",
        "--teacher",
        name,
        *PAIRS[name],
        *prompts,
        "--seed",
        5,
        "--device",
        "cpu",
        "batch_size=4",
        "--out",
        folder / f"pairs-{name}",
    )
    store = PairStore(folder / f"pairs-{name}")
    return store.batch(range(len(store)))["x0"]


def samples(model, out, steps=None):
    """Pictures (N, H, W, 3) uint8 of a model by its name or folder."""
    from distill_cli.models import load

    prompts = ("--prompts", "shapes-held") if load(str(model)).text is not None else ()
    steps = () if steps is None else ("--steps", steps)
    call("sample", "--model", model, "--num", 4, *steps, *prompts, "--seed", 6, "--device", "cpu", "format=npz", "--out", out)
    return torch.from_numpy(np.load(out / "samples.npz")["arr_0"])


def losses(name, folder):
    """(STEPS, K) of a run in `folder`, which its pairs and autoencoder have to be in: all numbers that are logged, by name."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        with patch("distill_cli.cli.common.compare"):  # pictures of a student of 20 steps
            call(*RUNS[name], *COMMON, "--out", name)
    finally:
        os.chdir(here)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    keys = sorted(key for key in lines[0] if key.endswith(("_loss", "_grad_norm")))
    return torch.tensor([[line[key] for key in keys] for line in lines], dtype=torch.float64)


def machine():
    from distill_cli import bench

    return {"processor": bench.machine(torch.device("cpu")).partition(",")[0], "torch": torch.__version__}


def main():
    torch.set_num_threads(1)
    arrays = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in PAIRS:
            arrays[f"pairs.{name}"] = pairs(name, folder)
            arrays[f"samples.{name}"] = samples(name, folder / f"samples-{name}", 3)
        for name in RUNS:
            arrays[f"losses.{name}"] = losses(name, folder)
            print(name, arrays[f"losses.{name}"][-1].tolist(), file=sys.stderr)
        shutil.rmtree(FOLDERS, ignore_errors=True)
        for name, part in KEPT.items():
            shutil.copytree(folder / name / part, FOLDERS / name)
            if part in ("student", "teacher"):
                arrays[f"folder.{name}"] = samples(FOLDERS / name, folder / f"of-{name}", 2 if part == "teacher" else None)
    save_file({key: value.contiguous() for key, value in arrays.items()}, ARRAYS)
    MACHINE.write_text(json.dumps(machine(), indent=2) + "\n")


if __name__ == "__main__":
    main()

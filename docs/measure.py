"""What the programs in docs share: training where it is not done yet, and the outside judge's numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from distill_cli.recipes import check, find, read
from tests.judge import judge


def distill(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "distill_cli", *arguments], check=True)


def trained(command: str, run: Path, *arguments: str) -> None:
    """Do a run, or go on with one that was stopped; one that is done stays as it is."""
    if (run / "student").is_dir():
        return
    distill(command, *(("--resume", str(run)) if (run / "recipe.yaml").is_file() else (*arguments, "--out", str(run))))


def made_by(run: Path, recipe: str) -> bool:
    """Whether a run has the settings that its recipe has today, but for those that its result does not depend on."""
    wanted = check(recipe)
    without = ("command", "pairs", "sample_every", "save_every")
    had = type(wanted).model_validate({key: value for key, value in read(run / "recipe.yaml").items() if key != "command"})
    return all(getattr(had, key) == getattr(wanted, key) for key in read(find(recipe)) if key not in without)


def judged(model: str | Path, folder: Path, steps: int | None = None) -> dict[str, float]:
    """tests/judge.py on 2,000 images of seed 7; a folder that has them is not filled again."""
    arguments = ["--model", str(model), *(["--steps", str(steps)] if steps else []), "--out", str(folder)]
    distill("sample", *arguments, "--num", "2000", "--seed", "7", "--format", "npz")
    with np.load(folder / "samples.npz") as stored:
        return judge(stored["arr_0"], stored["arr_1"])

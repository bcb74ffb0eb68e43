"""What the programs in docs share: training where it is not done yet, and the outside judge's numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.methods.cm.config import CMConfig
from distill_cli.methods.cm.objective import own_times
from distill_cli.recipes import check, read
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
    kept = {key: value for key, value in read(run / "recipe.yaml").items() if key in type(wanted).model_fields}
    if kept.get("method") != getattr(wanted, "method", None):
        return False
    had = type(wanted).model_validate(kept)
    if isinstance(had, CMConfig) and isinstance(wanted, CMConfig) and own_times(had, EDMSchedule()) != own_times(wanted, EDMSchedule()):
        return False
    without = {"out", "device", "pairs", "data", "times", "sample_every", "log_every", "save_every", "keep", "keep_best", "tracker"}
    without |= {"health_every", "best_by"}
    return had.model_dump(exclude=without) == wanted.model_dump(exclude=without)


def judged(model: str | Path, folder: Path, steps: int | None = None) -> dict[str, float]:
    """tests/judge.py on 2,000 images of seed 7; a folder that has them is not filled again."""
    arguments = ["--model", str(model), *(["--steps", str(steps)] if steps else []), "--out", str(folder)]
    distill("sample", *arguments, "--num", "2000", "--seed", "7", "--format", "npz")
    with np.load(folder / "samples.npz") as stored:
        return judge(stored["arr_0"], stored["arr_1"])

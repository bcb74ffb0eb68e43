"""Figure 3 of 2311.18828, by the program in docs and the recipes two-modes-*; and other students of the same teacher."""

import numpy as np
import pytest
import torch

from distill_cli.cli.app import run
from distill_cli.evaluate.points import sliced_wasserstein, spread
from docs.figure3 import CASES, REAL, made, numbers
from docs.figure_dmd2 import points

HALF = "batch_size=128"
"""Half the recipes' batch, in half the time."""


@pytest.mark.slow
def test_what_each_part_of_dmd_is_for(tmp_path):
    alone, matched, whole = map(numbers, made(tmp_path, HALF).values())
    assert len(CASES) == 3
    assert alone["left"] == 1.0
    assert alone["left_spread"] < 0.1  # (a) all mass at the nearest mode, at a point of it
    assert alone["left_off"] < 0.75
    assert matched["left"] > 0.95  # (b) the far mode is missed
    assert matched["left_off"] < 0.3
    assert matched["left_spread"] == pytest.approx(1, abs=0.2)
    assert whole["left"] == pytest.approx(0.7, abs=0.05)  # (c) both modes, in proportion
    assert max(whole["left_off"], whole["right_off"]) < 0.5
    teacher = tmp_path / "teacher"
    assert run(["cm", "--recipe", "two-modes-cd", "--teacher", str(teacher), "--out", str(tmp_path / "cd"), "--steps", "600", HALF]) == 0
    drawn = []
    for name in ("teacher", "cd"):
        folder = tmp_path / f"{name}-points"
        assert run(["sample", "--model", str(tmp_path / name), "--num", "10000", "batch_size=5000", "--out", str(folder)]) == 0
        drawn.append(torch.from_numpy(np.load(folder / "samples.npz")["arr_0"]))
    assert sliced_wasserstein(*drawn) < 0.05 * spread(REAL.points.flatten(1))
    start, student = tmp_path / "start", tmp_path / "dmd2"
    assert run(["cm", "--recipe", "two-modes-cd", "--teacher", str(teacher), "--steps", "60", HALF, "--out", str(start)]) == 0
    dmd2 = ["dmd2", "--recipe", "two-modes-dmd2", "--teacher", str(teacher), "--student", str(start), "--steps", "180"]
    assert run([*dmd2, "--out", str(student)]) == 0
    found = numbers(points(student))
    assert found["left"] == pytest.approx(0.7, abs=0.05)  # without pairs, from a cloud in one place

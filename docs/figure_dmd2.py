"""What DMD2 needs to find both modes without pairs, on points of the plane.

    python -m docs.figure_dmd2 [FOLDER]     # trains by two-modes-*, in runs/two-modes; prints the table, writes docs/figure_dmd2.png

The points and the teacher are those of docs/figure3.py: 70% of the real points lie around the left mode. A one-step student begins as the
teacher, whose answer to pure noise is the mean of all points, on the left mode's side; or as a consistency student after 60 steps, whose
points are a small cloud there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from docs.asked import asked
from docs.figure3 import command, shown

ALONE = ("gan=none", "data=null")
CASES = {
    "dmd2": ("(a) cloud, discriminator", ()),
    "own": ("(b) teacher's start, none", ("student=null", *ALONE)),
    "own-gan": ("(c) teacher's start, discriminator", ("student=null",)),
    "ten": ("(d) cloud, fake_steps=10", (*ALONE, "fake_steps=10")),
}
"""Folder of the student -> title, and what is given besides the recipe two-modes-dmd2."""


def points(model: Path) -> Tensor:
    """Points (2000, 2) of a model."""
    folder = model.with_name(f"{model.name}-points")
    command("sample", "--model", model, "--num", "2000", "--out", folder)
    return torch.from_numpy(np.load(folder / "samples.npz")["arr_0"]).double()


def made(folder: Path) -> dict[str, Tensor]:
    """Points of the start and of each case; teacher, start and students are made in `folder`, unless they are there."""
    teacher, start = folder / "teacher", folder / "start"
    if not (teacher / "teacher").exists():
        command("train", "--recipe", "two-modes-teacher", "--out", teacher)
    if not (start / "student").exists():
        command("cm", "--recipe", "two-modes-cd", "--teacher", teacher, "--steps", "60", "--out", start)
    out = {"the cloud": points(start)}
    for name, (title, options) in CASES.items():
        if not (folder / name / "student").exists():
            begun = () if "student=null" in options else ("--student", start)
            command("dmd2", "--recipe", "two-modes-dmd2", "--teacher", teacher, *begun, *options, "--out", folder / name)
        out[title] = points(folder / name)
    return out


def main() -> None:
    panels = made(asked("runs/two-modes"))
    shown(panels, Path(__file__).with_name("figure_dmd2.png"), ("left", "right"))


if __name__ == "__main__":
    main()

"""Figure 3 of 2311.18828, recomputed: what each part of DMD is for, on points of the plane.

    python -m docs.figure3 [FOLDER]     # trains by the recipes two-modes-*, in runs/two-modes; prints the table, writes docs/figure3.png

Real points lie around two modes, 70% around the left one. A one-step student begins with all points near their mean, which lies on the left
mode's side. (a) The real score alone drags all points to one place of the nearest mode. (b) With the fake score they spread over that
mode, but never see the other. (c) With the regression on pairs both modes come back in the right proportion. Matching times end at sigma
0.09, a fifteenth of the distance between the modes, so that no noise bridges them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_cli.cli.app import run
from distill_cli.data.points import STD, TwoModes
from docs.asked import asked

CASES = {"(a) real score": "dmd-real", "(b) with fake score": "dmd-fake", "(c) with regression": "dmd"}
REAL = TwoModes()
MODES = REAL.standardised(torch.tensor(REAL.modes, dtype=torch.float64))
WIDTH = REAL.noise * STD / REAL.variance**0.5
"""Standard deviation of the points around a mode."""


def command(*arguments: str | Path) -> None:
    """Run a command of distill."""
    if code := run([str(each) for each in arguments]):
        sys.exit(code)


def made(folder: Path, *changes: str) -> dict[str, Tensor]:
    """Points (2000, 2) of the student of each case; teacher, pairs and students are made in `folder`, unless they are there.

    `changes`: options of both trainings in place of the recipes'.
    """
    teacher, pairs = folder / "teacher", folder / "pairs"
    if not (teacher / "teacher").exists():
        command("train", "--recipe", "two-modes-teacher", *changes, "--out", teacher)
    command("pairs", "--recipe", "two-modes-pairs", "--teacher", teacher, "--out", pairs)
    out = {}
    for title, name in CASES.items():
        student, points = folder / name, folder / f"{name}-points"
        if not (student / "student").exists():
            regression = ["--pairs", pairs] if name == "dmd" else []
            command("dmd", "--recipe", f"two-modes-{name}", "--teacher", teacher, *regression, *changes, "--out", student)
        command("sample", "--model", student, "--num", "2000", "--out", points)
        out[title] = torch.from_numpy(np.load(points / "samples.npz")["arr_0"]).double()
    return out


def numbers(points: Tensor) -> dict[str, float]:
    """The share of points nearer to the left mode, how far the mean of each lot is from its mode (nan: no points), and the spread of each
    lot around its mean: distances over the real points' standard deviation around a mode."""
    near = torch.cdist(points.double(), MODES).argmin(1)
    lots = {side: points[near == k] for k, side in enumerate(("left", "right"))}
    off = {f"{side}_off": ((lot.mean(0) - MODES[k]).norm() / WIDTH).item() for k, (side, lot) in enumerate(lots.items())}
    return {"left": len(lots["left"]) / len(points), **off, **{f"{side}_spread": spread(lot) for side, lot in lots.items()}}


def spread(points: Tensor) -> float:
    """The standard deviation of points (N, 2) over that of real points around a mode; nan for no points."""
    return ((points - points.mean(0)).square().mean().sqrt() / WIDTH).item()


def draw(panels: dict[str, Tensor], path: Path) -> None:
    """Real points in grey, the student's in red, a panel a case."""
    from PIL import Image, ImageDraw

    wide, high, zoom = 300, 200, 120
    canvas = Image.new("RGB", (wide * len(panels), high), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (title, points) in enumerate(panels.items()):
        for colour, cloud in (("#bbbbbb", REAL.points[:2000].flatten(1)), ("#cc2222", points)):
            for x, y in (cloud * torch.tensor([zoom, -zoom]) + torch.tensor([k * wide + wide / 2 - 36, high / 2])).tolist():
                pen.point((x, y), colour)
        pen.text((k * wide + 8, 6), title, fill="black")
    canvas.save(path)


def shown(panels: dict[str, Tensor], path: Path, spreads: Sequence[str] = ("left",)) -> None:
    """Print the table, with the spreads of these modes, and draw the picture."""
    print("| case | left mode | right mode |" + "".join(f" spread of the {side} one |" for side in spreads))
    print("|---" * (3 + len(spreads)) + "|")
    for case, points in {"real points": REAL.points.flatten(1), **panels}.items():
        found = numbers(points)
        cells = "".join(f" {found[f'{side}_spread']:.2f} |" for side in spreads)
        print(f"| {case} | {found['left']:.1%} | {1 - found['left']:.1%} |{cells}")
    draw(panels, path)
    print(f"picture: {path}", file=sys.stderr)


def main() -> None:
    shown(made(asked("runs/two-modes")), Path(__file__).with_name("figure3.png"))


if __name__ == "__main__":
    main()

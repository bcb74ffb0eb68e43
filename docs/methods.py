"""DMD, PD, CD, CT and ECT on the built-in digits: quality against network evaluations and training cost, in one picture.

    python -m docs.methods runs/methods        # everything anew: 2 hours on 2 cores, after deleting docs/methods.json

Each recipe's student in one, two and four steps (DMD's in one, PD's in eight too), by tests/judge.py; prints the table and writes
docs/methods.png.
What was measured stands in docs/methods.json beside the settings' hash: a recipe is trained and judged again when its settings
change, and a run of the same settings that lies in the folder already is not trained again. Cost counts network evaluations in
training, a backward pass as two; pairs are included.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from distill_cli.recipes import find, read
from docs.asked import asked
from docs.measure import distill, judged, made_by, trained

PAIRS = 8000 * 35 - 400 * 64 * 3
"""Evaluations for DMD's pairs, less those of its last steps, which see none of 64 (3 each)."""
RESULTS = Path(__file__).with_name("methods.json")
RUNS = {
    # recipe: (what it is, evaluations of an image of a step, other evaluations, steps it is sampled in)
    "digits-dmd": ("DMD", 5, PAIRS, (1,)),  # student on a pair (3); a quarter of it is matched: student (3), teacher, fake score (1 + 3)
    "digits-pd": ("PD", 5, 0, (1, 2, 4, 8)),  # two steps of the teacher, student
    "digits-cd": ("CD", 8, 0, (1, 2, 4)),  # two Heun steps of the teacher, target, student
    "digits-ect": ("ECT", 4, 0, (1, 2, 4)),
    "digits-ct": ("CT (improved)", 4, 0, (1, 2, 4)),
}
COLOURS = {"teacher": "#222222", "DMD": "#cc2222", "PD": "#8833aa", "CD": "#2255cc", "ECT": "#228833", "CT (improved)": "#cc8800"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Fréchet distance against network evaluations an image, both logarithmic; a line a method."""
    from PIL import Image, ImageDraw

    wide, high, left, bottom = 640, 420, 60, 40
    canvas = Image.new("RGB", (wide, high), "white")
    pen = ImageDraw.Draw(canvas)
    distances = [row["frechet"] for row in rows]
    low, top = min(distances) * 0.8, max(distances) * 1.25

    def place(calls: float, distance: float) -> tuple[float, float]:
        x = left + (wide - left - 150) * math.log(calls) / math.log(40)
        return x, 20 + (high - bottom - 20) * math.log(top / distance) / math.log(top / low)

    for calls in (1, 2, 4, 10, 35):
        x, _ = place(calls, low)
        pen.line((x, 20, x, high - bottom), "#eeeeee")
        pen.text((x - 6, high - bottom + 6), str(calls), fill="black")
    for distance in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
        if low < distance < top:
            y = place(1, distance)[1]
            pen.line((left, y, wide - 150, y), "#eeeeee")
            pen.text((20, y - 6), f"{distance:g}", fill="black")
    pen.text((left, high - 18), "network evaluations an image", fill="black")
    pen.text((8, 4), "Frechet distance", fill="black")
    for k, (method, colour) in enumerate(COLOURS.items()):
        points = [place(row["evaluations"], row["frechet"]) for row in rows if row["method"] == method]
        if len(points) > 1:
            pen.line(points, colour, width=2)
        for x, y in points:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        cost = next((str(row["cost"]) for row in rows if row["method"] == method), "")
        pen.text((wide - 140, 40 + 34 * k), f"{method}\n{cost}", fill=colour)
    canvas.save(path)


def measured(recipe: str, folder: Path) -> list[dict[str, Any]]:
    """A row a number of steps, from docs/methods.json where it knows these settings."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    digest = hashlib.sha256(json.dumps(read(find(recipe)), sort_keys=True).encode()).hexdigest()
    if known.get(recipe, {}).get("settings") != digest:
        method, _, _, steps = RUNS[recipe]
        run = folder / recipe
        if (run / "recipe.yaml").is_file() and not made_by(run, recipe):
            sys.exit(f"{run}: made with other settings than recipe {recipe} has now: delete it")
        extra: list[str] = []
        if method == "DMD":
            distill("pairs", "--recipe", "digits-pairs", "--out", str(folder / "pairs"))
            extra = ["--pairs", str(folder / "pairs")]
        trained(str(read(find(recipe))["command"]), run, "--recipe", recipe, *extra)
        rows = [{"evaluations": count, **judged(run, run / f"images-{count}", count)} for count in steps]
        known[recipe] = {"settings": digest, "rows": rows}
        RESULTS.write_text(json.dumps(known, indent=2) + "\n")
    return list(known[recipe]["rows"])


def main(folder: Path) -> None:
    teacher = judged("digits", folder / "teacher")
    rows: list[dict[str, Any]] = [{"method": "teacher", "evaluations": 35, "cost": "", **teacher}]
    for recipe, (method, calls, others, _) in RUNS.items():
        config = read(find(recipe))
        cost = f"{(config['steps'] * config['batch_size'] * calls + others) / 1e6:.1f} M evaluations"
        rows += [{"method": method, "cost": cost, **row} for row in measured(recipe, folder)]
    print("| method | network evaluations an image | training cost | accuracy | Fréchet distance | over the teacher's | spread |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        accuracy, distance, spread = (row[key] for key in ("accuracy", "frechet", "spread"))
        cells = [row["method"], row["evaluations"], row["cost"], f"{accuracy:.3f}", f"{distance:.4f}"]
        print("|", " | ".join(map(str, [*cells, f"{distance / teacher['frechet']:.2f}", f"{spread:.3f}"])), "|")
    path = Path(__file__).with_name("methods.png")
    draw(rows, path)
    print(f"picture: {path}", file=sys.stderr)


if __name__ == "__main__":
    main(asked())

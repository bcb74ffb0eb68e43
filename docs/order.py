"""Whether `distill evaluate` and the outside judge of the digits put models in the same order.

python -m docs.order runs/order MODEL@STEPS ...      # any models of digits, and .npz files of their pictures
python -m docs.order runs/order                      # the students of docs/methods.md in runs/methods, and their teacher

Samples 2,000 images of each model, seed 7, and measures the finished files by `distill evaluate --data digits` and by tests/judge.py.
Prints both Fréchet distances, Spearman's rank correlation (1: the same order), and the pairs whose order differs. Both distances scatter: a
pair that lies nearer together than twice the spread of its difference is called a tie.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from distill_cli.evaluate.report import split
from docs.measure import distill, judged
from docs.methods import RUNS
from tests.judge import judge

METHODS = Path("runs/methods")
JUDGES = 0.01
"""Scatter of the judge's distance of 2,000 images over seeds (docs/methods.md)."""


def measured(folder: Path, models: list[str]) -> list[dict[str, Any]]:
    """A row a model: its name, both distances, and the spread of evaluate's."""
    rows, files = [], []
    for spec in models:
        name, steps = split(spec)
        samples = folder / spec.strip("/").replace("/", "_")
        if spec.endswith(".npz"):
            with np.load(spec) as stored:
                found = judge(stored["arr_0"], stored["arr_1"])
        else:
            found = judged(name, samples, steps)
        rows.append({"model": spec, "judge": found["frechet"]})
        files.append(spec if spec.endswith(".npz") else str(samples / "samples.npz"))
    options = [part for file in files for part in ("--model", file)]
    distill("evaluate", *options, "--data", "digits", "measures=frechet,accuracy", "--out", str(folder / f"evaluation-{len(files)}"))
    report = json.loads((folder / f"evaluation-{len(files)}/report.json").read_text())["rows"]
    return [row | {"ours": found["frechet"], "spread": found["frechet_spread"]} for row, found in zip(rows, report)]


def main(folder: Path, models: list[str]) -> None:
    known = [f"{METHODS / recipe}@{steps}" for recipe, (*_, counts) in RUNS.items() if (METHODS / recipe).is_dir() for steps in counts]
    rows = sorted(measured(folder, models or ["digits", *known]), key=lambda row: row["judge"])
    print("| model | Fréchet distance, the judge's | by `distill evaluate` |\n|---|---|---|")
    for row in rows:
        print(f"| {row['model']} | {row['judge']:.4f} | {row['ours']:.4f} ± {row['spread']:.4f} |")
    print(f"\nSpearman's rank correlation: {spearmanr([row['judge'] for row in rows], [row['ours'] for row in rows]).statistic:.3f}")
    for a, b in combinations(rows, 2):
        if a["ours"] > b["ours"]:
            spread = (a["spread"] ** 2 + b["spread"] ** 2) ** 0.5
            tie = a["ours"] - b["ours"] < 2 * spread or b["judge"] - a["judge"] < 2 * 2**0.5 * JUDGES
            print(f"differs{' (a tie)' * tie}: {a['model']} before {b['model']} by the judge")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

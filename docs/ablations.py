"""The ablations of 2311.18828 on the built-in digits: what each part of DMD is worth, over three seeds.

    python -m docs.ablations runs/ablations        # half an hour on one core; a stopped one goes on where it was

Pairs once, then for each case and seed `distill dmd`, 2,000 images of `distill sample --seed 7`, and tests/judge.py.
The paper's figures (its table 2, FID of one-step students) stand beside ours.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from docs.asked import asked
from docs.measure import distill, judged, trained

SEEDS = (0, 1, 2)
PAPERS = ["optimizer=adamw", "betas=0.5,0.99", "matching_share=1", "regression_loss=l2", "regression_steps=null", "lr_end=0.05"]
SETTINGS = ["--recipe", "demo-dmd", "steps=300", "batch_size=32", "ema_halflife=2500", "sample_every=0", "save_every=1000", *PAPERS]
CASES = {
    "DMD": (["regression_weight=8"], "2.66", "2.62"),
    "without regression": (["regression_weight=0"], "5.58", "5.61"),
    "without distribution matching": (["regression_weight=8", "matching_weight=0"], "3.82", "9.21"),
    "without the fake score": (["regression_weight=8", "fake_score=false"], "", ""),
}
MEASURES = ("accuracy", "frechet", "spread")


def measured(folder: Path, name: str, seed: int) -> dict[str, float]:
    run = folder / f"{name.replace(' ', '-')}-{seed}"
    trained("dmd", run, *SETTINGS, *CASES[name][0], "--pairs", str(folder / "pairs"), "--seed", str(seed))
    return judged(run, run / "images")


def main(folder: Path) -> None:
    distill("pairs", "--recipe", "demo-pairs", "num=2000", "solver=heun", "steps=18", "--out", str(folder / "pairs"))
    found = {name: [measured(folder, name, seed) for seed in SEEDS] for name in CASES}
    print("| | accuracy | Fréchet distance | spread | paper: CIFAR-10 | paper: ImageNet-64 |\n|---|---|---|---|---|---|")
    for name, rows in found.items():
        cells = []
        for measure in MEASURES:
            values = [row[measure] for row in rows]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        print(f"| {name} | {' | '.join(cells)} | {CASES[name][1]} | {CASES[name][2]} |")


if __name__ == "__main__":
    main(asked())

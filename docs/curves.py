"""Runs that are well and runs that were made sick on purpose, for docs/curves.md.

python docs/curves.py make [NAME...]     # runs/curves/NAME, a few minutes each on one idle core; digits-cd 50, shapes-dmd2 60
python docs/curves.py table              # the looks of the runs that are there, and the first warning of each
python docs/curves.py draw               # docs/curves.png from their sample grids
python docs/curves.py record [NAME...]   # their looks into docs/curves.json, which tests hold the warnings to
python docs/curves.py best               # of each run there: how far the step chosen by drift is from the best step
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

HERE, RUNS, LOOKS = Path(__file__).parent, Path("runs/curves"), Path(__file__).with_name("curves.json")
PAIRS = "pairs --recipe digits-pairs --num 1000"
SMALL = "batch_size=8 warmup_steps=20 ema_halflife=400 log_every=10 sample_every=30 save_every=1000"
DMD = f"dmd --recipe demo-dmd optimizer=adamw betas=0.5,0.99 matching_share=1 regression_loss=l2 regression_steps=null lr_end=0.05 {SMALL}"
"""The demo's recipe as it was when the looks were recorded."""
HELD, ALONE = f"{DMD} steps=240 regression_weight=8 --pairs {RUNS}/pairs", f"{DMD} steps=120 health_every=10 regression_weight=null lr=2e-4"
MADE = {
    "pairs": PAIRS,
    "healthy": f"{HELD} health_every=15",
    "slow-fake": f"{HELD} health_every=15 fake_lr=2e-5",
    "rates": f"{HELD} health_every=5 lr=8e-3 fake_lr=1e-2",
    "no-regression": f"{ALONE} pairs=null fake_lr=4e-4",
    "lagging": f"{ALONE} pairs=null fake_lr=1e-5",
    "guided-pairs": f"{PAIRS} --guidance-scale 8",
    "guidance": f"{DMD} steps=240 regression_weight=8 --pairs {RUNS}/guided-pairs guidance_scale=8 health_every=15",
    "digits-cd": "cm --recipe digits-cd",
    "shapes-dmd2": "dmd2 --recipe shapes-dmd2 steps=450 fake_steps=4 lr=5e-4 guidance_scale=1.5",
    "healthy-cd": f"cm --recipe digits-cd precision=no steps=120 health_every=10 {SMALL}",
    "healthy-pd": f"pd --recipe digits-pd precision=no steps=120 health_every=10 first_steps=4 shares=null {SMALL}",
}
"""Folder below RUNS -> the command, without distill and --out."""
SHOWN, STEPS, DIGITS, SIDE = ("healthy", "rates", "no-regression", "lagging", "guidance"), (30, 60, 120), 10, 64
HEAD = ("steps", "last_round", "error_ratio")
"""What stands in the first line of a run in curves.json."""
COLUMNS = ("luminance", "saturation", "contrast", "sharpness", "spread", "drift", "frechet", "accuracy")


def make(names: list[str]) -> None:
    for name in names or MADE:
        if not (RUNS / name).exists():
            command = [sys.executable, "-m", "distill_cli", *MADE[name].split(), "--out", str(RUNS / name)]
            print(" ".join(command[2:]), file=sys.stderr)
            subprocess.run(command, check=True)


def lines(name: str) -> list[dict]:
    path = RUNS / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table() -> None:
    for name in MADE:
        found = lines(name)
        if not found:
            continue
        print(f"\n{name}\n{'step':>5} " + " ".join(f"{column[:10]:>10}" for column in COLUMNS))
        for line in found:
            if "health_drift" in line:
                print(f"{line['step']:5} " + " ".join(f"{line.get(f'health_{column}', float('nan')):10.3f}" for column in COLUMNS))
        warned = next((line for line in found if "warnings" in line), None)
        print("no warning" if warned is None else f"step {warned['step']} of {found[-1]['step']}: {'; '.join(warned['warnings'])}")


def record(names: list[str]) -> None:
    """The newest checkpoint of a run holds all of its looks, that before the first step too."""
    known = json.loads(LOOKS.read_text())
    for name in names or [name for name in MADE if lines(name) and "pairs" not in name]:
        state = json.loads(max((RUNS / name).glob("checkpoints/step-*/state.json")).read_text())["state"]
        looks = [{key: round(value, 4) for key, value in look.items()} for look in state["looks"]]
        ratio = {line["step"]: round(line["fake_error"] / line["real_error"], 3) for line in lines(name) if line.get("real_error")}
        recipe = yaml.safe_load((RUNS / name / "recipe.yaml").read_text())
        rounds = (recipe.get("first_steps") or 2).bit_length() - 1  # progressive distillation halves them to one
        known[name] = {
            "steps": recipe["steps"],
            "last_round": recipe["steps"] * (rounds - 1) // rounds,
            "error_ratio": ratio,
            "looks": looks,
        }
    text = ",\n".join(
        f' {json.dumps(name)}: {json.dumps({key: run.get(key, 0) for key in HEAD})[:-1]},\n  "looks": [\n   '
        + ",\n   ".join(map(json.dumps, run["looks"]))
        + "\n  ]}"
        for name, run in known.items()
    )
    LOOKS.write_text(f"{{\n{text}\n}}\n")


def best() -> None:
    """Chosen by drift, which needs no classifier; the others are the steps with the lowest Fréchet distance of all that were looked at."""
    print("run: step chosen by drift, its Fréchet distance over the lowest; the last step's over the lowest")
    for name, run in json.loads(LOOKS.read_text()).items():
        looks = [look for look in run["looks"] if look["step"] > run["last_round"] and "frechet" in look]
        if looks:
            chosen, lowest = min(looks, key=lambda look: look["drift"]), min(look["frechet"] for look in looks)
            print(f"{name}: {chosen['step']}, {chosen['frechet'] / lowest:.3f}; {looks[-1]['frechet'] / lowest:.3f}")


def strip(path: Path) -> np.ndarray:
    """The first row of a sample grid: the ten digits from the same noise in every run."""
    return np.asarray(Image.open(path).convert("RGB"))[: SIDE + 4]


def draw() -> None:
    rows = [(name, [strip(RUNS / name / f"samples/{step:06d}.png") for step in STEPS]) for name in SHOWN]
    height, width = rows[0][1][0].shape[:2]
    bar, scale = 16, 0.5
    cell = (round(width * scale), round(height * scale))
    canvas = Image.new("RGB", (len(STEPS) * (cell[0] + 6), len(rows) * (cell[1] + bar)), "white")
    for k, (name, strips) in enumerate(rows):
        for n, (step, picture) in enumerate(zip(STEPS, strips, strict=True)):
            x, y = n * (cell[0] + 6), k * (cell[1] + bar)
            ImageDraw.Draw(canvas).text((x + 2, y + 2), f"{name}, step {step}", fill="black")
            canvas.paste(Image.fromarray(picture).resize(cell, Image.Resampling.BOX), (x, y + bar))
    canvas.save(HERE / "curves.png", optimize=True)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["table"]
    {"make": make, "table": lambda _: table(), "draw": lambda _: draw(), "record": record, "best": lambda _: best()}[verb](rest)

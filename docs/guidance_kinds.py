"""Fidelity bought with diversity: the three kinds of guidance over their scales, for docs/guidance.md.

    python -m docs.guidance_kinds runs/guidance-kinds      # 19 minutes on 2 cores beside other work

Digits: the built-in teacher asked for its classes by classifier-free guidance, and without its classes led by the built-in classifier of
noised pictures; 500 pictures each, 50 of a class. Shapes: the built-in text-to-image teacher under its empty prompt, led by the built-in
CLIP model of noised latents; two pictures of each of the 96 captions held back from training, measured in the features of the other
built-in CLIP model, that of pictures. Prints a table, and draws docs/guidance-kinds.png. Samples that lie in the folder are not made again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs.asked import asked
from docs.measure import distill

DIGITS = ("--num", "500", "--seed", "1", "--format", "npz")
SHAPES = ("--prompts", "shapes-held", "--images-per-prompt", "2", "--seed", "1")
KINDS: dict[str, tuple[str, str, tuple[float, ...], tuple[str, ...]]] = {
    "classifier-free, digits": ("digits", "--guidance-scale", (1, 1.5, 2, 3, 5, 8), ()),
    "by a classifier, digits": ("digits", "--classifier-scale", (1, 2, 4, 8, 16), ("--classifier-guidance", "digits-noisy-classifier")),
    "by CLIP, shapes": ("shapes", "--clip-scale", (1, 2, 4, 8, 16, 32), ("--clip-guidance", "shapes-noisy-clip")),
}
"""Name -> the model, the option of the scale, the scales, and what else."""
OF_DIGITS = ("--data", "digits", "measures=accuracy,precision-recall,inception-score,diversity")
OF_SHAPES = ("--prompts", "shapes-held", "images_per_prompt=2", "--attributes", "shapes", "--data", "shapes",
             "--features", "clip", "clip=shapes-clip", "measures=precision-recall,diversity")  # fmt: skip
COLUMNS = {"right": "right", "precision": "precision", "recall": "recall", "score": "score", "diversity": "diversity"}


def measured(folder: Path, name: str) -> list[dict[str, Any]]:
    """The scores at each scale of a kind of guidance, in one evaluation."""
    model, option, scales, others = KINDS[name]
    made: list[Path] = []
    for scale in scales:
        out = folder / f"{option.strip('-')}-{scale:g}"
        distill("sample", "--model", model, *(DIGITS if model == "digits" else SHAPES), *others, option, str(scale), "--out", str(out))
        made.append(out / "samples.npz" if model == "digits" else out)
    out = folder / f"scores-{option.strip('-')}"
    asked = OF_DIGITS if model == "digits" else OF_SHAPES
    distill("evaluate", *(part for each in made for part in ("--model", str(each))), *asked, "--out", str(out))
    rows = json.loads((out / "report.json").read_text())["rows"]
    return [
        {key.removeprefix("clip_"): value for key, value in row.items()}
        | {"scale": scale, "right": row.get("accuracy", row.get("all_attributes"))}
        for scale, row in zip((*scales, "real pictures"), rows, strict=False)
    ]


def draw(found: dict[str, list[dict[str, Any]]]) -> None:
    """What is right against what of the real pictures is covered, a line for each kind."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, rows in found.items():
        guided = [row for row in rows if row["scale"] != "real pictures"]
        axes.plot([row["recall"] for row in guided], [row["right"] for row in guided], "o-", label=name)
        for row in guided:
            axes.annotate(f"{row['scale']:g}", (row["recall"], row["right"]), xytext=(5, -11), textcoords="offset points", fontsize=8)
    axes.set(xlabel="recall: real pictures that are covered", ylabel="right: of the class, or in all five attributes")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(__file__).with_name("guidance-kinds.png"), dpi=110, metadata={"Software": None})


def main(folder: Path) -> None:
    found = {name: measured(folder, name) for name in KINDS}
    print("| guidance | scale | " + " | ".join(COLUMNS.values()) + " |\n|---|---" + "|---" * len(COLUMNS) + "|")
    for name, rows in found.items():
        for row in rows:
            shown = (f"{row[key]:.3f}" if row.get(key) is not None else "" for key in COLUMNS)
            print(f"| {name} | {row['scale']} | " + " | ".join(shown) + " |")
    draw(found)


if __name__ == "__main__":
    main(asked())

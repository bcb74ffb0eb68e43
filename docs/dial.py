"""A student whose guidance scale is a dial, beside its teacher at the same scales: for docs/guidance.md.

    python -m docs.dial runs/dial      # trains by the recipes shapes-dial-pairs and shapes-dial if they are not there

Four pictures of each of the 96 captions held back from training, from the same noise by both. Prints the share of the student's pictures
that have all five attributes right (tests/shapes_judge.py), and the distance of pictures: the root mean square over the values, 0 to 255,
in the mean over the pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from docs.asked import asked
from docs.measure import distill, trained
from tests.shapes_judge import judge

SCALES, EACH = (1, 2, 4), 4


def pictures(model: str | Path, scale: int, folder: Path) -> tuple[np.ndarray, list[str]]:
    """Pictures (N, H, W, 3) at a guidance scale, and their captions."""
    asked = ("--prompts", "shapes-held", "--images-per-prompt", str(EACH), "--seed", "1")
    distill("sample", "--model", str(model), *asked, "--guidance-scale", str(scale), "--out", str(folder))
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return np.stack([np.asarray(Image.open(folder / line["file"])) for line in lines]), [line["prompt"] for line in lines]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one.astype(np.float64) - other).mean((1, 2, 3))).mean())


def main(folder: Path) -> None:
    distill("pairs", "--recipe", "shapes-dial-pairs", "--out", str(folder / "pairs"))
    trained("dmd", folder / "student", "--recipe", "shapes-dial", "--pairs", str(folder / "pairs"))
    made = {f"{who} at {s}": pictures(model, s, folder / f"{who}-{s}")
            for who, model in (("teacher", "shapes"), ("student", folder / "student")) for s in SCALES}  # fmt: skip
    print("| | right |" + "".join(f" to the teacher at {s} |" for s in SCALES) + "\n|---|---" + "|---" * len(SCALES) + "|")
    for name, (images, captions) in made.items():
        distances = " | ".join(f"{apart(images, made[f'teacher at {s}'][0]):.2f}" for s in SCALES)
        print(f"| {name} | {judge(images, captions)['all']:.1%} | {distances} |")


if __name__ == "__main__":
    main(asked())

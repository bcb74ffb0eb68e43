"""What guidance does: the built-in text-to-image teacher over guidance scales, and students whose teacher was guided or not.

    python -m docs.guidance runs/guidance      # 1.5 hours on 2 cores

Judged by tests/shapes_judge.py, which knows no network, on the 96 captions held back from training: the
share that has all five attributes right. Prints the table and writes docs/guidance.png. Students come in twos with the same settings and
pairs, or without pairs; only the score that one of them is matched with is not guided. A run that lies in the folder is not made again.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from distill_cli.data.pictures import save_comparison
from docs.asked import asked
from docs.measure import distill, trained
from tests.shapes_judge import judge

SCALES = (1, 1.5, 2, 3, 5, 8)
STUDENTS = {
    "student": "student, one step",
    "unguided": "student whose teacher's score is not guided",
    "alone": "student of matching alone, 300 steps",
    "alone-unguided": "the same, the score not guided",
}
TEACHERS, STUDENTS_EACH = 5, 50
"""Pictures a caption: those of students cost a hundredth."""
SEED, SHOWN = 7, 12


def judged(model: str | Path, folder: Path, each: int, *arguments: str) -> tuple[dict[str, float], np.ndarray]:
    """The judge's shares of right attributes, and some of the pictures."""
    distill("sample", "--model", str(model), "--prompts", "shapes-held", "--images-per-prompt", str(each), "--seed", str(SEED),
            "--out", str(folder), *arguments)  # fmt: skip
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(folder / line["file"])) for line in lines])
    return judge(images, [line["prompt"] for line in lines]), images[:: each * (96 // SHOWN)][:SHOWN]


def main(folder: Path) -> None:
    rows, pictures = [], []
    for scale in SCALES:
        found, shown = judged("shapes", folder / f"teacher-{scale:g}", TEACHERS, "--guidance-scale", str(scale))
        rows.append((f"teacher, 50 steps, guidance {scale:g}", found))
        pictures.append((f"teacher, guidance {scale:g}: {found['all']:.1%} right", shown))
    distill("pairs", "--recipe", "shapes-pairs", "--out", str(folder / "pairs"))
    pairs = ("--pairs", str(folder / "pairs"))
    trained("dmd", folder / "student", "--recipe", "shapes-dmd", *pairs)
    trained("dmd", folder / "unguided", "--recipe", "shapes-dmd", *pairs, "--guidance-scale", "1")
    alone = ("--recipe", "shapes-dmd", "--steps", "300", "pairs=null", "regression_weight=0")
    trained("dmd", folder / "alone", *alone)
    trained("dmd", folder / "alone-unguided", *alone, "--guidance-scale", "1")
    for run, name in STUDENTS.items():
        found, shown = judged(folder / run, folder / f"{run}-samples", STUDENTS_EACH)
        rows.append((name, found))
        pictures.append((f"{name}: {found['all']:.1%} right", shown))
    print("| | all five | size | colour | shape | place | background |\n|---|---|---|---|---|---|---|")
    for name, found in rows:
        print(f"| {name} | " + " | ".join(f"{found[key]:.1%}" for key in ("all", "size", "colour", "shape", "place", "background")) + " |")
    save_comparison(pictures, Path(__file__).with_name("guidance.png"), columns=SHOWN, scale=1)


if __name__ == "__main__":
    main(asked())

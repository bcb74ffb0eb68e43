"""Zero-shot edits of digits that a consistency student has not seen, and their picture.

    python -m docs.editing runs/methods/digits-cd runs/editing      # needs a student of recipes/digits-cd.yaml; a minute

The held-out digits of the recipe (a tenth; the teacher has seen them) are written as files and edited by `distill edit`: the
right half hidden and painted anew with and without its class being told, grey pictures coloured, 4x4 pictures enlarged. Prints what the
paper's projections promise, and how many inpainted digits the judge's classifier still reads as what they were; writes
docs/editing.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from distill_cli.data.images import Digits, split
from distill_cli.data.pictures import png, save_comparison, to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.edit.zero_shot import LUMINANCE
from distill_cli.methods.cm.config import CMConfig
from distill_cli.recipes import check
from docs.measure import distill
from tests.judge import features

SHOWN = 20


def read(folder: Path) -> np.ndarray:
    """(N, H, W, 3) uint8 of a folder's pictures, in the order of their names."""
    files = sorted(path for path in folder.glob("*.png") if path.name != "side-by-side.png")
    return np.stack([np.asarray(Image.open(path)) for path in files])


def main(model: str, folder: Path) -> None:
    config = check("digits-cd")
    assert isinstance(config, CMConfig)
    digits = Digits()
    _, held_out = split(digits, config.holdout, config.seed)
    images, labels = digits.batch(held_out, Draws(1, held_out))
    inputs = folder / "digits"
    if not inputs.exists():
        inputs.mkdir(parents=True)
        for i, image in enumerate(to_uint8(images)):
            (inputs / f"{i:04d}.png").write_bytes(png(image))
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[:, 8:] = 255
        Image.fromarray(mask).save(folder / "mask.png")
    told = ["--classes", ",".join(map(str, labels.tolist()))]
    edits = {
        "inpaint": ["--mask", str(folder / "mask.png"), *told],
        "inpaint-untold": ["--mask", str(folder / "mask.png")],
        "colorize": [],
        "superres": ["--patch", "4"],
        "sdedit": [],
    }
    for task, options in edits.items():
        distill("edit", task.split("-")[0], "--model", model, "--input", str(inputs), "--out", str(folder / task), *options)
    original = read(inputs)
    made = {task: read(folder / task) for task in edits}
    classifier = SVC(gamma=0.001).fit(*load_digits(return_X_y=True))

    def kept(pictures: np.ndarray) -> float:
        return float((classifier.predict(features(pictures.max(3) / 255) * 16) == labels.numpy()).mean())

    weights = np.array(LUMINANCE) / sum(LUMINANCE)
    grey = np.abs(original @ weights - made["colorize"] @ weights).max()
    patches = [x.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4)) for x in (original.astype(float), made["superres"].astype(float))]
    found = {
        "digits": len(original),
        "inpaint: largest change of the known half (of 255)": int(np.abs(original[:, :, :8].astype(int) - made["inpaint"][:, :, :8]).max()),
        "inpaint, class told: still read as the digit": round(kept(made["inpaint"]), 3),
        "inpaint, class not told: still read as the digit": round(kept(made["inpaint-untold"]), 3),
        "left half alone: read as the digit": round(kept(np.where(np.arange(16)[:, None] < 8, original, 0)), 3),
        "colorize: largest change of the luminance (of 255)": round(float(grey), 2),
        "superres: largest change of a patch's mean (of 255)": round(float(np.abs(patches[0] - patches[1]).max()), 2),
        "superres: still read as the digit": round(kept(made["superres"]), 3),
    }
    print(json.dumps(found, indent=2))
    half = original.copy()
    half[:, :, 8:] = 128
    luma = np.repeat((original @ weights)[..., None], 3, 3).round().astype(np.uint8)
    small = patches[0].repeat(4, 1).repeat(4, 2).round().astype(np.uint8)
    rows = [
        ("held-out digits", original),
        ("half hidden", half),
        ("inpaint, class told", made["inpaint"]),
        ("inpaint, class not told", made["inpaint-untold"]),
        ("grey", luma),
        ("colorize", made["colorize"]),
    ]
    level = json.loads((folder / "sdedit" / "edits.json").read_text())["times"][0]
    rows += [("4x4 pixels", small), ("superres", made["superres"]), (f"sdedit, from noise level {level:.1f}", made["sdedit"])]
    save_comparison([(title, pictures[:SHOWN]) for title, pictures in rows], Path(__file__).with_name("editing.png"), columns=SHOWN)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

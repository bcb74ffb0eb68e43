"""A model that knows 50 digits by heart, as `distill evaluate` sees it, and 300 other digits beside it.

python -m docs.memorised runs/memorised      # 6 minutes on one core
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from distill_cli.data import open_images
from distill_cli.data.pictures import to_uint8
from distill_cli.diffusion.noise import Draws
from docs.asked import asked
from docs.measure import distill

KNOWN, OTHERS, SEED = 50, 300, 5


def main(folder: Path) -> None:
    x, labels = open_images("digits").batch(range(KNOWN + OTHERS), Draws(SEED, range(KNOWN + OTHERS)))
    pictures, known, others = to_uint8(x), folder / "known", folder / "others.npz"
    for k in range(KNOWN):
        place = known / str(int(labels[k])) / f"{k:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[k]).save(place)
    np.savez(others, arr_0=pictures[KNOWN:], arr_1=labels[KNOWN:].numpy())
    data = ("--data", str(known), "--resolution", "16")
    network = ("network.channels=[16, 32]", "network.attention=[0,1]")
    rates = ("lr=2e-3", "warmup_steps=20", "ema_halflife=1000", "label_dropout=0", "sample_every=1500", "save_every=1500")
    distill("train", *data, "--steps", "1500", "--batch-size", "50", *rates, *network, "--out", str(folder / "teacher"))
    models = ("--model", str(folder / "teacher"), "--model", str(others))
    distill("evaluate", *models, *data, "--num", "100", "measures=memorisation", "--out", str(folder / "evaluation"))
    for row in json.loads((folder / "evaluation/report.json").read_text())["rows"]:
        print(f"{row['model']}: copies {row['copies']:.2f} ± {row['copies_spread']:.2f}, nearness {row['nearness']:.2f}")


if __name__ == "__main__":
    main(asked())

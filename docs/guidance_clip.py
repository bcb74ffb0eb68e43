"""What CLIP guidance does: the built-in text-to-image teacher under its empty prompt, led by the built-in CLIP model alone.

    python -m docs.guidance_clip runs/guidance-clip [CLIP]      # about 2 minutes for a row on one core

Judged by tests/shapes_judge.py on a picture of each of the 96 captions held back from training. Without guidance a picture has all
five attributes by chance. Prints a table; samples that lie in the folder are not made again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from docs.guidance import judged

ROWS = (("estimate", 100, 50), ("estimate", 300, 50), ("network", 30, 50), ("network", 100, 50), ("network", 300, 50))
"""What the gradient goes through, the scale, and the number of steps."""
KEYS = ("all", "size", "colour", "shape", "place", "background")


def main(folder: Path, clip: str = "shapes-clip") -> None:
    print("| through | scale | steps | all five | size | colour | shape | place | background |\n|---|---|---|---|---|---|---|---|---|")
    for through, scale, steps in ROWS:
        options = ("--clip-guidance", clip, "--clip-scale", str(scale), f"clip_through={through}", "--steps", str(steps))
        found, _ = judged("shapes", folder / f"{through}-{scale:g}-{steps}", 1, *options)
        print(f"| {through} | {scale:g} | {steps} | " + " | ".join(f"{found[key]:.1%}" for key in KEYS) + " |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""What CLIP guidance does: the built-in text-to-image teacher under its empty prompt, led by each of the built-in CLIP models alone.

    python -m docs.guidance_clip runs/guidance-clip      # about a minute for a row on one core, two for shapes-clip

Judged by tests/shapes_judge.py on a picture of each of the 96 captions held back from training. Without guidance a picture has all
five attributes by chance. Prints a table; samples that lie in the folder are not made again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from docs.guidance import judged

ROWS = (
    *(("shapes-noisy-clip", "", scale) for scale in (1, 2, 4, 8, 16, 32)),
    *(("shapes-clip", through, scale) for through, scale in (("estimate", 100), ("estimate", 300), ("network", 30), ("network", 100))),
)
"""The CLIP model, what the gradient goes through, and the scale."""
KEYS = ("all", "size", "colour", "shape", "place", "background")


def main(folder: Path) -> None:
    print("| CLIP model | scale | all five | size | colour | shape | place | background |\n|---|---|---|---|---|---|---|---|")
    for clip, through, scale in ROWS:
        options = ("--clip-guidance", clip, "--clip-scale", str(scale), *([f"clip_through={through}"] if through else []))
        found, _ = judged("shapes", folder / f"{through or 'noisy'}-{scale:g}-50", 1, *options, "--steps", "50")
        named = f"{clip}{f', {through}' if through else ''}"
        print(f"| {named} | {scale:g} | " + " | ".join(f"{found[key]:.1%}" for key in KEYS) + " |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

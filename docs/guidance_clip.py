"""What CLIP guidance does: the built-in text-to-image teacher under its empty prompt, led by each of the built-in CLIP models alone.

    python -m docs.guidance_clip runs/guidance-clip      # 25 minutes on one core

Judged by tests/shapes_judge.py on three pictures of each of the 96 captions held back from training, or one for the CLIP model of
pictures, which is slow. Without guidance a picture has all five attributes by chance. Prints a table; samples that lie in the folder are
not made again.
"""

from __future__ import annotations

from pathlib import Path

from docs.asked import asked
from docs.guidance import judged

NOISY, CLEAN = "shapes-noisy-clip", "shapes-clip"
EACH = {NOISY: 3, CLEAN: 1}
"""Pictures of a caption."""
ROWS = (
    *((NOISY, "", scale, "ddim", 50) for scale in (1, 2, 4, 8, 16, 32)),
    *((NOISY, "", scale, "ancestral", 150) for scale in (16, 32, 64)),
    *((CLEAN, through, scale, "ddim", 50) for through, scale in (("estimate", 100), ("estimate", 300), ("network", 30), ("network", 100))),
)
"""The CLIP model, what the gradient goes through, the scale, and the solver with its steps."""
KEYS = ("all", "size", "colour", "shape", "place", "background")


def main(folder: Path) -> None:
    print(f"| CLIP model | solver, steps | scale | pictures | all five | {' | '.join(KEYS[1:])} |\n{'|---' * (len(KEYS) + 4)}|")
    for clip, through, scale, solver, steps in ROWS:
        options = ("--clip-guidance", clip, "--clip-scale", str(scale), *([f"clip_through={through}"] if through else []))
        made = folder / f"{through or 'noisy'}-{scale:g}-{solver}-{steps}"
        found, _ = judged("shapes", made, EACH[clip], *options, "--solver", solver, "--steps", str(steps))
        named = f"{clip}{f', {through}' if through else ''}"
        shares = " | ".join(f"{found[key]:.1%}" for key in KEYS)
        print(f"| {named} | {solver} {steps} | {scale:g} | {found['images']} | {shares} |", flush=True)


if __name__ == "__main__":
    main(asked())

"""What Stable Diffusion takes on a card of 24 GB: python -m docs.one_card

First whole weights of Stable Diffusion 1.5. Each row is the memory that `distill dmd --teacher sd15 --batch-size 16 KEY=VALUE... --dry-run`
plans, counted as one set of options after another is added. Then LoRAs of rank 64 in bf16, by `--lora 64 --precision bf16`, for parts of
some pictures of 512 (sd15) and 1024 pixels (sdxl). Nothing is downloaded.
"""

from __future__ import annotations

from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import open as opened
from distill_cli.recipes import resolve
from distill_cli.training.fitting import OPTIONS, Fitting
from distill_cli.training.job import Job
from distill_cli.training.memory import memory

ADDED = (
    {},
    {"precision": "bf16"},
    {"accumulate": 4},
    {"gradient_checkpointing": True},
    {"ema_device": "cpu"},
    {"optimizer_device": "cpu"},
)
"""What each row adds to the one before."""


LORAS = (
    ("sd15", 4, {}),
    ("sd15", 16, {"gradient_checkpointing": True}),
    ("sdxl", 1, {}),
    ("sdxl", 4, {"gradient_checkpointing": True}),
)
"""A teacher, the pictures of a part, and further options."""


def loras() -> None:
    heads = ("teacher", "pictures", "options", "weights", "average", "moments", "gradients", "activations", "in all")
    print(f"\n| {' | '.join(heads)} |")
    print(f"{'|---' * len(heads)}|")
    for teacher, size, options in LORAS:
        flags = {"teacher": teacher, "batch_size": size, "lora": 64, "precision": "bf16", **options}
        objective = opened(resolve(DMDConfig, None, [], flags), Job("dmd", dry_run=True))
        needs = memory(objective)
        sizes = (needs.weights, needs.average, needs.moments, needs.gradients, needs.activations, needs.total)
        said = ", ".join(f"`{key}={str(value).lower()}`" for key, value in options.items())
        print(f"| {teacher} | {size} | {said} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} GB |", flush=True)


def main() -> None:
    objective = opened(resolve(DMDConfig, None, [], {"teacher": "sd15", "batch_size": 16, "memory": "24GB"}), Job("dmd", dry_run=True))
    fitting, chosen = Fitting(objective), {}
    heads = ("added", "a step's time (estimated)", "weights", "average", "moments", "gradients", "activations", "in all")
    print(f"| {' | '.join(heads)} |")
    print(f"{'|---' * len(heads)}|")
    for added in ADDED:
        chosen |= added
        needs = fitting.needs(**chosen)
        factor = next((f"x {option.slower:g}" for option in OPTIONS if option.key in added), "")
        sizes = (needs.weights, needs.average, needs.moments, needs.gradients, needs.activations, needs.total)
        said = ", ".join(f"`{key}={str(value).lower()}`" for key, value in added.items()) or "nothing: float32"
        print(f"| {said} | {factor} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} GB |", flush=True)


if __name__ == "__main__":
    main()
    loras()

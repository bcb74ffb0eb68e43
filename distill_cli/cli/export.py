"""distill export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import common


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A model: a run, a folder, a single file, a name, or a hub id.", callback=common.expand)
    ],
    to: Annotated[str, typer.Option(help="single-file, lora-kohya, lora-comfyui, or folder.")],
    out: Annotated[
        Path | None, typer.Option(help="What is written; default the model's name and the target.", callback=common.expand)
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    steps: Annotated[int | None, typer.Option(help="Of a run whose rounds are kept, the student of so many steps.", min=1)] = None,
    json: common.Json = False,
) -> None:
    """Write a model for other programs: Stable Diffusion's single file, a LoRA for kohya's scripts or ComfyUI, or a whole folder."""
    from distill_cli.models import load
    from distill_cli.models.exports import DTYPES, TARGETS, settled

    place = settled(run, to, out, dtype)
    model = load(run, steps)
    common.say_read("export", model)
    for line in TARGETS[to].write(model, place, DTYPES[dtype]):
        common.say(line)
    size = sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file())
    found = {"model": model.lineage.name, "target": to, "dtype": dtype, "out": str(place), "bytes": size}
    common.result(found, f"{to}: {place} ({size / 1e6:.1f} MB, {dtype})", json)

"""distill convert"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distill_cli.cli import common


def convert(
    file: Annotated[Path, typer.Argument(help="An NVlabs .pkl or an OpenAI .pt file.", callback=common.expand)],
    out: Annotated[Path, typer.Option(help="Folder of the model.", callback=common.expand)],
    resolution: Annotated[int | None, typer.Option(help="Pixels of an OpenAI model; default the number in its name.")] = None,
    head_channels: Annotated[int, typer.Option(help="Of an OpenAI model's attention; 64 in all published ones.")] = 64,
    json: common.Json = False,
) -> None:
    """Convert a published EDM or consistency checkpoint. Nothing inside the file is run."""
    from distill_cli.errors import UsageError
    from distill_cli.files import is_empty
    from distill_cli.models.convert import convert_file
    from distill_cli.models.published import PUBLISHED, published_as

    if not is_empty(out):
        raise UsageError(f"--out {out}: exists already", "choose another folder")
    known = published_as(file.name)
    published: dict[str, Any] = {"name": known, "steps": PUBLISHED[known].steps} if known else {}
    found = convert_file(file, out, resolution, head_channels, **published)
    lines = "\n".join(f"{key:17} {value}" for key, value in found.items())
    common.result(found, f"{lines}\nmodel: {out}", json)

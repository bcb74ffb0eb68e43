"""distill convert"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distill_cli.cli import common
from distill_cli.errors import UsageError
from distill_cli.files import is_empty


def convert(
    file: Annotated[Path, typer.Argument(help="NVlabs' .pkl, OpenAI's .pt, or Stable Diffusion's .safetensors.", callback=common.expand)],
    out: Annotated[Path, typer.Option(help="Folder for the model.", callback=common.expand)],
    kind: Annotated[str | None, typer.Option(help="OpenAI: teacher or student; default by edm_, cd_, ct_ in the name.")] = None,
    resolution: Annotated[int | None, typer.Option(help="OpenAI: image width; default the number in the name, else 64.")] = None,
    head_channels: Annotated[int | None, typer.Option(help="OpenAI: channels in an attention head; default 64.")] = None,
    prediction: Annotated[str | None, typer.Option(help="Stable Diffusion: eps or v, if the file does not say.")] = None,
    json: common.Json = False,
) -> None:
    """Convert a published checkpoint into a model's folder. Nothing inside the file is run."""
    from distill_cli.models.sources.convert import convert_file
    from distill_cli.models.sources.published import PUBLISHED, published_as
    from distill_cli.models.sources.single_file import SUFFIX, convert_checkpoint

    if not is_empty(out):
        raise UsageError(f"--out {out}: exists already", "choose another folder")
    for flag, value, known in (("--kind", kind, ("teacher", "student")), ("--prediction", prediction, ("eps", "v"))):
        if value not in (None, *known):
            raise UsageError(f"{flag} {value}: neither {known[0]} nor {known[1]}")
    for flag, number in (("--resolution", resolution), ("--head-channels", head_channels)):
        if number is not None and number < 1:
            raise UsageError(f"{flag} {number}: not above 0")
    ours = file.suffix.lower() == SUFFIX
    others = {"--kind": kind, "--resolution": resolution, "--head-channels": head_channels} if ours else {"--prediction": prediction}
    if wrong := [flag for flag, value in others.items() if value is not None]:
        what = "OpenAI's .pt files" if ours else "Stable Diffusion in a .safetensors file"
        raise UsageError(f"{wrong[0]}: for {what}, not for {file}", f"leave {wrong[0]} out")
    if ours:
        found = convert_checkpoint(file, out, prediction)
    else:
        name = published_as(file.name)
        published: dict[str, Any] = {"name": name, "steps": PUBLISHED[name].steps} if name else {}
        found = convert_file(file, out, resolution, head_channels, kind, **published)
    if found["assumed"]:
        common.say(f"{file}: assumed: {', '.join(found['assumed'])}")
    lines = "\n".join(f"{key:17} {value}" for key, value in found.items() if key != "assumed")
    common.result(found, f"{lines}\nmodel: {out}", json)

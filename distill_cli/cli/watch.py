"""distill watch"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import common


def watch(
    run: Annotated[Path, typer.Argument(help="A run's folder, live or finished.", metavar="RUN", callback=common.expand)],
    out: Annotated[
        Path | None, typer.Option(help="File of the page; default report.html in the run's folder.", metavar="FILE", callback=common.expand)
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Write the page again and again until the run is done, or ^C.")] = False,
    every: Annotated[int, typer.Option(min=1, help="--follow: seconds between two pages.")] = 10,
    json: common.Json = False,
) -> None:
    """Draw a run's losses, pictures and throughput as one page that needs no network."""
    import time

    from distill_cli.watch import write

    path, done = write(run, out, every if follow else 0)
    if follow and not done:
        common.say(f"page: {path}, every {every} s until the run is done")
    while follow and not done:
        time.sleep(every)
        path, done = write(run, out, every)
    common.result({"page": str(path), "done": done}, f"page: {path}", json)

"""distill edit"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import common
from distill_cli.cli.options import HelpAll


def edit(
    context: typer.Context,
    task: Annotated[str, typer.Argument(metavar="inpaint|colorize|superres|sdedit|interpolate", help="What is done.")],
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    help_all: HelpAll = False,
) -> None:
    """Edit pictures with a consistency student that was never trained to edit."""
    from distill_cli.config import EditConfig
    from distill_cli.recipes import resolve

    config = common.with_out(resolve(EditConfig, recipe, overrides or [], {"task": task, **context.obj}), recipe, task)
    assert config.out is not None
    if common.planned_without(config.model, config, dry_run):
        return
    if dry_run and context.obj["model"] is None and not Path(config.model).exists():
        common.dry_run(config, {"model": f"{config.model} is not there yet: --model"})
        return
    if not dry_run:
        common.begin_job()
    from distill_cli.edit.job import run, task_of
    from distill_cli.models import load
    from distill_cli.models.cost import sketched

    student = sketched(config.model, dry_run)[0] or load(config.model)
    work = task_of(config, student, config.out)
    common.say_read("edit", student, work)
    work.check()
    if dry_run:
        common.dry_run(config, {"pictures": len(work.names), "network evaluations": f"{len(work.times)} a picture"})
        return
    data = run(work)
    common.result(data, f"{task}: {data['pictures']} pictures in {config.out} ({data['made']} made)\npicture: {data['picture']}", json)

"""distill edit"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill_cli.cli import common
from distill_cli.cli.options import HelpAll

if TYPE_CHECKING:
    from distill_cli.config import EditConfig


def edit(
    context: typer.Context,
    task: Annotated[str, typer.Argument(metavar="inpaint|colorize|superres|sdedit|interpolate", help="The kind of edit.")],
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    help_all: HelpAll = False,
) -> None:
    """Edit pictures with a consistency student that was never trained to edit."""
    config: EditConfig = common.asked(context, recipe, overrides, task, task=task)
    if dry_run:
        common.plan_without(config.model, config)
        if context.obj["model"] is None and not Path(config.model).exists():
            common.dry_run(config, {"model": f"{config.model} is not there yet: --model"})
    else:
        common.begin_job()
    from distill_cli.edit.job import TASKS, run
    from distill_cli.models import load
    from distill_cli.models.cost import sketched

    student = sketched(config.model, dry_run)[0] or load(config.model)
    assert config.out is not None
    work = TASKS[config.task](config, student, config.out)
    common.say_read("edit", student, work)
    work.check()
    if dry_run:
        common.dry_run(config, {"pictures": len(work.names), "network evaluations": f"{len(work.times)} a picture"})
    data = run(work)
    common.result(data, f"{task}: {data['pictures']} pictures in {config.out} ({data['made']} made)\npicture: {data['picture']}", json)

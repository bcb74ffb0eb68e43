"""distill edit"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import common


def edit(
    task: Annotated[str, typer.Argument(metavar="inpaint|colorize|superres|sdedit|interpolate", help="What is done.")],
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    model: Annotated[str | None, typer.Option(help="A consistency student: a folder, a run, or a hub id.")] = None,
    input: Annotated[Path | None, typer.Option(help="A picture, or a folder of them.", callback=common.expand)] = None,
    mask: Annotated[Path | None, typer.Option(help="inpaint: white where the picture is painted anew.", callback=common.expand)] = None,
    patch: Annotated[int | None, typer.Option(help="superres: pixels of the model on one of the input, each way.")] = None,
    times: Annotated[str | None, typer.Option(help="index:0,22 (points of the student's grid), sigma:80,1.4, or even.")] = None,
    classes: common.Classes = None,
    out: common.Out = None,
    seed: common.Seed = None,
    device: common.Device = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
) -> None:
    """Edit pictures with a consistency student that was never trained to edit."""
    from distill_cli.config import EditConfig
    from distill_cli.recipes import resolve

    flags = dict(
        task=task, model=model, input=input, mask=mask, patch=patch, times=times, classes=classes, out=out, seed=seed, device=device
    )
    config = common.with_out(resolve(EditConfig, recipe, overrides or [], flags), recipe, task)
    assert config.out is not None
    if common.planned_without(config.model, config, dry_run):
        return
    if dry_run and model is None and not Path(config.model).exists():
        common.dry_run(config, {"model": f"{config.model} is not there yet: --model"})
        return
    if not dry_run:
        common.begin_job()
    from distill_cli.edit.job import Task, run
    from distill_cli.models import load
    from distill_cli.models.cost import sketched

    student = sketched(config.model, dry_run)[0] or load(config.model)
    work = Task(config, student, config.out)
    common.say_read("edit", student, work)
    work.check()
    if dry_run:
        common.dry_run(config, {"pictures": len(work.names), "network evaluations": f"{len(work.times)} a picture"})
        return
    data = run(work)
    common.result(data, f"{task}: {data['pictures']} pictures in {config.out} ({data['made']} made)\npicture: {data['picture']}", json)

"""distill trace"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from distill_cli.cli import common
from distill_cli.cli.options import HelpAll

if TYPE_CHECKING:
    from distill_cli.config import TraceConfig
    from distill_cli.models.model import Model


def trace(
    context: typer.Context,
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    help_all: HelpAll = False,
) -> None:
    """Draw the process: how data become noise, and how models make samples of noise. A restart makes only what is missing."""
    asked: TraceConfig = common.asked(context, recipe, overrides, "trace")
    for spec in asked.model if dry_run else ():
        common.plan_without(spec, asked)
    if not dry_run:
        common.begin_job()
    from distill_cli.evaluate.report import split
    from distill_cli.trace import job

    models: dict[str, Model] = {}
    steps: dict[str, int | None] = {}
    download: dict[str, str] = {}
    config = asked
    for spec in dict.fromkeys(asked.model):
        name, steps[spec] = split(spec)
        own = asked.model_copy(update={"steps": steps[spec] or asked.steps})
        models[spec], config, found = common.open_model("trace", name, own, dry_run)
        download |= found
    num = asked.num if "num" in asked.model_fields_set else job.usual_num(models)
    config = config.model_copy(update={"steps": asked.steps, "num": num})
    work = job.opened(config, models, steps)
    if dry_run:
        calls = ", ".join(each.title for each in work.traced)
        common.dry_run(config, {**download, "files": ", ".join(work.files()), "each noise": calls})
    data = job.run(work)
    text = f"trace: {len(data['files'])} files in {config.out} ({data['made']} made, {data['kept']} were there)"
    common.result(data, "\n".join([text, *(f"{config.out}/{name}" for name in data["files"])]), json)

"""distill evaluate"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import typer

from distill_cli.cli import common
from distill_cli.cli.options import HelpAll
from distill_cli.processes import rank

if TYPE_CHECKING:
    from distill_cli.config import EvaluateConfig


def evaluate(
    context: typer.Context,
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    num_processes: common.Processes = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    help_all: HelpAll = False,
) -> None:
    """Measure models or finished pictures against real ones: FID, KID, precision, recall and more, in one table."""
    config: EvaluateConfig = common.asked(context, recipe, overrides, "evaluation")
    if dry_run:
        from distill_cli.data.prompts import open_prompts
        from distill_cli.evaluate.report import reference_images
        from distill_cli.evaluate.text import count_of

        given = open_prompts(config.prompts) if config.prompts is not None else reference_images(config)
        common.say_read("evaluate", config.data if given is None else given)
        count = count_of(config, len(open_prompts(config.prompts))) if config.prompts is not None else config.num
        plan = {"images": f"{count} of each of {len(config.model)} models, kept in {config.out}/samples"}
        common.dry_run(config.model_copy(update={"num": count}), plan)
    common.start_processes(num_processes, config.prompts)
    from distill_cli.evaluate import report as of_images
    from distill_cli.evaluate import text as of_prompts

    kind = of_images if config.prompts is None else of_prompts
    report = kind.evaluate(config, partial(common.say_read, "evaluate"))
    if rank() > 0:
        return
    for warning in report["warnings"]:
        common.say(f"warning: {warning}")
    assert config.out is not None
    places = [f"picture: {config.out}/picture.png"] if (config.out / "picture.png").exists() else []
    places += [f"statistics: {config.save_statistics}"] if config.save_statistics is not None else []
    common.result(report, "\n".join([kind.table(report), "", *places, f"report: {config.out}/report.html, report.json"]), json)

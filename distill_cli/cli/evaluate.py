"""distill evaluate"""

from __future__ import annotations

from functools import partial

import typer

from distill_cli.cli import common
from distill_cli.cli.options import HelpAll


def evaluate(
    context: typer.Context,
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    num_processes: common.Processes = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    help_all: HelpAll = False,
) -> None:
    """Measure models against real images: accuracy, Fréchet distance, precision, recall, in one table."""
    from distill_cli.config import EvaluateConfig
    from distill_cli.recipes import resolve

    config = common.with_out(resolve(EvaluateConfig, recipe, overrides or [], context.obj), recipe, "evaluation")
    if dry_run:
        from distill_cli.data import open_images
        from distill_cli.data.prompts import open_prompts
        from distill_cli.evaluate.text import count_of

        given = open_prompts(config.prompts) if config.prompts is not None else open_images(config.data, config.resolution)
        common.say_read("evaluate", given)
        count = config.num if config.prompts is None else count_of(config, len(given))
        common.dry_run(
            config.model_copy(update={"num": count}),
            {"images": f"{count} of each of {len(config.model)} models, kept in {config.out}/samples"},
        )
        return
    common.start_processes(num_processes, config.prompts)
    from distill_cli.evaluate import report as of_images
    from distill_cli.evaluate import text as of_prompts
    from distill_cli.processes import rank

    kind = of_images if config.prompts is None else of_prompts
    report = kind.evaluate(config, partial(common.say_read, "evaluate"))
    if rank() > 0:
        return
    for warning in report["warnings"]:
        common.say(f"warning: {warning}")
    common.result(report, f"{kind.table(report)}\n\npicture: {config.out}/picture.png\nreport: {config.out}/report.json", json)

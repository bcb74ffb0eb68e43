"""distill classifier"""

from __future__ import annotations

from typing import Annotated

import typer

from distill_cli.cli import common


def classifier(
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    data: Annotated[str | None, typer.Option(help="A built-in set, or a folder of images whose subfolders are classes.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; a folder needs it.")] = None,
    out: common.Out = None,
    steps: common.Steps = None,
    batch_size: common.BatchSize = None,
    lr: common.Rate = None,
    seed: common.Seed = None,
    device: common.Device = None,
    resume: common.Resume = None,
    num_processes: common.Processes = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
) -> None:
    """Train the classifier in whose features `distill evaluate` measures."""
    from distill_cli.config import ClassifierConfig

    flags = dict(
        data=data, resolution=resolution, out=out, steps=steps, batch_size=batch_size, lr=lr, seed=seed, device=device, resume=resume
    )
    config = common.open_run(ClassifierConfig, "classifier", recipe, overrides, dry_run, flags)
    if not dry_run:
        common.start_processes(num_processes)
    common.train("classifier", config, resume, dry_run, json)

"""distill cm"""

from __future__ import annotations

from typing import Annotated

import typer

from distill_cli.cli import common


def cm(
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    method: Annotated[str | None, typer.Option(help="cd, ct, ict or ect.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A name of `distill models ls`, a folder or a hub id; optional for ct, ict.")] = None,
    data: Annotated[str | None, typer.Option(help="Real images: a built-in set or a folder; default the teacher's set.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; a folder needs it.")] = None,
    out: common.Out = None,
    steps: common.Steps = None,
    batch_size: common.BatchSize = None,
    lr: common.Rate = None,
    metric: Annotated[str | None, typer.Option(help="huber, l1, l2 or lpips.")] = None,
    guidance_scale: common.Guidance = None,
    precision: common.Precision = None,
    seed: common.Seed = None,
    device: common.Device = None,
    resume: common.Resume = None,
    num_processes: common.Processes = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
) -> None:
    """Distil or train a consistency model, a student of one or a few steps."""
    from distill_cli.config import CMConfig

    flags = dict(
        method=method, teacher=teacher, data=data, resolution=resolution, out=out, steps=steps, batch_size=batch_size, lr=lr,
        metric=metric, guidance_scale=guidance_scale, precision=precision, seed=seed, device=device, resume=resume,
    )  # fmt: skip
    config = common.open_run(CMConfig, "cm", recipe, overrides, dry_run, flags)
    if not dry_run:
        common.start_processes(num_processes)
    if config.teacher and common.planned_without(config.teacher, config, dry_run):
        return
    common.train("cm", config, resume, dry_run, json)

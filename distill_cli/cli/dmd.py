"""distill dmd"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import common


def dmd(
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    teacher: Annotated[str | None, typer.Option(help="A name of `distill models ls`, a folder, or a hub id.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="A folder of `distill pairs`, for the regression loss.", callback=common.expand)
    ] = None,
    prompts: common.Prompts = None,
    negative_prompt: common.Negative = None,
    out: common.Out = None,
    steps: common.Steps = None,
    batch_size: common.BatchSize = None,
    lr: common.Rate = None,
    fake_lr: Annotated[float | None, typer.Option(help="Learning rate of the fake score; default --lr.")] = None,
    fake_steps: Annotated[int | None, typer.Option(help="Fake-score steps a student step.")] = None,
    regression_loss: Annotated[str | None, typer.Option(help="l2, huber or lpips.")] = None,
    regression_weight: Annotated[float | None, typer.Option(help="Default 0.25 with pairs.")] = None,
    guidance_scale: common.Guidance = None,
    precision: common.Precision = None,
    seed: common.Seed = None,
    device: common.Device = None,
    resume: common.Resume = None,
    num_processes: common.Processes = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
) -> None:
    """Distil a one-step student by distribution matching."""
    from distill_cli.config import DMDConfig

    flags = dict(
        teacher=teacher, pairs=pairs, prompts=prompts, negative_prompt=negative_prompt, out=out, steps=steps, batch_size=batch_size, lr=lr,
        fake_lr=fake_lr, fake_steps=fake_steps, regression_loss=regression_loss, regression_weight=regression_weight,
        guidance_scale=guidance_scale, precision=precision, seed=seed, device=device, resume=resume,
    )  # fmt: skip
    config = common.open_run(DMDConfig, "dmd", recipe, overrides, dry_run, flags)
    if not dry_run:
        common.start_processes(num_processes, config.prompts)
    if common.planned_without(config.teacher, config, dry_run):
        return
    common.train("dmd", config, resume, dry_run, json)

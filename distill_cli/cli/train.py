"""distill train"""

from __future__ import annotations

from typing import Annotated

import typer

from distill_cli.cli import common


def train(
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    data: Annotated[str | None, typer.Option(help="A built-in set or a folder of images.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; a folder needs it.")] = None,
    out: common.Out = None,
    steps: common.Steps = None,
    batch_size: common.BatchSize = None,
    lr: common.Rate = None,
    precision: common.Precision = None,
    seed: common.Seed = None,
    device: common.Device = None,
    resume: common.Resume = None,
    num_processes: common.Processes = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
) -> None:
    """Train a teacher from images."""
    from distill_cli.config import TrainConfig

    flags = dict(
        data=data, resolution=resolution, out=out, steps=steps, batch_size=batch_size, lr=lr,
        precision=precision, seed=seed, device=device, resume=resume,
    )  # fmt: skip
    config = common.open_run(TrainConfig, "train", recipe, overrides, dry_run, flags)
    if not dry_run:
        common.start_processes(num_processes)
    common.train("train", config, resume, dry_run, json)

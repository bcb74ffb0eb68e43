"""distill sample"""

from __future__ import annotations

from typing import Annotated

import typer

from distill_cli.cli import common


def sample(
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    model: Annotated[str | None, typer.Option(help="A name of `distill models ls`, a folder, a run, or a hub id.")] = None,
    num: Annotated[int | None, typer.Option(help="Images to make.")] = None,
    out: common.Out = None,
    classes: common.Classes = None,
    solver: common.Solver = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default the model's own.")] = None,
    guidance_scale: common.Guidance = None,
    batch_size: common.BatchSize = None,
    format: Annotated[str | None, typer.Option(help="png or npz.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also a picture of the first 100.")] = False,
    precision: common.Precision = None,
    seed: common.Seed = None,
    device: common.Device = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
) -> None:
    """Make images with any model, teacher or student. A restart makes only what is missing."""
    from distill_cli.config import SampleConfig
    from distill_cli.recipes import resolve

    flags = dict(
        model=model, num=num, out=out, classes=classes, solver=solver, steps=steps, guidance_scale=guidance_scale,
        batch_size=batch_size, format=format, grid=grid or None, precision=precision, seed=seed, device=device,
    )  # fmt: skip
    config = common.with_out(resolve(SampleConfig, recipe, overrides or [], flags), recipe, "samples")
    from distill_cli.models import load
    from distill_cli.models.model import network_evaluations
    from distill_cli.sample import batch

    assert config.out is not None
    loaded = load(config.model)
    if dry_run:
        calls = network_evaluations(loaded.with_defaults(config.solver, config.steps, config.guidance_scale))
        common.dry_run(config, {"images": config.num, "network evaluations": f"{config.num * calls:,} ({calls} an image)"})
        return
    data = batch.sample(config, loaded, config.out)
    speed = f", {data['images_per_second']} images/s" if data["made"] else ""
    text = f"samples: {config.num} in {config.out} ({data['made']} made, {data['kept']} were there){speed}"
    if config.grid:
        text += f"\npicture: {config.out / 'grid.png'}"
    common.result(data, text, json)

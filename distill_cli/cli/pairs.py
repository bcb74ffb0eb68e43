"""distill pairs"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import common


def pairs(
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    teacher: Annotated[str | None, typer.Option(help="A name of `distill models ls`, a folder, or a hub id.")] = None,
    num: Annotated[int | None, typer.Option(help="Pairs to make.")] = None,
    out: common.Out = None,
    solver: common.Solver = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default the teacher's own.")] = None,
    classes: common.Classes = None,
    guidance_scale: common.Guidance = None,
    batch_size: common.BatchSize = None,
    shard_size: Annotated[int | None, typer.Option(help="Pairs a file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16 or float32, of the stored images.")] = None,
    seed: common.Seed = None,
    device: common.Device = None,
    check: Annotated[Path | None, typer.Option(help="Verify every shard of a folder of pairs.", metavar="DIR")] = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
) -> None:
    """Precompute noise-image pairs with a teacher. A restart makes only what is missing."""
    flags = dict(
        teacher=teacher, num=num, out=out, solver=solver, steps=steps, classes=classes, guidance_scale=guidance_scale,
        batch_size=batch_size, shard_size=shard_size, dtype=dtype, seed=seed, device=device,
    )  # fmt: skip
    if check is not None:
        from distill_cli.errors import UsageError

        if recipe or overrides or any(value is not None for value in flags.values()):
            raise UsageError("--check: takes the folder alone")
        _check(check, json)
        return
    from distill_cli.config import PairsConfig
    from distill_cli.recipes import resolve

    config = common.with_out(resolve(PairsConfig, recipe, overrides or [], flags), recipe, "pairs")
    if common.planned_without(config.teacher, config, dry_run):
        return
    from distill_cli.models import load
    from distill_cli.pairs.generate import generate, manifest_of, plan

    assert config.out is not None
    model = load(config.teacher)
    if dry_run:
        common.dry_run(config, plan(manifest_of(config, model)))
        return
    counts = generate(config, model, config.out)
    text = f"pairs: {config.num} in {config.out} ({counts['made']} shards made, {counts['kept']} were there)"
    common.result({"folder": str(config.out), "pairs": config.num, **counts}, text, json)


def _check(folder: Path, as_json: bool) -> None:
    from distill_cli.errors import DistillError
    from distill_cli.pairs.store import check_all, read_manifest

    manifest = read_manifest(folder)
    wrong = list(check_all(folder, manifest))
    data = {"folder": str(folder), "pairs": manifest.num, "shards": manifest.shards, "wrong": [error.message for error in wrong]}
    common.result(data, f"pairs: {manifest.num} in {manifest.shards} shards, {len(wrong)} of them wrong", as_json)
    if wrong:
        for error in wrong[1:]:
            common.say(f"error: {error.message}")
        raise DistillError(wrong[0].message, wrong[0].hint)

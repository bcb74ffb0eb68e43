"""distill pairs"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill_cli.cli import common
from distill_cli.cli.options import HelpAll
from distill_cli.errors import DistillError, UsageError
from distill_cli.processes import parse_part, rank

if TYPE_CHECKING:
    from distill_cli.config import PairsConfig

_folder = partial(typer.Option, metavar="DIR", callback=common.expand)


def pairs(
    context: typer.Context,
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    num_processes: common.Processes = None,
    shards: common.Shards = None,
    check: Annotated[Path | None, _folder(help="Verify every shard of a folder of pairs.")] = None,
    merge: Annotated[list[Path] | None, _folder(help="Join folders that hold parts of one job in --out; once a folder.")] = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    help_all: HelpAll = False,
) -> None:
    """Precompute noise-image pairs with a teacher. A restart makes only what is missing."""
    given = [*(key for key, value in context.obj.items() if value is not None), *filter(None, (recipe, overrides, num_processes, shards))]
    if check is not None:
        if given:
            raise UsageError("--check makes no pairs, so it takes no other option")
        _check(check, json)
        return
    if merge:
        if given not in ([], ["out"]):
            raise UsageError("--merge makes no pairs, so it takes no other option than --out")
        _merge(merge, context.obj["out"], json)
        return
    part = parse_part(shards)
    config: PairsConfig = common.asked(context, recipe, overrides, "pairs")
    if dry_run:
        common.plan_without(config.teacher, config)
    else:
        common.start_processes(num_processes, config.prompts)
    from distill_cli.pairs.generate import generate, manifest_of, plan

    model, config, download = common.open_model("pairs", config.teacher, config, dry_run)
    assert config.out is not None
    if dry_run:
        common.dry_run(config, {**download, **plan(manifest_of(config, model), model, config.precision)})
    counts = generate(config, model, config.out, part)
    text = f"pairs: {config.num} in {config.out} ({counts['made']} shards made, {counts['kept']} were there)"
    common.shared_result({"folder": str(config.out), "pairs": config.num, **counts}, text, json, "shards")


def _merge(folders: list[Path], given: str | None, as_json: bool) -> None:
    from distill_cli.config.base import expanded
    from distill_cli.pairs.store import merge

    if given is None:
        raise UsageError("--merge: needs --out FOLDER")
    try:
        out = Path(expanded(given))
    except ValueError as error:
        raise UsageError(f"--out: {error}") from error
    counts = merge(folders, out)
    text = f"pairs: {counts['shards']} of {counts['of']} shards in {out} ({counts['copied']} copied)"
    common.result({"folder": str(out), **counts}, text, as_json)


def _check(folder: Path, as_json: bool) -> None:
    from distill_cli.pairs.store import check_all, read_manifest

    if rank() > 0:  # process 0 uses all cores
        return
    manifest = read_manifest(folder)
    wrong = check_all(folder, manifest)
    data = {"folder": str(folder), "pairs": manifest.num, "shards": manifest.shards, "wrong": [error.message for error in wrong]}
    common.result(data, f"pairs: {manifest.num} in {manifest.shards} shards, {len(wrong)} of them wrong", as_json)
    if wrong:
        for error in wrong[1:]:
            common.say(f"error: {error.message}")
        raise DistillError(wrong[0].message, wrong[0].hint)

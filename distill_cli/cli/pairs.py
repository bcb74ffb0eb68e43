"""distill pairs"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distill_cli.cli import common
from distill_cli.cli.options import HelpAll


def pairs(
    context: typer.Context,
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    num_processes: common.Processes = None,
    shards: common.Shards = None,
    check: Annotated[
        Path | None, typer.Option(help="Verify every shard of a folder of pairs.", metavar="DIR", callback=common.expand)
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="Join folders that hold parts of one job in --out; once a folder.", metavar="DIR", callback=common.expand),
    ] = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    help_all: HelpAll = False,
) -> None:
    """Precompute noise-image pairs with a teacher. A restart makes only what is missing."""
    flags: dict[str, Any] = context.obj
    from distill_cli.processes import parse_part

    if check is not None or merge:
        flag, allowed = ("--check", ()) if check is not None else ("--merge", ("out",))
        _only(flag, recipe, overrides, flags, num_processes, shards, allowed=allowed)
    if check is not None:
        _check(check, json)
        return
    if merge:
        _merge(merge, flags["out"], json)
        return
    part = parse_part(shards)
    from distill_cli.config import PairsConfig
    from distill_cli.recipes import resolve

    config = common.with_out(resolve(PairsConfig, recipe, overrides or [], flags), recipe, "pairs")
    if common.planned_without(config.teacher, config, dry_run):
        return
    if not dry_run:
        common.start_processes(num_processes, config.prompts)
    from distill_cli.models.cost import sketched
    from distill_cli.pairs.generate import generate, manifest_of, plan

    sketch, download = sketched(config.teacher, dry_run)
    model, config = common.open_model("pairs", config.teacher, config, sketch)
    assert config.out is not None
    if dry_run:
        common.dry_run(config, {**download, **plan(manifest_of(config, model), model)})
        return
    counts = generate(config, model, config.out, part)
    text = f"pairs: {config.num} in {config.out} ({counts['made']} shards made, {counts['kept']} were there)"
    common.shared_result({"folder": str(config.out), "pairs": config.num, **counts}, text, json, "shards")


def _only(
    flag: str, recipe: str | None, overrides: list[str] | None, flags: dict[str, Any], *others: Any, allowed: tuple[str, ...]
) -> None:
    """Refuse what makes pairs beside a flag that makes none."""
    from distill_cli.errors import UsageError

    given = [key for key, value in flags.items() if value is not None and key not in allowed]
    if recipe or overrides or given or any(value is not None for value in others):
        raise UsageError(f"{flag} makes no pairs, so it takes no other option{' than --out' if allowed else ''}")


def _merge(folders: list[Path], given: str | None, as_json: bool) -> None:
    from distill_cli.config.base import expanded
    from distill_cli.errors import UsageError
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
    from distill_cli.errors import DistillError
    from distill_cli.pairs.store import check_all, read_manifest
    from distill_cli.processes import rank

    if rank() > 0:  # the first uses all cores
        return
    manifest = read_manifest(folder)
    wrong = check_all(folder, manifest)
    data = {"folder": str(folder), "pairs": manifest.num, "shards": manifest.shards, "wrong": [error.message for error in wrong]}
    common.result(data, f"pairs: {manifest.num} in {manifest.shards} shards, {len(wrong)} of them wrong", as_json)
    if wrong:
        for error in wrong[1:]:
            common.say(f"error: {error.message}")
        raise DistillError(wrong[0].message, wrong[0].hint)

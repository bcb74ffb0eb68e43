"""distill push"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import common
from distill_cli.errors import UsageError, printable


def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of a model.", metavar="RUN", callback=common.expand)],
    repo: Annotated[str, typer.Option(help="The repository on the hub; it is made if it is not there.", metavar="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go where, and touch no network.")] = False,
    json: common.Json = False,
) -> None:
    """Publish a model on the Hugging Face hub: its files, its card with pictures of the run, its recipe."""
    from distill_cli import publish
    from distill_cli.models import header

    if not header.HUB_ID.fullmatch(repo):
        raise UsageError(f"--repo {repo}: not of the form OWNER/NAME", "OWNER is your name on the hub, or an organisation's")
    if not dry_run:
        common.begin_job()
    what = publish.parcel(run, repo)
    for remark in what.remarks:
        common.say(remark)
    if what.left:
        some = ", ".join([*map(printable, what.left[:12]), *["..."] * (len(what.left) > 12)])
        common.say(f"{len(what.left)} files are no part of the model and do not go: {some}")
    sizes = what.sizes
    total = f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB"
    data = {"repo": repo, "files": sizes}
    if dry_run:
        rows = "\n".join(f"{size:15,} {name}" for name, size in sizes.items())
        shown = header.header_of(what.card) or "(none)\n"
        where = f"to {publish.endpoint()}/{repo}{', private if it is not there yet' * private}"
        common.result({**data, "header": shown}, f"{rows}\n{total}, {where}\nheader of README.md:\n{shown.rstrip()}", json)
        return
    common.say(f"push: {total}, to {repo}")
    done = publish.push(what, repo, private)
    made = "made" if done["made"] else "was there; its other files are kept"
    said = f"{repo} {made}; {'one commit' if done['changed'] else 'nothing has changed since its last commit'}"
    common.result({**data, **done}, f"{said}\nmodel: {done['url']}", json)

"""distill recipes"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import common
from distill_cli.errors import UsageError, printable_lines

app = typer.Typer(help="Recipes: ls, show, cp, check.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(help="A recipe's name or file.", metavar="NAME|FILE", callback=common.expand)]


@app.command("ls")
def ls(json: common.Json = False) -> None:
    """List the built-in recipes."""
    from distill_cli import recipes

    rows = {}
    for name in recipes.names():
        path = recipes.find(name)
        lines = recipes.describe(path).splitlines()
        rows[name] = {"command": recipes.read(path)["command"], "summary": lines[1] if len(lines) > 1 else ""}
    widest = max(map(len, rows))
    common.result(rows, "\n".join(f"{name:{widest}} {row['command']:7} {row['summary']}" for name, row in rows.items()), json)


@app.command("show")
def show(name: Name) -> None:
    """Print a recipe."""
    from distill_cli import recipes

    print(printable_lines(recipes.text_of(recipes.find(name))), end="")


@app.command("cp")
def cp(name: Name, to: Annotated[Path, typer.Argument(help="A file or folder.", callback=common.expand)] = Path(".")) -> None:
    """Copy a recipe, to change it."""
    from distill_cli import recipes

    print(recipes.copy(name, to))


@app.command("check")
def check(names: Annotated[list[str], typer.Argument(help="Names or files.", metavar="NAME|FILE...", callback=common.expand)]) -> None:
    """Say whether recipes are right, with every error at once."""
    from distill_cli import recipes

    wrong = []
    for name in names:
        try:
            recipes.check(name)
            print(f"{name}: right")
        except UsageError as error:
            wrong.append(error.message)
    if wrong:
        raise UsageError("\n".join(wrong), "distill COMMAND --help-all shows every key")

"""Options made from a command's config: every key is a flag, whose help is the field's description and default."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from distill_cli import commands, processes
from distill_cli.errors import UsageError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

GROUPS = {
    "Data": ("data", "resolution", "flip", "holdout", "variants", "pairs", "prompts", "negative_prompt", "classes", "input", "mask"),
    "Output": ("out", "log_every", "sample_every", "save_every", "keep", "keep_best", "best_by", "result", "health_every", "tracker",
               "format", "dtype", "shard_size", "grid",
               "scale", "show", "every", "fps"),
}  # fmt: skip
"""Headings of `--help` -> keys below them."""


def _group(command: str, key: str) -> str:
    """The heading of a key. For a training command, keys that all methods share are under Training, others under Method."""
    from distill_cli.config import TrainingConfig

    if named := next((group for group, keys in GROUPS.items() if key in keys), ""):
        return named
    if command not in commands.TRAINING:
        return "Options"
    return "Training" if key in TrainingConfig.model_fields else "Method"


def _metavar(command: str, key: str, field: FieldInfo) -> str:
    """The placeholder of a value: its choices, or its type."""
    from distill_cli.recipes import choices, plain_kinds

    if chosen := [*commands.kinds(command)] if key == "method" else choices(field.annotation):
        return "|".join(chosen)
    kinds = plain_kinds(field.annotation)
    names = {list: "A,B,...", tuple: "A,B", Path: "PATH", float: "NUMBER", int: "N"}
    name = next((name for kind, name in names.items() if kind in kinds), "TEXT")
    return "N|TIME" if kinds >= {int, str} else "TEXT" if kinds >= {list, str} else name


def _default(field: FieldInfo) -> str:
    """The default in the form of a flag's value; '' for None, whose meaning the description tells."""
    value = field.get_default(call_default_factory=True)
    if value is None or value == "" or field.is_required():
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def _help(fields: dict[str, FieldInfo], every: int) -> str:
    """Description and default of a key. If they differ between the `every` methods, each is preceded by its methods."""
    texts: dict[str, list[str]] = {}
    for method, field in fields.items():
        default = _default(field)
        texts.setdefault(f"{field.description or ''}{f' [default: {default}]' if default else ''}", []).append(method)
    return "; ".join(text if len(methods) == every else f"{', '.join(methods)}: {text}" for text, methods in texts.items())


@cache
def _made(command: str, method: str) -> tuple[list[Any], dict[str, str]]:
    """Options for a command's keys (only of `method`, if given), and a map from the options' names to keys.

    All but switches take several values, so that one which is given twice is seen.
    """
    from distill_cli.recipes import field_of, keys, plain_kinds

    kinds = commands.kinds(command)
    kinds = {method: kinds[method]} if method in kinds else kinds
    names, parameters = {}, []
    for key in dict.fromkeys(key for kind in kinds.values() for key in keys(kind)):
        fields = {method: field_of(kind, key) for method, kind in kinds.items() if key in keys(kind)}
        if key == "method":  # the key that chooses the method
            fields = {"": commands.config_of(command).model_fields[key]}
        field = next(iter(fields.values()))
        name, flag = key.replace(".", "__"), f"--{key.replace('_', '-')}"
        names[name] = key
        held = plain_kinds(field.annotation)
        kind: Any = bool if bool in held and list not in held else list[str]
        flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
        option = typer.Option(*flags, help=_help(fields, len(fields) if key == "method" else len(kinds)), show_default=False,
                              metavar=None if kind is bool else _metavar(command, key, field))  # fmt: skip
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]))

    def made(**values: Any) -> None: ...

    made.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    made.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False)
    app.command()(made)
    return typer.main.get_command(app).params, names


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.meta[ALL] = True
        print(context.get_help())
        raise typer.Exit


ALL, METHOD = "distill.all", "distill.method"


class Job(typer.core.TyperCommand):
    """A command whose work several processes can share."""

    def invoke(self, ctx: Any) -> Any:
        processes.check_launcher()
        return super().invoke(ctx)


class Configured(Job):
    """A job with the keys of its config as options. `context.obj` has the given values, by key."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        given = [text.partition("method=")[2] for text in args if text.startswith(("--method=", "method="))]
        given += [value for flag, value in zip(args, args[1:], strict=False) if flag == "--method"]
        ctx.meta[METHOD] = given[-1] if given and {"--help", "-h", "--help-all"} & {*args} else ""  # for help: its keys alone
        return super().parse_args(ctx, args)

    def _keys(self, ctx: Any) -> tuple[list[Any], dict[str, str]]:
        options, names = _made(str(self.name), ctx.meta.get(METHOD, ""))
        own = {param.name for param in self.params}
        return [option for option in options if option.name not in own], {name: key for name, key in names.items() if name not in own}

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own parameters, one parameter for each key, and --help."""
        *own, help_option = super().get_params(ctx)
        return [*own, *self._keys(ctx)[0], help_option]

    def given(self, ctx: Any) -> dict[str, Any]:
        """Move the flags of keys out of a context's parameters: key -> value, None if not given.

        Raises UsageError for one that is given twice, but for lists of texts, which are given again for each.
        """
        from distill_cli.recipes import field_of, flag_of, keys, plain_kinds

        values = {key: ctx.params.pop(name) for name, key in self._keys(ctx)[1].items()}
        for key, value in values.items():
            if isinstance(value, list | tuple):
                kind = next(kind for kind in commands.kinds(str(self.name)).values() if key in keys(kind))
                many = {list, str} <= plain_kinds(field_of(kind, key).annotation)
                if len(value) > 1 and not many:
                    raise UsageError(f"{flag_of(key)}: given twice")
                values[key] = (list(value) if many else value[0]) if value else None
        return values

    def invoke(self, ctx: Any) -> Any:
        ctx.obj = self.given(ctx)
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options in groups; without --help-all only those that people change."""
        options, names = self._keys(ctx)
        shown = commands.shown(str(self.name))
        groups: dict[str, list[Any]] = {title: [] for title in ("Arguments", "Options", "Method", "Data", "Training", "Output", "Command")}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if param not in options:
                groups["Arguments" if param.param_type_name == "argument" else "Command"].append(record)
            elif ctx.meta.get(ALL) or names[param.name] in shown:
                groups[_group(str(self.name), names[param.name])].append(record)
        for title, records in groups.items():
            if records := [record for record in records if record]:
                with formatter.section(title):
                    formatter.write_dl(records)


HelpAll = Annotated[bool, typer.Option("--help-all", callback=_show_all, is_eager=True, help="Show every key and exit.")]

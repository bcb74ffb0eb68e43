"""The commands that train, made of METHODS: one function for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from distill_cli import commands
from distill_cli.cli import common, options

if TYPE_CHECKING:
    from distill_cli.config import TrainingConfig


def summary(command: str) -> tuple[str, str]:
    """What a command does in a line, and in full: of several methods what each does."""
    methods = commands.methods(command)
    if len(methods) == 1:
        return methods[0].summary, methods[0].summary
    lines = [f"--method {method.name:4} {method.summary}" for method in methods]
    return methods[0].summary, "\n".join(["\b", *lines])


def training(
    context: typer.Context,
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    resume: common.Resume = None,
    num_processes: common.Processes = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    help_all: options.HelpAll = False,
) -> None:
    command = str(context.command.name)
    config: TrainingConfig = common.open_run(command, recipe, overrides, dry_run, context.obj, resume)
    if not dry_run:
        common.start_processes(num_processes, getattr(config, "prompts", None))
    teacher = getattr(config, "teacher", None)
    if teacher and common.planned_without(teacher, config, dry_run):
        return
    from distill_cli.cli import openers

    opened = getattr(openers, command)(config, resume, dry_run)
    if dry_run:
        common.dry_run(opened.config, opened.plan)
        return
    from distill_cli.training.engine import Engine

    engine = Engine(opened.config, opened.objective)
    common.start_run(engine, command, resume, opened.prompts)
    opened.begin()
    trained: Any = engine.train()
    if trained is None:  # process 0 alone has it
        return
    folder = engine.run.folder
    name = engine.objective.result
    data: dict[str, Any] = {"run": str(folder), name: str(folder / name), "steps": config.steps}
    lines = [f"{name}: {folder / name}"]
    if opened.rows is not None:
        engine.release()
        picture = folder / "comparison.png"
        common.compare(opened.rows(trained), config, picture, getattr(config, "classes", None))
        data["picture"] = str(picture)
        lines.append(f"picture: {picture}")
    if (accuracy := getattr(getattr(trained, "info", None), "accuracy", None)) is not None:
        held_out = len(engine.objective.held_out)  # type: ignore[attr-defined]
        data |= {"accuracy": accuracy, "held_out": held_out}
        lines.append(f"accuracy on {held_out} images held out: {accuracy:.4f}")
    common.result(data, "\n".join(lines), json)

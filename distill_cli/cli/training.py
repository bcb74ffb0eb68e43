"""The commands that train, made of METHODS: one function for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    common.train(config, resume, dry_run, json)

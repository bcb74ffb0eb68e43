"""One function for all commands that train; METHODS has the differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from distill_cli import commands
from distill_cli.cli import common, options

if TYPE_CHECKING:
    from distill_cli.config import TrainingConfig


def summary(command: str) -> tuple[str, str]:
    """Help of a command: in one line, and in full, with a line for each of several methods."""
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
    config: TrainingConfig = common.open_run(context, recipe, overrides, dry_run, resume)
    if not dry_run:
        common.start_processes(num_processes, getattr(config, "prompts", None))
    elif teacher := getattr(config, "teacher", None):
        common.plan_without(teacher, config)
    common.train(config, resume, dry_run, json, num_processes)

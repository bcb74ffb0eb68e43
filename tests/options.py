"""Options of a command made in Python, of the method that they name."""

from pathlib import Path

import torch

from distill_cli.commands import kinds
from distill_cli.runs import Run


def options(command, **values):
    """The options of `command`, where it has several methods those of `method`, or of the first."""
    choices = kinds(command)
    return choices[values.get("method", next(iter(choices)))](**values)


def consistency(config, teacher, images):
    """The objective of one of cm's methods, prepared."""
    from distill_cli.methods.cm import objective

    made = getattr(objective, config.method.upper())(config, teacher, images)
    made.prepare(torch.device("cpu"), Run(Path("nowhere")))
    return made

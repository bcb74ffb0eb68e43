"""Options of a command made in Python, of the method that they name."""

from distill_cli.commands import kinds


def options(command, **values):
    """The options of `command`, where it has several methods those of `method`, or of the first."""
    choices = kinds(command)
    return choices[values.get("method", next(iter(choices)))](**values)


def consistency(config, teacher, images):
    """The objective of one of cm's methods."""
    from distill_cli.methods.cm import objective

    return getattr(objective, config.method.upper())(config, teacher, images)

"""Flags are made of configs: every key is one, means what key=value means, and is explained where it belongs."""

import re
from functools import cache
from pathlib import Path

import pytest
import typer

from distill_cli.cli import app
from distill_cli.commands import COMMANDS, config_of, kinds, shown
from distill_cli.errors import UsageError
from distill_cli.methods.registry import METHODS
from distill_cli.recipes import choices, field_of, flag_of, keys, plain_kinds, resolve

KINDS = [(command, name) for command in COMMANDS for name in kinds(command)]
LISTS = {"betas": "0.5,0.25", "network.channels": "64,32,64", "network.attention": "yes,no,no", "time_weights": "1,2", "classes": "0-2,7"}


def another(key, field):
    """Text of a value that a key may have, not its default."""
    held, default = plain_kinds(field.annotation), field.get_default(call_default_factory=True)
    if key in LISTS:
        return LISTS[key]
    if found := choices(field.annotation):
        return found[-1] if found[-1] != str(default) else found[0]
    if held >= {int, str}:
        return "10m"
    if int in held:
        return str((default or 8) * 2)
    return "0.5" if float in held else "name, with #4"


@cache
def commands():
    """The commands by name, made once."""
    return typer.main.get_command(app.app).commands


def flags(command, *arguments):
    """What a command line says of a command's keys."""
    of = commands()[command]
    return of.given(of.make_context(command, [*(("interpolate",) if command == "edit" else ()), *arguments]))


def outcome(config, chosen, **given):
    """The options, or the errors without the name of flag or key."""
    try:
        return resolve(config, **given)
    except UsageError as error:
        return error.message.replace("--", "").replace("-", "_").replace(f"{chosen}: ", "", 1)


@pytest.mark.parametrize(("command", "name"), KINDS)
def test_every_key_is_a_flag_and_means_what_key_value_means(command, name):
    config, kind, right = config_of(command), kinds(command)[name], 0
    method = ["--method", name] if "method" in kind.model_fields else []
    known, bare = [key for key in keys(kind) if key not in ("method", "task")], flags(command, *method)
    for key in known:
        field = field_of(kind, key)
        if bool in plain_kinds(field.annotation) and key not in LISTS:
            texts = {"true": [flag_of(key)], "false": [f"--no-{flag_of(key)[2:]}"]}
        else:
            texts = {(text := another(key, field)): [flag_of(key), text]}
        for text, arguments in texts.items():
            by_flag = outcome(config, key.replace("-", "_"), flags=flags(command, *method, *arguments))
            by_key = outcome(config, key, overrides=[f"{key}={text}"], flags=bare)
            assert by_flag == by_key, key
            right += not isinstance(by_flag, str)
    assert right > 0.6 * len(known)  # the rest needs another key


@pytest.mark.parametrize(("command", "name"), KINDS)
def test_every_key_is_explained_under_a_heading(command, name, distill):
    method = ("--method", name) if "method" in kinds(command)[name].model_fields else ()
    short, whole = (distill(command, *method, how).out for how in ("--help", "--help-all"))
    for key in keys(kinds(command)[name]):
        if key == "task":
            continue
        line = re.compile(rf"^  {flag_of(key)}( |$)", re.MULTILINE)
        assert bool(line.search(short)) == (key in shown(command)), key
        assert line.search(whole), key
        assert field_of(kinds(command)[name], key).description, key
    headings = [line for line in whole.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings[-2:] == ["Output:", "Command:"]
    assert ("Training:" in headings) == (command in {method.command for method in METHODS})


def test_help_knows_the_method(distill):
    every, ct = (" ".join(distill("cm", *more, "--help-all").out.split()) for more in ((), ("--method", "ct")))
    assert "--scales-end N s1: number of discretization steps at the end [default: 150]" in ct
    assert "steps at the end [default: 150]; ict: s1: number of discretization steps at the end [default: 1280]" in every
    assert "--teacher-steps" in every
    assert "--teacher-steps" not in ct
    assert all(method.summary in every for method in METHODS if method.command == "cm")
    assert "--save-every N|TIME steps between checkpoints, or a time such as 30s, 10m, 2h [default: 500]" in every


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("cm", "--method", "ect", "--scales", "3"), "--scales: not a key of method ect (did you mean stages?)"),
        (("cm", "p_mean=1"), "p_mean: not a key of method cd"),
        (("train", "--save-evry", "10m"), "--save-evry: no such option"),
        (("train", "--seed", "1", "--seed", "2"), "--seed: given twice"),
        (("cm", "--method", "cd", "--method", "ct"), "--method: given twice"),
        (("dmd", "--betas", "0.9"), "--betas: "),
        (("dmd", "--seed", ""), "--seed: is empty (leave it out for the default)"),
        (("train", "--network.layers", "x"), "--network.layers: input should be a valid integer"),
        (("train", "--network.channels", "8,x,8"), "--network.channels: input should be a valid integer"),
    ],
)
def test_wrong_flags_are_one_line(arguments, says, distill):
    result = distill(*arguments, "--dry-run")
    assert result.code == 2
    assert len([line for line in result.err.splitlines() if line.startswith("error: ")]) == 1
    assert says in result.err


def test_text_of_flags_is_literal():
    config = config_of("sample")
    for text in ("null", "[a, b]", "no", "a: b #c", ""):
        assert resolve(config, flags=flags("sample", "--negative-prompt", text)).negative_prompt == text
    assert resolve(config, flags=flags("sample", "--out", "null")).out == Path("null")
    assert resolve(config_of("evaluate"), flags=flags("evaluate", "--model", "[a]", "--model", "b@2")).model == ["[a]", "b@2"]

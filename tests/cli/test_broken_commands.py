"""Hundreds of random broken recipes and command lines: never a traceback, always exit code 1 or 2, always one error."""

import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_cli.cli.app import run
from distill_cli.commands import COMMANDS, config_of

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(), st.text(max_size=12), st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2), st.sampled_from(["no", "1e-4", "cuda:9", "../..", "digits", "heun"]),
)  # fmt: skip
COMMANDS = sorted(COMMANDS)


@st.composite
def recipes(draw):
    """A command and a recipe of its keys with wild values; an unknown key makes sure that it is broken."""
    command = draw(st.sampled_from(COMMANDS))
    known = sorted(config_of(command).model_fields)
    recipe = draw(st.dictionaries(st.sampled_from(known), JUNK, max_size=4))
    wrong = draw(st.text("abcdefgh_", min_size=1, max_size=8).filter(lambda key: key not in (*known, "command")))
    return command, yaml.safe_dump(recipe | {wrong: draw(JUNK)}, allow_unicode=True)


ARGUMENT = st.one_of(
    st.text(st.characters(blacklist_characters="\x00", blacklist_categories=("Cs",)), max_size=12),
    st.sampled_from(["--out", "--steps", "--seed", "-1", "steps=x", "=", "a=b=c", "--classes", "9-", "lr=nan", "--recipe", "no.yaml"]),
)
COMMAND_LINES = st.tuples(st.sampled_from([*COMMANDS, "watch", "push", "models", "recipes", "bench"]), st.lists(ARGUMENT, max_size=5))
BROKEN = st.sampled_from(
    [["--nosuchflag"], ["nosuchkey=1"], ["--recipe", "nosuchrecipe"], ["--steps", "many"], ["--num-processes", "0"], ["--device", "abacus"]]
)


def one_error(capsys, arguments):
    capsys.readouterr()
    code = run(arguments)
    out, err = capsys.readouterr()
    assert code in (1, 2), (arguments, code, out, err)
    assert "Traceback" not in err
    assert out == ""
    assert err.count("error: ") >= 1 or err.startswith("Usage"), (arguments, err)
    assert "this is a bug" not in err, (arguments, err)


QUIET = settings(max_examples=250, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill"])
    return tmp_path


@QUIET
@given(recipe=recipes())
def test_broken_recipes(recipe, folder, capsys):
    command, text = recipe
    (folder / "broken.yaml").write_text(text)
    one_error(capsys, [command, "--recipe", "broken.yaml", "--dry-run"])
    assert {path.name for path in folder.iterdir()} == {"broken.yaml"}


@QUIET
@given(text=st.binary(max_size=60))
def test_recipes_that_are_none(text, folder, capsys):
    (folder / "broken.yaml").write_bytes(text + b"\n\xff\x00: [")
    one_error(capsys, ["dmd", "--recipe", "broken.yaml", "--dry-run"])


@QUIET
@given(line=COMMAND_LINES, broken=BROKEN)
def test_broken_command_lines(line, broken, folder, capsys):
    command, arguments = line
    one_error(capsys, [command, *broken, *[a for a in arguments if a not in ("-h", "--help")]])

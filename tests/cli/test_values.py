"""What stands after `key=`, in a recipe and in a path: text as it stands, YAML for the rest, `~` and $VAR put in, built-in names."""

import json
from pathlib import Path

import pytest

from distill_cli.commands import COMMANDS, config_of
from distill_cli.config import EvaluateConfig, SampleConfig
from distill_cli.errors import UsageError
from distill_cli.methods.cm.config import CMConfig
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.recipes import dump, parse_yaml, resolve
from tests.cli.test_bad_input import one_line

TINY = ("sample", "--model", "tiny", "--num", 1, "--steps", 1)
TEXTS = [
    "ugly, take #2, blurry",
    "no",
    "010",
    "watermark: none",
    "[ugly], (bad:1.3)",
    "null",
    '"a"',
    "~",
    "$HOME",
    "2024-01-02",
    "1e3",
    "",
    "{a",
    "*x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_after_a_key_is_what_stands_there(text):
    config = resolve(SampleConfig, overrides=[f"negative_prompt={text}", "num=3"])
    assert config.negative_prompt == (None if text == "null" else text)
    assert config.num == 3


@pytest.mark.parametrize(
    ("config", "override", "value"),
    [
        (SampleConfig, "out=2024-01-02", Path("2024-01-02")),
        (SampleConfig, "out=42", Path("42")),
        (SampleConfig, "out=null", None),
        (SampleConfig, "model=010", "010"),
        (SampleConfig, "precision=no", "no"),
        (SampleConfig, "solver=null", None),
        (SampleConfig, "classes=010", [10]),
        (SampleConfig, "classes=0-2,7", [0, 1, 2, 7]),
        (SampleConfig, "classes=[0,010]", [0, 10]),
        (SampleConfig, "num=010", 10),
        (SampleConfig, "guidance_scale=2", 2.0),
        (SampleConfig, "grid=yes", True),
        (DMDConfig, "negative_prompt=", ""),
        (DMDConfig, "negative_prompt=null", None),
        (DMDConfig, "save_every=10m", "10m"),
        (DMDConfig, "betas=[0, 0.9]", (0.0, 0.9)),
        (EvaluateConfig, "model=a, b #2", ["a, b #2"]),
        (EvaluateConfig, "model=[a@4, 010]", ["a@4", "010"]),
        (CMConfig, "times=sigma:80,1.4", "sigma:80,1.4"),
    ],
)
def test_a_value_is_of_its_keys_kind(config, override, value):
    assert getattr(resolve(config, overrides=[override]), override.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("negative_prompt: no", "negative_prompt: input should be a valid string: put it in quotes (got False)"),
        ("out: 42", "out: input should be a valid string: put it in quotes (got 42)"),
        ("num: 1:30", "num: input should be a valid integer"),
        ("num: yes", "num: input should be a number (got True)"),
        ("<<: 3", "line 2: expected a mapping"),
        ("<<: {num: 2}\n<<: {steps: 2}", "line 3: key << is given twice"),
        ("<<: {num: 2, num: 3}", "line 2: key num is given twice"),
        ("a: &a {<<: *a}", "nested too deeply, or in itself"),
        (f"a: {'[' * 1500}", "nested too deeply"),
    ],
)
def test_what_is_wrong_in_a_recipe(line, says, tmp_path):
    (tmp_path / "r.yaml").write_text(f"command: sample\n{line}\n")
    with pytest.raises(UsageError) as error:
        resolve(SampleConfig, str(tmp_path / "r.yaml"))
    assert says in error.value.message
    assert "\n" not in error.value.message


def test_a_recipe_is_yaml_without_its_old_surprises(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "command: sample\nout: 2024-01-02\nclasses: 010\nmodel: 1_000\nnum: 0x10\n<<: {steps: 2, seed: 010}\nseed: 3\n"
    )
    config = resolve(SampleConfig, str(tmp_path / "r.yaml"))
    assert (config.out, config.classes, config.model, config.num, config.steps) == (Path("2024-01-02"), [10], "1_000", 16, 2)
    assert config.seed == 3  # its own comes before a merged one
    (tmp_path / "again.yaml").write_text(dump(config))
    assert resolve(SampleConfig, str(tmp_path / "again.yaml")) == config
    assert parse_yaml("[1e-3, 1.5, -2, .5, 1e+3, ~, off]", "x") == ["1e-3", 1.5, -2, 0.5, "1e+3", None, False]


PATHS = {
    "out",
    "teacher",
    "model",
    "data",
    "prompts",
    "classifier",
    "clip_guidance",
    "decoder",
    "clip",
    "vae",
    "pairs",
    "init_pairs",
    "student",
    "input",
    "mask",
    "lpips_weights",
}


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (name, key)
        for name, config in ((name, config_of(name)) for name in COMMANDS)
        for key in sorted(PATHS & {*config.model_fields})
        if "Literal" not in str(config.model_fields[key].annotation)
    ],
)
def test_every_path_is_expanded(command, key, monkeypatch, tmp_path):
    """In flags, after `key=` and in recipes; one that is not set is named."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    recipe = tmp_path / "r.yaml"
    for text, wanted in (("~/x", f"{tmp_path}/x"), ("${SCRATCH}/$SCRATCH", "/scratch/me//scratch/me"), ("a/b", "a/b"), ("x$1$", "x$1$")):
        recipe.write_text(f"command: {command}\n{key}: '{text}'\n")
        for given in ({"overrides": [f"{key}={text}"]}, {"flags": {key: text}}, {"recipe": str(recipe)}):
            value, errors = None, ""
            try:
                value = getattr(resolve(config_of(command), **given), key)
            except UsageError as error:  # of keys that need others
                errors = error.message
            if not errors:
                assert str(Path(value[0] if isinstance(value, list) else value)) == str(Path(wanted))
            assert "$" not in errors
    for text in ("$NOT_THERE/x", "${NOT_THERE}", "a/${NOT_THERE}/b"):
        with pytest.raises(UsageError, match=r"\$NOT_THERE is not set"):
            resolve(config_of(command), overrides=[f"{key}={text}"])
    monkeypatch.setenv("SCRATCH", "")
    with pytest.raises(UsageError, match=r"\$SCRATCH is empty"):
        resolve(config_of(command), flags={key: "$SCRATCH/x"})


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--recipe", "$NOT_THERE/r.yaml"),
        ("dmd", "--resume", "${NOT_THERE}/run"),
        ("pairs", "--check", "$NOT_THERE"),
        ("pairs", "--merge", "a", "--merge", "$NOT_THERE/b", "--out", "c"),
        ("pairs", "--merge", "a", "--out", "$NOT_THERE"),
        ("convert", "$NOT_THERE/a.pkl", "--out", "m"),
        ("convert", "a.pkl", "--out", "$NOT_THERE"),
        ("watch", "$NOT_THERE"),
        ("push", "$NOT_THERE", "--repo", "a/b"),
        ("watch", "r", "--out", "$NOT_THERE"),
        ("models", "show", "$NOT_THERE"),
        ("recipes", "show", "$NOT_THERE"),
        ("recipes", "check", "digits-cd", "$NOT_THERE"),
        ("recipes", "cp", "digits-cd", "$NOT_THERE/x"),
        (*TINY, "--out", "${NOT_THERE}/x"),
        (*TINY, "--out", "${NOT_THERE:-x}"),
        (*TINY, "--out", "~nobody-of-that-name/x"),
        (*TINY, "out="),
    ],
)
def test_an_unset_variable_is_one_line(arguments, distill, tmp_path):
    one_line(distill(*arguments), 2)
    assert not list(tmp_path.iterdir())


def test_home_and_variables_in_arguments(distill, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "home").mkdir()
    assert distill("recipes", "cp", "digits-cd", "~").out == f"{tmp_path}/home/digits-cd.yaml\n"
    (tmp_path / "home/tilde.yaml").write_text("command: sample\nmodel: tiny\nnum: 1\nsteps: 1\nout: ${SCRATCH}/s\n")
    assert distill("recipes", "check", "~/tilde.yaml").code == 0
    assert distill("sample", "--recipe", "~/tilde.yaml").code == 0
    assert (tmp_path / "scratch/s/000000.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "scratch"]


def test_a_folder_whose_name_has_a_dollar_is_resumed(tmp_path, monkeypatch):
    """A run's recipe holds absolute paths, which are not expanded again."""
    (tmp_path / "a$b").mkdir()
    config = resolve(DMDConfig, flags={"pairs": str(tmp_path / "a$b")})
    (tmp_path / "r.yaml").write_text(dump(config))
    assert resolve(DMDConfig, str(tmp_path / "r.yaml")).pairs == tmp_path / "a$b"


def test_text_reaches_the_pictures_settings(distill, tmp_path):
    result = distill(
        "sample", "--model", "tiny-sd", "--prompts", "shapes-held", "--num", 1, "--steps", 1, "--out", "n", "negative_prompt=a #2, no"
    )
    assert result.code == 0
    assert json.loads((tmp_path / "n/sampling.json").read_text())["negative_prompt"] == "a #2, no"


def test_a_name_that_hides_a_folder_is_said(distill, tmp_path):
    for name in ("sd15", "tiny", "digits", "shapes", "shapes-held", "digits-cd"):
        (tmp_path / name).mkdir()
    for option, name, command in (
        ("model", "sd15", ("sample", "--model", "sd15", "--dry-run")),
        ("model", "sd15", ("models", "show", "sd15")),
        ("model", "sd15", ("sample", "--model", "sd15", "--out", "o", "--prompts", "shapes-held")),
        ("model", "tiny", ("models", "show", "tiny")),
        ("data", "digits", ("train", "--data", "digits", "--dry-run")),
        ("prompts", "shapes-held", ("evaluate", "--prompts", "shapes-held", "--dry-run")),
        ("classifier", "digits", ("evaluate", "--model", "none.npz", "--out", "e")),
        ("recipe", "digits-cd", ("recipes", "check", "digits-cd")),
    ):
        err = distill(*command).err
        assert f"{option} {name}: the built-in" in err, command
        assert f"what lies here under that name is ./{name}" in err
    one_line(distill("models", "show", "./sd15"), 1, "no model_index.json")
    assert "what lies here" not in distill("models", "show", "./tiny").err

"""Tags of YAML, dollar signs in names, empty values, bytes that are no text, and accelerate's truth values."""

import os
import threading

import pytest

from distill_cli import processes, watch
from distill_cli.config import SampleConfig
from distill_cli.errors import DistillError, UsageError
from distill_cli.methods.cm.config import CMConfig
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.train.config import TrainConfig
from distill_cli.recipes import dump, parse_yaml, resolve
from distill_cli.runs import Run
from tests.cli.test_bad_input import one_line

TINY = ("sample", "--model", "tiny", "--num", 1, "--steps", 1)
TAGS = {
    "!!int ''": "'' is no int",
    "!!int x": "'x' is no int",
    "!!bool maybe": "'maybe' is no bool",
    "!!float ''": "'' is no float",
    "!!timestamp x": "'x' is no timestamp",
    "!!timestamp 2024-13-40": "is no timestamp",
    "[1, !!bool '']": "'' is no bool",
    "{a: !!int ''}": "'' is no int",
    "!!binary é": "",
    "!!nothing 3": "",
    "!!set [1]": "",
    "!!python/name:os.system x": "",
}


@pytest.mark.parametrize("text", TAGS)
def test_a_value_that_does_not_fit_its_tag_is_one_line(text, tmp_path):
    for call in (lambda: parse_yaml(f"steps: {text}", "r.yaml"), lambda: resolve(TrainConfig, overrides=[f"steps={text}"])):
        with pytest.raises(UsageError) as caught:
            call()
        assert "line 1" in caught.value.message
        assert TAGS[text] in caught.value.message
        assert "\n" not in caught.value.message
    run = Run.create(tmp_path / "r", f"command: train\nsteps: {text}\n", "train")
    with pytest.raises(DistillError, match="not readable as YAML"):
        watch.page(run)
    (tmp_path / "r.yaml").write_text(f"command: train\nsteps: {text}\n")
    with pytest.raises(UsageError, match="r.yaml line 2"):
        resolve(TrainConfig, str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("config", "text"),
    [(SampleConfig, "steps="), (SampleConfig, "classes="), (SampleConfig, "guidance_scale= "), (SampleConfig, "resolution=#3"),
     (CMConfig, "steps="), (DMDConfig, "betas=")],
)  # fmt: skip
def test_an_empty_value_is_no_default(config, text):
    with pytest.raises(UsageError, match=f"{text.partition('=')[0]}: is empty .(null means|leave it out for) the default"):
        resolve(config, overrides=[text])


def test_null_is_the_default():
    assert resolve(SampleConfig, overrides=["steps=null", "classes=null"]).steps is None
    assert resolve(SampleConfig, overrides=["negative_prompt="]).negative_prompt == ""


def test_a_key_is_given_once_with_dots_or_without(tmp_path):
    (tmp_path / "r.yaml").write_text("command: train\nnetwork.channels: [8]\nnetwork: {channels: [16]}\n")
    with pytest.raises(UsageError, match="key network.channels is given twice"):
        resolve(TrainConfig, str(tmp_path / "r.yaml"))


def test_dollars_in_names(distill, tmp_path, monkeypatch):
    monkeypatch.delenv("b", raising=False)
    (tmp_path / "a$b").mkdir()
    assert distill(*TINY, "--out", "a$b/x").code == 2
    assert distill(*TINY, "--out", "a$b").code == 0
    assert (tmp_path / "a$b/000000.png").exists()
    one_line(distill(*TINY, "--out", "c$b"), 2, "--out: $b is not set ($$ is a dollar sign)")
    for place in (("--out", "c$$b"), ("out=c$$b",)):
        planned = distill(*TINY, *place, "--dry-run")
        (tmp_path / "r.yaml").write_text(planned.out)
        assert str(resolve(SampleConfig, "r.yaml").out) == "c$b"
    assert distill(*TINY, "--out", "c$$b").code == 0
    assert (tmp_path / "c$b/000000.png").exists()
    one_line(distill(*TINY, "--out", "~nobody-x"), 2, "~nobody-x is no user's home: give the whole path")
    config = resolve(SampleConfig, overrides=["out=./~nobody-x", f"model={tmp_path}/a$b"])
    (tmp_path / "r.yaml").write_text(dump(config))
    again = resolve(SampleConfig, "r.yaml")
    assert (again.out, again.model) == (tmp_path / "~nobody-x", config.model)


def test_bytes_that_are_no_text(distill, tmp_path):
    one_line(distill(*TINY, "--negative-prompt", "sch\udcf6n"), 2, "--negative-prompt: contains a byte that is not UTF-8")
    one_line(distill(*TINY, "times=\udcff"), 2, "times: contains a byte that is not UTF-8")
    (tmp_path / "r.yaml").write_bytes("command: sample\nnegative_prompt: schön\n".encode("latin-1"))
    for command in (("recipes", "show"), ("recipes", "cp"), ("recipes", "check"), ("sample", "--recipe")):
        more = ("copy.yaml",) if "cp" in command else ()
        one_line(distill(*command, "./r.yaml", *more), 2, "r.yaml: not a text file: no UTF-8 at byte 36")
    assert not (tmp_path / "copy.yaml").exists()


def test_recipes_through_pipes(distill, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for command in (("sample", "--dry-run", "--recipe", "./fifo"), ("recipes", "check", "./fifo")):
        from distill_cli import recipes

        recipes._PIPED.clear()
        writer = threading.Thread(target=lambda: (tmp_path / "fifo").write_text("command: sample\nmodel: tiny\nsteps: 3\n"))
        writer.start()
        done = distill(*command)
        writer.join()
        assert done.code == 0, done.err
    one_line(distill("recipes", "check", "digits-cd", "$NOPE/x.yaml"), 2, "error: $NOPE/x.yaml: $NOPE is not set")


@pytest.mark.parametrize("value", ["", "xx", "inductor", "True"])
def test_nothing_is_left_of_how_accelerate_compiles(value, monkeypatch):
    names = ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION", "NEW")
    for name in names:
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    processes.own_arithmetic()
    assert not [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]


def test_truth_values_of_accelerate(monkeypatch):
    for name in (*processes.FLAGS, *processes.UNKNOWN, *processes.TRUTHS):
        monkeypatch.setenv(name, "perhaps")
        with pytest.raises(UsageError, match=f"{name}=perhaps: neither true nor false"):
            processes.own_arithmetic()
        monkeypatch.setenv(name, "")
        processes.own_arithmetic()
        assert name not in os.environ


def test_a_hidden_name_is_said_once_by_the_processes_of_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "_HIDDEN", [])
    (tmp_path / "digits").mkdir()
    processes.say_hidden("data", "digits", "the built-in set")
    monkeypatch.setenv(processes.SAID, "\n".join(processes._HIDDEN))
    processes.say_hidden("data", "digits", "the built-in set")
    assert capsys.readouterr().err.count("./digits") == 1

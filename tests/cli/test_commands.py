"""The commands as a user meets them: results, errors in one line, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from distill_cli.models.model import Model
from tests import looking

SMALL = ("batch_size=4", "log_every=1", "sample_every=2", "warmup_steps=1")


def test_from_nothing_to_pictures(distill, tmp_path):
    """pairs, dmd and sample on `tiny`, as in somebody's CI."""
    assert distill("pairs", "--teacher", "tiny", "--num", 8, "--steps", 3, "--out", "p").code == 0
    again = distill("pairs", "--teacher", "tiny", "--num", 8, "--steps", 3, "--out", "p", "--json")
    assert again.json == {"folder": "p", "pairs": 8, "made": 0, "kept": 1, "missing": 0}
    assert "0 of them wrong" in distill("pairs", "--check", "p").out
    run = distill("dmd", "--teacher", "tiny", "--pairs", "p", "--steps", 2, "--out", "r", "--json", *SMALL)
    assert run.code == 0, run.err
    assert run.json["student"] == "r/student"
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {
        "recipe.yaml",
        "env.json",
        "metrics.jsonl",
        "speed.jsonl",
        "samples",
        "checkpoints",
        "student",
        "comparison.png",
        "begun.json",
    }
    assert [json.loads(line)["step"] for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert yaml.safe_load((tmp_path / "r/recipe.yaml").read_text())["steps"] == 2
    sampled = distill("sample", "--model", "r", "--num", 5, "--out", "s", "--grid", "--json")
    assert sampled.json["made"] == 5
    assert sampled.json["network_evaluations"] == 1
    lines = [json.loads(line) for line in (tmp_path / "s/samples.jsonl").read_text().splitlines()]
    assert lines[4] == {"index": 4, "file": "000004.png", "seed": 0, "label": 4, "class": "4"}
    assert Image.open(tmp_path / "s/000004.png").size == (16, 16)
    assert distill("sample", "--model", "r", "--num", 5, "--out", "s").out.startswith("samples: 5 in s (0 made, 5 were there)")


@pytest.mark.parametrize("method", ["cd", "ct", "ict", "ect"])
def test_consistency_models_from_nothing_to_pictures(method, distill, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "shown", looking.SHOWN)
    network = ["network.channels=[16, 16]", "network.attention=[0, 0]", "network.groups=4", "network.head=8"]
    options = ["--teacher", "tiny"] if method in ("cd", "ect") else network
    arguments = (
        "cm",
        "--method",
        method,
        "--data",
        "digits",
        *options,
        "--steps",
        2,
        "batch_size=4",
        "sample_every=2",
        "log_every=1",
        "--out",
        "r",
    )
    assert distill(*arguments, "--dry-run").code == 0
    run = distill(*arguments, "--json")
    assert run.code == 0, run.err
    assert Image.open(tmp_path / "r/comparison.png").size[0] > 1000
    shown = distill("models", "show", "r", "--json").json
    assert shown["lineage"]["method"] == method
    assert shown["times"] == pytest.approx([80.0, 1.08817 if method == "cd" else 1.38237], rel=1e-4)
    sampled = distill("sample", "--model", "r", "--num", 3, "--steps", 2, "--out", "s", "--json")
    assert sampled.json["network_evaluations"] == 2
    assert distill("edit", "colorize", "--model", "r", "--input", "s/000000.png", "--times", "index:0,10", "--out", "e").code == 0


def test_a_recipe_of_a_run_says_which_images_it_learned(distill, tmp_path):
    assert distill("cm", "--teacher", "digits", "--steps", 1, "batch_size=2", "sample_every=0", "--out", "r").code == 0
    assert yaml.safe_load((tmp_path / "r/recipe.yaml").read_text())["data"] == "digits"


def test_dmd_without_pairs_says_so(distill):
    run = distill("dmd", "--teacher", "tiny", "--steps", 2, *SMALL)
    assert run.code == 0
    assert "without the regression" in run.err
    assert "student: runs/dmd/student" in run.out


def test_samples_as_npz_do_not_depend_on_batches(distill, tmp_path):
    for out, batch in (("a", 3), ("b", 10)):
        assert (
            distill(
                "sample",
                "--model",
                "tiny",
                "--steps",
                2,
                "--num",
                10,
                "--classes",
                "3,5",
                "--format",
                "npz",
                "--batch-size",
                batch,
                "--out",
                out,
            ).code
            == 0
        )
    one, other = (np.load(tmp_path / out / "samples.npz") for out in "ab")
    assert one["arr_0"].shape == (10, 16, 16, 3)
    assert one["arr_0"].dtype == np.uint8
    assert one["arr_1"].tolist() == [3, 5] * 5
    assert np.abs(one["arr_0"].astype(int) - other["arr_0"]).max() <= 1
    assert not list((tmp_path / "a").glob("part-*"))


def test_a_stopped_sampling_job_makes_what_is_missing(distill, tmp_path):
    distill("sample", "--model", "tiny", "--steps", 2, "--num", 6, "--batch-size", 2, "--out", "s")
    content = (tmp_path / "s/000003.png").read_bytes()
    (tmp_path / "s/000003.png").unlink()
    (tmp_path / "s/samples.jsonl").unlink()
    again = distill("sample", "--model", "tiny", "--steps", 2, "--num", 6, "--batch-size", 2, "--out", "s", "--json")
    assert (again.json["made"], again.json["kept"]) == (2, 4)
    assert (tmp_path / "s/000003.png").read_bytes() == content
    other = distill("sample", "--model", "tiny", "--steps", 3, "--num", 6, "--batch-size", 2, "--out", "s")
    assert other.code == 2
    assert "steps is 2, not 3" in other.err


def test_solvers_and_guidance_change_pictures(distill, tmp_path):
    pictures = set()
    for i, options in enumerate(
        (["--solver", "heun"], ["--solver", "ancestral"], ["--solver", "euler"], ["--guidance-scale", 3], ["--solver", "few-step"])
    ):
        assert distill("sample", "--model", "tiny", "--num", 1, "--steps", 4, "--out", i, *options).code == 0
        pictures.add((tmp_path / str(i) / "000000.png").read_bytes())
    assert len(pictures) == 5


def test_train_on_a_folder_of_images(distill, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.jpg", "dog/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    small = ("network.channels=[8, 16]", "network.attention=[false, false]", "network.groups=4", "network.head=8")
    run = distill("train", "--data", "images", "--resolution", 8, "--steps", 2, "--out", "r", *small, *SMALL)
    assert run.code == 0, run.err
    shown = distill("models", "show", "r", "--json").json
    assert shown["classes"] == ["cat", "dog"]
    assert shown["shape"] == [3, 8, 8]
    for prediction in ("eps", "v"):
        assert distill("train", "prediction=" + prediction, "--steps", 2, "--out", prediction, *small, *SMALL).code == 0
        assert distill("sample", "--model", prediction, "--num", 2, "--steps", 3, "--out", f"s-{prediction}").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says", "hint"),
    [
        (["dmd", "--teacher", "digitz"], 2, "digitz: no model of that name", "did you mean digits?"),
        (["dmd", "--recipe", "demo-dmx"], 2, "demo-dmx: no recipe of that name", "did you mean demo-dmd?"),
        (["dmd", "fake_lrr=1"], 2, "unknown key fake_lrr (did you mean fake_lr?)", "--help-all"),
        (["dmd", "--lr", "-1"], 2, "--lr: input should be greater than 0 (got -1)", ""),
        (["dmd", "--lr", "fast"], 2, "--lr", ""),
        (["dmd", "--lrr", "1"], 2, "--lrr: no such option", "did you mean --lr?"),
        (["dmd", "seed=99999999999999999999"], 2, "seed: input should be less than 9223372036854775808", ""),
        (["dmd2", "--pairs", "x"], 2, "--pairs: no such option", "dmd2 needs none: init_pairs=DIR init_steps=N begins a one-step"),
        (["dmd2", "pairs=x"], 2, "unknown key pairs (dmd2 needs none: init_pairs=DIR", ""),
        (["dmd", "--student-steps", "4"], 2, "--student-steps: no such option", "distill dmd2: students of several steps"),
        (["dmd", "network.x=3"], 2, "unknown key network.x (known: accumulate", ""),
        (["dmd", "betas=[0.9, 1.0]"], 2, "betas: input should be less than 1", ""),
        (["train", "network.channels=[16, 16, 16]"], 2, "network: channels 16 with attention is not a multiple of head 32", ""),
        (["train", "network.channels=[32, 32, 32, 32, 32, 32]", "network.attention=[0, 0, 0, 0, 0, 0]"], 2, "need a multiple of 32", ""),
        (["sample", "--model", "tiny", "--precision", "fp16"], 2, "--precision fp16: needs a GPU", "bf16"),
        (["sample", "--model", "x" * 300], 1, "file name too long", ""),
        (["cm", "--method", "ct"], 2, "method ct learns from real images, and none are given", "--data FOLDER"),
        (["cm", "--teacher", "tiny"], 2, "method cd learns from real images", "--data digits"),
        (["cm", "--method", "cx"], 2, "--method: input should be 'cd', 'ct', 'ict', 'ect' or 'lcm'", ""),
        (["cm", "--method", "ect", "scales=3"], 2, "scales: not a key of method ect", ""),
        (["cm", "--teacher", "tiny", "--data", "digits", "times=sigma:4,80", "--dry-run"], 2, "times sigma:4,80: noise levels must", ""),
        (["sample", "--model", "tiny", "--times", "index:0,22"], 2, "--times index:0,22: for consistency students", ""),
        (["dmx"], 2, "dmx: no such command", "did you mean dmd?"),
        (["dmd", "lr=1e-4", "--lr", "1e-4"], 2, "lr: given twice, as --lr and as lr=", ""),
        (["pairs", "--num", "0", "--teacher", "tiny"], 2, "--num: input should be greater than 0 (got 0)", ""),
        (["dmd", "--teacher", "tiny", "--pairs", "nowhere"], 2, "--pairs nowhere: no pairs", "distill pairs"),
        (["dmd", "--resume", "nowhere"], 2, "--resume nowhere: no run", ""),
        (["sample", "--model", "tiny", "--classes", "11"], 2, "--classes: no class 11", "0 to 9"),
        (["sample", "--model", "tiny", "--device", "cuda"], 2, "--device cuda", "distill env"),
        (["train", "--data", "nowhere"], 2, "--data nowhere", "digits"),
        (["train", "--data", "."], 2, "a folder needs resolution", ""),
        (["train", "--data", ".", "--resolution", "8"], 1, "no images in it", ".png"),
        (["pairs", "--check", "nowhere"], 2, "nowhere: no pairs", ""),
        (["recipes", "show", "nothing"], 2, "nothing: no recipe", ""),
        (["models", "show", "no/where"], 1, "no/where: not in the Hugging Face cache", "hf download no/where"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, code, says, hint, distill):
    result = distill(*arguments)
    assert result.code == code, result.err
    lines = result.err.splitlines()
    errors = [k for k, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0] <= 1  # below what was read
    assert len(lines) - errors[0] <= 2
    assert says in lines[errors[0]]
    assert hint in result.err
    assert result.out == ""


def test_an_existing_run_is_not_overwritten(distill, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/precious").write_text("")
    result = distill("dmd", "--teacher", "tiny", "--steps", 1, "--out", "r")
    assert result.code == 2
    assert "--out r: exists already" in result.err
    assert os.listdir(tmp_path / "r") == ["precious"]


def test_a_truncated_shard_stops_dmd_before_it_begins(distill, tmp_path):
    distill("pairs", "--teacher", "tiny", "--num", 8, "--steps", 2, "--out", "p")
    shard = tmp_path / "p/shard-000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    for command in (
        ["pairs", "--check", "p"],
        ["dmd", "--teacher", "tiny", "--pairs", "p", "--steps", 1, "--out", "r"],
        ["pairs", "--teacher", "tiny", "--num", 8, "--steps", 2, "--out", "p"],
    ):
        result = distill(*command)
        assert result.code == 1
        assert "shard-000000.safetensors: corrupt" in result.err
    assert not (tmp_path / "r").exists()


def test_dry_run_prints_a_recipe_and_makes_nothing(distill, tmp_path):
    result = distill("dmd", "--teacher", "tiny", "--dry-run", "--steps", 7)
    plan = yaml.safe_load(result.out)
    assert plan["steps"] == 7
    assert plan["command"] == "dmd"
    assert "#   images: 224" in result.out
    assert os.listdir(tmp_path) == []
    pairs = distill("pairs", "--teacher", "tiny", "--dry-run", "--num", 100, "--steps", 5)
    assert "#   network evaluations: 900 (9 an image)" in pairs.out
    assert "#   disk: 0.2 MB" in pairs.out
    assert "images: 3" in distill("sample", "--model", "tiny", "--num", 3, "--dry-run").out


def test_a_run_resumes_from_any_folder(distill, tmp_path, monkeypatch):
    distill("pairs", "--teacher", "tiny", "--num", 8, "--steps", 2, "--out", "p")
    assert distill("dmd", "--teacher", "tiny", "--pairs", "p", "--steps", 1, "--out", "r", "precision=no", *SMALL).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert distill("dmd", "--resume", "../r", "--steps", 2).code == 0
    assert distill("dmd", "--recipe", "../r/recipe.yaml", "--steps", 1, "--out", "again").code == 0


def test_resume_takes_nothing_else(distill):
    distill("dmd", "--teacher", "tiny", "--steps", 1, "--out", "r", *SMALL)
    wrong = distill("dmd", "--resume", "r", "--lr", "1e-3")
    assert wrong.code == 2
    assert "--lr: not with --resume" in wrong.err
    more = distill("dmd", "--resume", "r", "--steps", 3, "--json")
    assert more.code == 0
    assert more.json["steps"] == 3


def test_env_explains_a_torch_that_does_not_fit(distill, monkeypatch):
    from distill_cli.cli import env

    said = env.torchvision_trouble("2.13.0+cpu", "operator torchvision::nms does not exist")
    assert "torch 2.13.0+cpu is the CPU build" in said
    assert env.torchvision_trouble("2.13.0", "something else") == ""
    fine = distill("env", "--json")
    assert fine.code == 0, fine.err
    assert fine.json["versions"]["torch"]
    monkeypatch.setattr(env, "gather", lambda: {"versions": {}, "platform": "", "devices": [], "trouble": [said]})
    wrong = distill("env")
    assert wrong.code == 1
    assert "pip install" in wrong.err


def test_any_command_explains_a_torch_that_does_not_fit(distill, monkeypatch):
    import torch

    from distill_cli.models.sources import registry

    def broken():
        raise RuntimeError("Failed to import diffusers.models because of: operator torchvision::nms does not exist")

    monkeypatch.setitem(registry.REGISTRY, "tiny", registry.Entry("", "", broken))
    result = distill("sample", "--model", "tiny")
    assert result.code == 1
    assert f"torch {torch.__version__}" in result.err.replace("torch is", "torch")
    assert "torchvision was built for another torch" in result.err


def test_a_bug_of_ours_is_said_in_one_line(distill, monkeypatch):
    from distill_cli import recipes

    monkeypatch.setattr(recipes, "names", lambda: 1 / 0)
    result = distill("recipes", "ls")
    assert result.code == 3
    assert "ZeroDivisionError" in result.err
    assert "DISTILL_DEBUG=1" in result.err


def test_version_and_lists(distill):
    assert distill("--version").out.startswith("distill 0.")
    assert set(distill("models", "ls", "--json").json) >= {"digits", "tiny"}
    assert distill("recipes", "ls", "--json").json["demo-dmd"]["command"] == "dmd"
    assert distill("recipes", "cp", "demo-dmd").out == "demo-dmd.yaml\n"
    assert distill("recipes", "check", "demo-dmd.yaml", "demo-pairs").code == 0
    shown = distill("models", "show", "tiny").out
    assert "null_label        10" in shown
    assert distill("--help").code == 0
    for nothing in ([], ["recipes"]):
        alone = distill(*nothing)
        assert alone.code == 2
        assert alone.err.startswith("Usage: distill")


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path):
    """A real signal to a real process."""
    command = [
        sys.executable,
        "-m",
        "distill_cli",
        "dmd",
        "--teacher",
        "tiny",
        "--steps",
        "100000",
        "--out",
        "r",
        "batch_size=2",
        "log_every=1",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "r/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "resume with --resume r" in err
    step = int(next((tmp_path / "r/checkpoints").iterdir()).name.removeprefix("step-"))
    assert len(metrics.read_text().splitlines()) == step

"""Every bad input that a user meets on the main job: one clear line, the right exit code, nothing lost."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from distill_cli.files import sealed, unsealed
from distill_cli.runs import redacted
from distill_cli.training import checkpoint

DMD = ("dmd", "--teacher", "tiny", "batch_size=4", "log_every=2", "save_every=2", "sample_every=0", "warmup_steps=0")


def one_line(result, code, *says):
    """The command ended with `code`, one line of error that says all of `says`, and at most a hint."""
    lines = result.err.splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert result.code == code, result.err
    assert len(errors) == 1
    assert len(lines) - errors[0] <= 2
    for text in says:
        assert text in result.err
    assert result.out == ""


@pytest.fixture
def pairs(distill):
    assert distill("pairs", "--teacher", "tiny", "--num", 12, "--steps", 2, "--shard-size", 4, "--out", "p").code == 0
    return "p"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: many", "steps: input should be a valid integer"),
        ("betas: [0.9]", "betas"),
        ("betas: 0.9", "betas"),
        ("pairs: [a, b]", "pairs"),
        ("teacher: 3", "teacher: input should be a valid string"),
        ("lr: -1", "lr: input should be greater than 0"),
        ("regression_loss: l3", "regression_loss: input should be 'l2', 'huber' or 'lpips'"),
        ("lpips_weights: x.pth", "lpips_weights is for regression_loss lpips alone"),
        ("fake_score: perhaps", "fake_score: input should be a valid boolean"),
        ("classes: [a]", "classes"),
    ],
)
def test_wrong_types_and_shapes_in_recipes(text, says, distill, tmp_path):
    (tmp_path / "r.yaml").write_text(f"command: dmd\n{text}\n")
    one_line(distill("dmd", "--recipe", "r.yaml", "--out", "o"), 2, says)
    assert not (tmp_path / "o").exists()


def test_keys_that_a_prediction_does_not_use(distill):
    one_line(distill("train", "beta_schedule=scaled_linear", "--out", "o"), 2, "beta_schedule is not used with prediction edm")
    one_line(distill("train", "prediction=v", "p_std=1", "--out", "o"), 2, "p_std is not used with prediction v")


def test_image_folders(distill, tmp_path):
    (tmp_path / "empty").mkdir()
    one_line(distill("train", "--data", "empty", "--resolution", 8), 1, "empty: no images in it", ".png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"no image at all")
    network = ["network.channels=[16]", "network.attention=[0]", "network.groups=4", "network.head=8"]
    result = distill("train", "--data", "bad", "--resolution", 8, "--out", "r", *network, "batch_size=1")
    one_line(result, 1, "bad/a.png: not a readable image", "remove or replace the file")


def test_shards_flipped_and_missing(distill, tmp_path, pairs):
    shard = tmp_path / "p/shard-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    one_line(
        distill(*DMD, "--pairs", "p", "--out", "r"), 1, "shard-000001.safetensors: corrupt: its checksum", "delete it and run distill pairs"
    )
    assert not (tmp_path / "r").exists()
    shard.unlink()
    one_line(distill(*DMD, "--pairs", "p", "--out", "r"), 1, "shard-000001.safetensors: missing (1 of 3", "only missing shards are made")
    again = distill("pairs", "--teacher", "tiny", "--num", 12, "--steps", 2, "--shard-size", 4, "--out", "p", "--json")
    assert again.json["made"] == 1
    assert distill(*DMD, "--pairs", "p", "--steps", 1, "--out", "r").code == 0


def test_pairs_of_another_teacher_or_resolution(distill, tmp_path, pairs):
    one_line(distill("dmd", "--teacher", "digits", "--pairs", "p", "--out", "r"), 2, "--pairs p: made by another teacher (tiny)")
    manifest = tmp_path / "p/manifest.json"
    manifest.write_text(sealed(unsealed(manifest.read_bytes()) | {"shape": [3, 32, 32]}))
    result = distill(*DMD, "--pairs", "p", "--out", "r")
    assert result.code in (1, 2)
    assert "Traceback" not in result.err
    assert not (tmp_path / "r").exists()


def test_resuming_with_changed_settings(distill, tmp_path, pairs):
    assert distill(*DMD, "--pairs", "p", "--steps", 2, "--out", "r").code == 0
    before = (tmp_path / "r/recipe.yaml").read_text()
    one_line(distill("dmd", "--resume", "r", "--lr", "1e-3"), 2, "--lr: not with --resume")
    one_line(distill("dmd", "--resume", "r", "lr=1e-3"), 2, "lr=1e-3: not with --resume")
    result = distill("pairs", "--teacher", "tiny", "--num", 12, "--steps", 3, "--shard-size", 4, "--out", "p")
    one_line(result, 2, "made with other settings: steps is 2, not 3")
    assert (tmp_path / "r/recipe.yaml").read_text() == before


def test_a_student_of_some_classes_draws_no_others(distill, tmp_path):
    assert distill(*DMD, "--steps", 1, "classes=[1,2]", "--out", "r").code == 0
    assert distill("sample", "--model", "r", "--num", 3, "--out", "s").code == 0
    assert [json.loads(line)["label"] for line in (tmp_path / "s/samples.jsonl").read_text().splitlines()] == [1, 2, 1]
    one_line(distill("sample", "--model", "r", "classes=[0]", "--out", "t"), 2, "no class 0", "the model has learned 1, 2")


def test_folders_that_are_no_model(distill, tmp_path):
    """A misspelt run is not looked for on the hub; a run of another command says so."""
    (tmp_path / "runs/dmd").mkdir(parents=True)
    for wanted in ((), ("--dry-run",)):
        one_line(distill("sample", "--model", "runs/dmdd", *wanted), 2, "runs/dmdd: no such folder", "did you mean dmd?")
    (tmp_path / "runs/v/vae").mkdir(parents=True)
    (tmp_path / "runs/v/recipe.yaml").write_text("command: vae\n")
    one_line(distill("sample", "--model", "runs/v"), 1, "a run of `distill vae`", "what it has trained is in runs/v/vae")


def test_pictures_that_are_no_numbers_are_not_written(distill, tmp_path, monkeypatch):
    from distill_cli.models.model import Model

    original = Model.sample

    def overflown(self, draws, *rest):
        images = original(self, draws, *rest)
        return images * float("inf") if draws.indices[0] else images

    monkeypatch.setattr(Model, "sample", overflown)
    job = ("sample", "--model", "tiny", "--num", 6, "--steps", 1, "batch_size=2", "--out", "s")
    one_line(distill(*job), 1, "not finite numbers", "--precision bf16 or no")
    assert len(list((tmp_path / "s").glob("*.png"))) <= 2
    monkeypatch.setattr(Model, "sample", original)
    assert distill(*job).code == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()])
def test_full_memory_is_no_bug(error, distill, monkeypatch):
    from distill_cli.models.model import Model

    def full(*_):
        raise error

    monkeypatch.setattr(Model, "sample", full)
    one_line(distill("sample", "--model", "tiny", "--num", 2, "--steps", 1, "--out", "s"), 1, "error: out of memory", "batch_size")
    assert "()" not in distill("sample", "--model", "tiny", "--num", 2, "--steps", 1, "--out", "s").err


def test_nan_says_at_which_step_and_keeps_the_last_good_checkpoint(distill, tmp_path, monkeypatch):
    from distill_cli.methods.dmd.objective import DMD as Objective

    original = Objective.generate

    def poisoned(self, noise, labels):
        images = original(self, noise, labels)
        poisoned.calls += 1
        return images * float("nan") if poisoned.calls == 4 else images

    poisoned.calls = 0
    monkeypatch.setattr(Objective, "generate", poisoned)
    result = distill(*DMD, "--steps", 9, "--out", "r")
    one_line(
        result, 1, "student_loss is not a number at step 4", "the checkpoint of step 2 is good: lower lr in r/recipe.yaml, then --resume r"
    )
    assert checkpoint.steps(tmp_path / "r/checkpoints") == [2]
    monkeypatch.setattr(Objective, "generate", original)
    assert distill("dmd", "--resume", "r").code == 0


@pytest.mark.parametrize("where", ["pairs", "checkpoints", "samples"])
def test_no_space_left(where, distill, tmp_path, monkeypatch, pairs):
    """The device is full when this is written: one line, and what was complete stays."""
    import distill_cli.files as files

    original = files._sync

    def full(path):
        if path.suffix in (".safetensors", ".pt", ".png", ".npz"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path)

    assert distill(*DMD, "--pairs", "p", "--steps", 2, "--out", "r").code == 0
    monkeypatch.setattr(files, "_sync", full)
    commands = {
        "pairs": ("pairs", "--teacher", "tiny", "--num", 8, "--steps", 2, "--out", "q"),
        "checkpoints": ("dmd", "--resume", "r", "--steps", 4),
        "samples": ("sample", "--model", "r", "--num", 3, "--out", "s"),
    }
    result = distill(*commands[where])
    one_line(result, 1, "no space left on device", "free some space and start again: finished files are kept")
    monkeypatch.setattr(files, "_sync", original)
    assert checkpoint.steps(tmp_path / "r/checkpoints") == [2]
    assert not list(tmp_path.rglob("*.tmp*"))
    assert distill(*commands[where]).code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a small file system of its own")
def test_a_device_that_is_really_full(tmp_path):
    """Pairs on a file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        command = [sys.executable, "-m", "distill_cli", "pairs", "--teacher", "tiny", "--num", "900", "--solver", "euler", "--steps", "1"]
        done = subprocess.run([*command, "--shard-size", "300", "--out", folder / "p"], capture_output=True, text=True)
        assert done.returncode == 1
        assert "no space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(p.name for p in (folder / "p").iterdir()) == ["manifest.json", "shard-000000.safetensors", "shard-000001.safetensors"]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_folder(distill, tmp_path, monkeypatch):
    import distill_cli.files as files

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "there/x")

    monkeypatch.setattr(files.Path, "mkdir", lambda self, *a, **k: refuse())
    for command in (
        ("pairs", "--teacher", "tiny", "--num", 2, "--steps", 1),
        ("sample", "--model", "tiny", "--steps", 1, "--num", 2),
        (*DMD, "--steps", 1),
    ):
        one_line(distill(*command, "--out", "there"), 1, "read-only file system", "choose a folder that you may write to")


def test_evaluation_of_too_few_images(distill, tmp_path):
    np.savez(tmp_path / "few.npz", arr_0=torch.randint(0, 256, (30, 16, 16, 3), dtype=torch.uint8).numpy())
    result = distill("evaluate", "--model", "few.npz", "--out", "e")
    assert result.code == 0
    assert "warning: few.npz: 30 images for 64 features, their covariance is singular: real images in that number get" in result.err
    Image.open(tmp_path / "e/picture.png").verify()


def test_no_secret_gets_into_a_run(distill, tmp_path, monkeypatch):
    """Not the environment's, not one that is typed."""
    secrets = {"HF_TOKEN": "hf_AbCdEfGhIjKlMnOp", "WANDB_API_KEY": "0123456789abcdef0123", "MY_PASSWORD": "correct horse"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    typed = "hf_ZyXwVuTsRqPoNmLk"
    monkeypatch.setattr(
        sys, "argv", ["distill", "dmd", "--out", "r", f"x={typed}", f"y={secrets['MY_PASSWORD']}", "https://me:pass@host/x"]
    )
    result = distill(*DMD, "--steps", 1, "--out", "r")
    assert result.code == 0
    content = b"".join(path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file())
    content += (result.out + result.err).encode()
    for secret in (*secrets.values(), typed, "me:pass"):
        assert secret.encode() not in content
    assert b"x=***" in content
    assert redacted("runs/task-digits-dmd mask-digits-0001") == "runs/task-digits-dmd mask-digits-0001"
    assert b"https://***@host/x" in content

"""Runs and stores that were damaged, moved, edited or stopped at odd moments: what is whole is kept, and what is said is true."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from distill_cli import locks, processes
from distill_cli.errors import DistillError
from distill_cli.runs import Run
from distill_cli.training import checkpoint
from tests.cli.test_bad_input import one_line

SMALL = ("network.channels=[8,16]", "network.attention=[false,false]", "network.groups=4", "network.head=8", "sample_every=0")
TRAIN = ("train", "--data", "digits", "batch_size=2", "log_every=1", "save_every=2", *SMALL)
PAIRS = ("pairs", "--teacher", "tiny", "--num", 12, "--steps", 2, "--shard-size", 4, "--out", "p")


def test_a_store_outlives_its_manifest(distill, tmp_path):
    """Every shard says to which manifest it belongs: a new one is written beside them, and those of another are refused."""
    assert distill(*PAIRS).code == 0
    manifest = tmp_path / "p/manifest.json"
    before, shards = manifest.read_bytes(), {path: path.read_bytes() for path in (tmp_path / "p").glob("shard-*")}
    manifest.write_bytes(before + b"x")
    result = distill(*PAIRS)
    assert (result.code, "delete it and run the same command: what is complete is kept" in result.err) == (1, True)
    assert "shards that are complete are kept" in distill("dmd", "--teacher", "tiny", "--pairs", "p", "--out", "r").err
    manifest.unlink()
    again = distill(*PAIRS, "--json")
    assert (again.code, again.json["kept"], again.json["made"]) == (0, 3, 0)
    assert manifest.read_bytes() == before
    assert {path: path.read_bytes() for path in shards} == shards
    manifest.unlink()
    one_line(distill(*PAIRS, "seed=5"), 1, "belongs to another store")
    manifest.unlink()
    (tmp_path / "p/notes.txt").write_text("")
    one_line(distill(*PAIRS), 2, "not empty, and not a folder of pairs")


def test_pictures_whose_settings_are_damaged_are_not_to_be_deleted(distill, tmp_path):
    job = ("sample", "--model", "tiny", "--num", 2, "--steps", 1, "--out", "s")
    assert distill(*job).code == 0
    with open(tmp_path / "s/sampling.json", "a") as file:
        file.write("x")
    result = distill(*job)
    assert (result.code, "delete" in result.err) == (1, False)


def edit(run, **values):
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


@pytest.mark.parametrize(
    ("command", "key", "value"),
    [
        ((*TRAIN, "--steps", 2), "p_mean", -0.5),
        ((*TRAIN, "--steps", 2), "seed", 4),
        (("dmd", "--teacher", "tiny", "classes=0-3", "batch_size=2", "warmup_steps=0", "sample_every=0", "--steps", 2), "classes", [5, 6]),
    ],
)
def test_a_recipe_that_trains_something_else_is_refused(distill, tmp_path, command, key, value):
    assert distill(*command, "--out", "r").code == 0
    edit(tmp_path / "r", **{key: value})
    result = distill(command[0], "--resume", "r", "--steps", 3)
    assert (result.code, key in result.err, "begun with" in result.err) == (2, True, True)
    shutil.rmtree(tmp_path / "r")
    assert distill(*command, "--out", "r").code == 0
    edit(tmp_path / "r", lr=1e-5, log_every=2)  # which hints tell to change
    assert distill(command[0], "--resume", "r", "--steps", 3).code == 0
    assert "recipe" in json.loads((tmp_path / "r/begun.json").read_text())


def test_another_resolution_is_refused(distill, tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for k in range(3):
        Image.new("RGB", (16, 16), (k, 0, 0)).save(tmp_path / f"photos/{k}.png")
    options = ("train", "--data", "photos", "--resolution", 8, "batch_size=2", *SMALL)
    assert distill(*options, "--steps", 1, "--out", "r").code == 0
    edit(tmp_path / "r", resolution=16)
    result = distill("train", "--resume", "r", "--steps", 2)
    assert (result.code, "16" in result.err) == (2, True)


def test_what_is_no_checkpoint(distill, tmp_path):
    assert distill(*TRAIN, "--steps", 2, "--out", "r").code == 0
    folder = tmp_path / "r/checkpoints"
    (folder / "step-9").mkdir()  # never written so
    assert checkpoint.steps(folder) == [2]
    os.symlink("/nowhere", folder / "step-000004")
    result = distill("train", "--resume", "r", "--steps", 6)
    assert (result.code, "step-000004: a link that leads nowhere" in result.err) == (1, True)
    (folder / "step-000004").unlink()
    (folder / "step-000004").write_text("")
    assert "step-000004: no folder" in distill("train", "--resume", "r", "--steps", 6).err


def test_the_advice_about_a_corrupt_checkpoint_says_what_follows(distill, tmp_path):
    assert distill(*TRAIN, "--steps", 4, "--out", "r").code == 0
    weights = tmp_path / "r/checkpoints/step-000004/teacher.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "to resume from step 2" in distill("train", "--resume", "r", "--steps", 6).err
    shutil.rmtree(tmp_path / "r/checkpoints/step-000002")
    assert "to begin anew: there is no older checkpoint" in distill("train", "--resume", "r", "--steps", 6).err
    shutil.rmtree(tmp_path / "r/checkpoints/step-000004")
    result = distill("train", "--resume", "r", "--steps", 6)
    assert (result.code, "r: no checkpoint: begins at step 0" in result.err) == (0, True)


def test_a_file_that_may_not_be_read_gets_no_advice_on_writing(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.metrics.write_text('{"step": 1}\n')

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(DistillError, match="permission denied") as error:
        run.forget_after(0)
    assert error.value.hint == ""


def test_a_last_line_without_its_end_is_kept(tmp_path, capsys):
    run = Run(tmp_path)
    run.metrics.write_text('{"step": 1}\n{"step": 2}')
    run.forget_after(2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    run.metrics.write_text('{"step": 1}\n{"step": 2, "lo')
    run.forget_after(2)
    assert run.metrics.read_text() == '{"step": 1}\n'


def test_exit_codes_take_no_bytes(tmp_path, monkeypatch):
    """A full temporary folder has names left."""
    monkeypatch.setenv(processes.TOGETHER, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.leave(143)
    assert processes._codes(str(tmp_path)) == {1: 143}
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]


def test_a_lease_that_is_anothers_by_now(tmp_path, monkeypatch):
    """A process that slept longer than a lease lasts stops; one of an earlier container with this one's number counts for nothing."""
    monkeypatch.setattr(locks, "RENEWED", 0.01)
    heard = []
    old = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        lock = locks.Lock(tmp_path / "lock")
        lock.lease.write_text(lock.text)  # as of a container that had this process's number
        assert lock._lease() == ""
        lock.lease.write_text(json.dumps({"host": "another", "process": 7, "since": 0.0}))
        for _ in range(500):
            if heard:
                break
            signal.sigtimedwait([], 0.01)
    finally:
        signal.signal(signal.SIGTERM, old)
        lock.release()
    assert heard
    assert json.loads(lock.lease.read_text())["host"] == "another"

"""Disks that refuse: files that may not be read, folders that cannot be synced, names that are too long, no space left."""

import errno
import hashlib
import os
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

from distill_cli import files, runs, shards
from distill_cli.errors import DistillError
from distill_cli.files import sealed, unsealed
from distill_cli.models.formats import save
from distill_cli.training import checkpoint
from tests.cli.test_bad_input import one_line

NETWORK = ["network.channels=[8,16]", "network.attention=[false,false]", "network.groups=4", "network.head=8"]
REFUSALS = {
    errno.EACCES: "permission denied",
    errno.EIO: "input/output error",
    errno.ESTALE: "stale file handle",
    errno.EMFILE: "too many open files",
    errno.ENOTDIR: "not a directory",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One store, one folder of samples, one run, made once."""
    from distill_cli.cli.app import run

    old, folder = os.getcwd(), tmp_path_factory.mktemp("made")
    os.chdir(folder)
    try:
        assert run(["pairs", "--teacher", "tiny", "--num", "8", "--steps", "2", "--shard-size", "4", "--out", "p"]) == 0
        assert run(["sample", "--model", "tiny", "--num", "2", "--steps", "2", "--out", "s"]) == 0
        assert run(["train", "--steps", "2", "batch_size=2", "save_every=1", "sample_every=0", *NETWORK, "--out", "r"]) == 0
    finally:
        os.chdir(old)
    return folder


COMMANDS = {
    "p/manifest.json": ("pairs", "--check", "p"),
    "p/shard-000001.safetensors": ("pairs", "--check", "p"),
    "s/sampling.json": ("sample", "--model", "tiny", "--num", "2", "--steps", "2", "--out", "s"),
    "r/checkpoints/step-000002/state.json": ("train", "--resume", "r", "--steps", 3),
    "r/checkpoints/step-000002/teacher.safetensors": ("train", "--resume", "r", "--steps", 3),
    "r/checkpoints/step-000002/optimizers.pt": ("train", "--resume", "r", "--steps", 3),
}


def refused(result, *says):
    """The error is what the system said: no word of damage, no advice to delete."""
    assert result.code == 1, result.err
    lines = [line for line in result.err.splitlines() if line.startswith(("error: ", "hint: "))]
    for text in says:
        assert text in "\n".join(lines)
    for word in ("corrupt", "damage", "delet", "truncated", "missing"):
        assert word not in "\n".join(lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_unreadable_is_not_corrupt(name, made, distill, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    refused(distill(*COMMANDS[name]), f"{name}: a symbolic link, which may lead anywhere", "cp -rL")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused(distill(*COMMANDS[name]), f"{name}: is a directory")
    (tmp_path / name).rmdir()
    shutil.copy(tmp_path / "elsewhere", tmp_path / name)
    original = os.open
    for number, says in REFUSALS.items():

        def refuse(path, *rest, number=number, **options):
            if str(path).endswith(name):
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *rest, **options)

        monkeypatch.setattr(os, "open", refuse)
        refused(distill(*COMMANDS[name]), f"{name}: {says}")
        monkeypatch.setattr(os, "open", original)


def test_a_read_that_fails_midway_is_no_damage(made, tmp_path, monkeypatch):
    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdopen", lambda handle, *_: (os.close(handle), Broken())[1])
    for call in (
        lambda: files.read_plain(made / "p/manifest.json"),
        lambda: shards.check(made / "p/shard-000000.safetensors", "delete it"),
        lambda: runs.settle(made / "s/sampling.json", {}, "samples"),
    ):
        with pytest.raises(DistillError, match="input/output error") as error:
            call()
        assert error.value.hint == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", COMMANDS)
def test_no_permission(name, made, distill, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).chmod(0)
    refused(distill(*COMMANDS[name]), f"{name}: permission denied")


def test_checkpoints_that_may_not_be_listed_are_not_none(made, distill, tmp_path, monkeypatch):
    """Else the run would begin anew, over what it has."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)

    original = Path.iterdir

    def refuse(path):
        if path.name == "checkpoints":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    before = (tmp_path / "r/metrics.jsonl").read_bytes()
    refused(distill("train", "--resume", "r", "--steps", 3), "r/checkpoints: permission denied")
    assert (tmp_path / "r/metrics.jsonl").read_bytes() == before


def test_a_file_that_a_checkpoint_lacks_is_missing(made, distill, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for name in ("teacher.safetensors", "state.json"):
        (tmp_path / "r/checkpoints/step-000002" / name).unlink()
        found = distill("train", "--resume", "r", "--steps", 3)
        one_line(found, 1, f"{name}: missing", "or move r/checkpoints/step-000002 away")
        assert "delete" not in found.err


def test_a_manifest_of_another_version_is_not_corrupt(made, distill, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "p/manifest.json"
    path.write_text(sealed(unsealed(path.read_bytes()) | {"later": 1}))
    refused(distill("pairs", "--check", "p"), "manifest.json: later: extra inputs are not permitted", "of another version?")
    path.write_text(path.read_text().replace('"later": 1', '"later": 2'))
    assert "corrupt: its checksum does not match" in distill("pairs", "--check", "p").err


def test_prompts_that_may_not_be_read(tmp_path, monkeypatch):
    from distill_cli.pairs.store import PairStore, keep_prompts

    class Manifest:
        prompts = hashlib.sha256(b"a\nb\n").hexdigest()

    keep_prompts(tmp_path, ["a", "b"])
    assert list(PairStore.prompts_in(tmp_path, Manifest)) == ["a", "b"]
    (tmp_path / "prompts.jsonl").rename(tmp_path / "x")
    (tmp_path / "prompts.jsonl").symlink_to("x")
    with pytest.raises(DistillError, match=r"prompts.jsonl: a symbolic link, which"):
        PairStore.prompts_in(tmp_path, Manifest)
    (tmp_path / "prompts.jsonl").unlink()
    with pytest.raises(DistillError, match=r"prompts.jsonl: missing"):
        PairStore.prompts_in(tmp_path, Manifest)


def test_pictures_and_classifiers_that_may_not_be_read(tmp_path, monkeypatch):
    import builtins

    from distill_cli.data.opened import open_picture
    from distill_cli.models.classifier import Classifier, ClassifierInfo, load

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Classifier(ClassifierInfo((3, 8, 8), ("a", "b"), 8, "x")).save(tmp_path / "c")
    original = builtins.open

    def refuse(path, *rest, **options):
        if str(path).endswith((".png", "model.safetensors")):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path, *rest, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr("io.open", refuse)
    for call, name in ((lambda: open_picture(tmp_path / "a.png"), "a.png"), (lambda: load(str(tmp_path / "c")), "model.safetensors")):
        with pytest.raises(DistillError, match=f"{name}: input/output error$") as error:
            call()
        assert error.value.hint == ""


@pytest.mark.parametrize("number", ["EINVAL", "ENOTSUP", "EBADF", "ENOSYS", "EACCES", "EPERM", "EISDIR"])
def test_folders_that_cannot_be_synced(number, tmp_path, monkeypatch):
    code, original = getattr(errno, number), os.fsync

    def refuse(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        original(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_atomic(tmp_path / "a/b", "whole")
    for text in "12":
        with files.folder_atomic(tmp_path / "f") as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner/x").write_text(text)
    files.sync(tmp_path / "a/b")
    assert (tmp_path / "a/b").read_text() == "whole"
    assert (tmp_path / "f/inner/x").read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == ["a", "f"]


@pytest.mark.parametrize(("number", "goes_on"), [("EINVAL", True), ("ENOTSUP", True), ("EIO", False), ("ENOSPC", False), ("EBADF", False)])
def test_files_that_cannot_be_synced(number, goes_on, tmp_path, monkeypatch):
    """A mount that knows no fsync goes on; a disk that has failed to write does not."""
    code = getattr(errno, number)

    def refuse(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    if goes_on:
        files.write_atomic(tmp_path / "a", "whole")
        assert (tmp_path / "a").read_text() == "whole"
    else:
        with pytest.raises(DistillError, match=os.strerror(code).lower()):
            files.write_atomic(tmp_path / "a", "whole")
        assert os.listdir(tmp_path) == []


def test_names_are_bounded_by_bytes():
    assert files.bounded("a" * 255) == "a" * 255
    long, other = (files.bounded("ä" * 200 + end) for end in "xy")
    assert long != other
    assert long.startswith("ä" * 120)
    for name in (long, other, files.bounded("猫" * 300), files.bounded("x" + "😀" * 100), files.bounded("\udcff" * 300)):
        assert len(os.fsencode(name)) <= 255
        name.encode()


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "猫" * 85])
def test_a_long_name_is_written_and_its_leftovers_are_removed(name, tmp_path, monkeypatch):
    files.write_atomic(tmp_path / name, "1")
    assert os.listdir(tmp_path) == [name]
    with files.folder_atomic(tmp_path / "f" / name) as temporary:
        (temporary / "x").write_text("")
    with files.folder_atomic(tmp_path / "f" / name) as temporary:  # in the place of the older one
        (temporary / "y").write_text("")
    assert os.listdir(tmp_path / "f" / name) == ["y"]
    left = files._temporary(tmp_path / name)
    left.write_text("")
    files.remove_temporaries(tmp_path)
    assert left.exists()  # its process lives
    monkeypatch.setattr(files, "lives", lambda process: process != str(os.getpid()))
    files.remove_temporaries(tmp_path)
    assert not left.exists()
    assert socket.gethostname()[:64] in left.name


def test_folders_of_samples_are_named_as_ever_and_never_too_long(tmp_path):
    from distill_cli.evaluate.report import samples_of

    assert samples_of(Path("e"), 0, "runs/a b@2") == Path("e/samples/0-runs_a_b@2")
    deep = "/".join([f"experiment-with-a-long-name-{k:02d}" for k in range(9)])
    first, second = samples_of(tmp_path, 0, f"{deep}/x"), samples_of(tmp_path, 0, f"{deep}/y")
    assert first != second
    for folder in (first, second):
        folder.mkdir(parents=True)
        files.write_atomic(folder / "samples.npz", "")


def test_edited_pictures_are_named_as_ever_and_never_too_long(tmp_path):
    from distill_cli.edit.job import names_of

    assert names_of([Path("in/a.png"), Path("in/b.c.jpg")]) == ["0000-a", "0001-b.c"]
    names = names_of([Path("in") / f"{'ä' * 125}{end}.png" for end in "ab"])
    assert len(set(names)) == 2
    for name in names:
        files.write_atomic(tmp_path / f"{name}.png", "x")


@pytest.mark.parametrize(
    "words", ["I/O error: No space left on device (os error 28)", 'IoError(Os { code: 28, kind: StorageFull, message: "No" })']
)
def test_a_full_disk_in_the_words_of_other_libraries(words, tmp_path, monkeypatch):
    """tokenizers and safetensors say by a text alone that a disk is full; a student and an autoencoder are saved."""
    from safetensors import SafetensorError

    from distill_cli.models import load
    from distill_cli.models.autoencoder import Autoencoder

    model = load("tiny-sd")

    def said(tokenizer, folder):
        (folder.parent / "half").write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: {words}")

    def full(path, *content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("distill_cli.models.formats.folder.save_tokenizer", said)
    with pytest.raises(DistillError, match="no space left on device") as error:
        save(model, tmp_path / "m")
    assert "free some space" in error.value.hint
    monkeypatch.setattr("distill_cli.tensors.write", full)
    with pytest.raises(DistillError, match="no space left on device") as error:
        Autoencoder(model.codec.vae).save(tmp_path / "v")
    assert "free some space" in error.value.hint
    assert os.listdir(tmp_path) == []
    with pytest.raises(SafetensorError), files.os_errors(tmp_path):
        raise SafetensorError("header too large")


def test_metrics_outlive_a_power_cut_before_the_checkpoint(tmp_path, distill, monkeypatch):
    """What was synced, in its order: the metrics, then the checkpoint's files."""
    synced, original = [], files._sync

    def note(path):
        synced.append(path.name.split("-")[0] if path.is_file() else "folder")
        original(path)

    monkeypatch.setattr(files, "_sync", note)
    assert distill("train", "--steps", 2, "batch_size=2", "save_every=1", "log_every=1", "sample_every=0", *NETWORK, "--out", "r").code == 0
    states = [k for k, name in enumerate(synced) if name == "state.json"]
    metrics = [k for k, name in enumerate(synced) if name == "metrics.jsonl"]
    assert len(states) == len(metrics) == 2
    assert metrics[0] < states[0] < metrics[1] < states[1]


def test_a_damaged_line_does_not_drop_those_after_it(tmp_path, capsys):
    run = runs.Run(tmp_path)
    good = [b'{"step": %d, "images": 2}\n' % step for step in range(1, 6)]
    damaged = [b"\0\0\0\0\n", b'{"step": 2, "ima\n', b"\xff\xfe\n", b"[1, 2]\n", b"7\n", b"[" * 5000 + b"\n", b"9" * 5000 + b"\n"]
    kept = [b'{"note": "no step"}\n', b'{"step": "two"}\n', b'{"step": null}\n']
    run.metrics.write_bytes(b"".join([good[0], *damaged, *kept, *good[1:], b'{"step": 3, "im']))
    run.forget_after(3)
    assert run.metrics.read_bytes() == b"".join([good[0], *kept, good[1], good[2]])
    assert "metrics.jsonl: 7 damaged lines are left out" in capsys.readouterr().err
    run.forget_after(3)
    assert capsys.readouterr().err == ""
    run.metrics.write_bytes(b"")
    run.forget_after(3)
    assert run.metrics.read_bytes() == b""


def test_a_signal_while_embeddings_are_made_stops_between_shards(distill, tmp_path, monkeypatch):
    """With the code and the message of any preempted run; the shards that are complete stay, and --resume makes the others."""
    import signal

    from distill_cli.models import embeddings

    monkeypatch.setattr(embeddings, "SHARD", 2)
    original = embeddings.Embeddings.make

    def preempted(self, shard):
        original(self, shard)
        if shard == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(embeddings.Embeddings, "make", preempted)
    (tmp_path / "t.txt").write_text("".join(f"a red {k}\n" for k in range(10)))
    command = ("dmd", "--teacher", "tiny-sd", "--prompts", "t.txt", "--steps", 1, "batch_size=2", "sample_every=0", "regression_weight=0")
    result = distill(*command, "--out", "r")
    assert result.code == 0
    assert result.err.endswith("stopped before the first step\nhint: resume with --resume r\n")
    assert len(list((tmp_path / "r").glob("text-*/shard-*"))) == 2
    assert checkpoint.steps(tmp_path / "r/checkpoints") == []
    monkeypatch.setattr(embeddings.Embeddings, "make", original)
    monkeypatch.setattr("distill_cli.cli.common.compare", lambda *_: None)
    assert distill("dmd", "--resume", "r").code == 0
    assert len(list((tmp_path / "r").glob("text-*/shard-*"))) == 5

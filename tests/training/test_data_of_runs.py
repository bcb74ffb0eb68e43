"""The pictures of a run: broken ones are named before it trains, and it goes on after one was removed or replaced."""

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from distill_cli.data import listing, open_images
from distill_cli.errors import DistillError, UsageError
from distill_cli.training import checkpoint
from tests.cli.test_bad_input import one_line

NETWORK = ("network.channels=[8]", "network.attention=[false]", "network.groups=4", "network.head=8")
TRAIN = ("train", "--data", "photos", "--resolution", 8, "--batch-size", 2, "sample_every=0", "save_every=2", "log_every=1", *NETWORK)


def jpeg(seed, pixels=32):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    """Two classes of six; the last of the dogs is cut off behind a header that is fine."""
    for name, first in (("cat", 0), ("dog", 6)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(6):
            (tmp_path / "photos" / name / f"{k}.jpg").write_bytes(jpeg(first + k))
    return tmp_path / "photos"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_headers_are_read_before_anything_is_trained(distill, photos, tmp_path):
    (photos / "cat/3.jpg").write_bytes(b"<html>")
    (photos / "dog/1.jpg").write_bytes(b"")
    one_line(distill(*TRAIN, "--out", "r"), 1, "photos/cat/3.jpg: not a readable image", "1 more of 12", "remove or replace the file")
    assert not (tmp_path / "r").exists()
    for name in ("cat/3.jpg", "dog/1.jpg"):
        (photos / name).unlink()
    (photos / "owl").mkdir()
    (photos / ".git").mkdir()
    done = distill(*TRAIN, "--steps", 1, "--out", "r")
    assert done.code == 0, done.err
    assert "headers of 10 pictures read" in done.err
    assert "1 folder without pictures (owl)" in done.err
    assert [path.name for path in (tmp_path / "r").glob("*pictures*")] == ["pictures.jsonl"]
    (photos / "dog/2.jpg").write_bytes(b"no picture any more")
    one_line(distill("train", "--resume", "r", "--steps", 2), 1, "dog/2.jpg: not a readable image", "then --resume r")
    (photos / "dog/2.jpg").unlink()
    again = distill("train", "--resume", "r", "--steps", 2)
    assert again.code == 0, again.err
    assert "dog/2.jpg was found broken and is gone: dog/3.jpg takes its place" in again.err


@pytest.fixture
def stopped(distill, photos):
    """A run that has found dog/5.jpg broken, at a step after its first checkpoint."""
    cut(photos / "dog/5.jpg")
    one_line(
        distill(*TRAIN, "--steps", 6, "--out", "r", "seed=3"), 1, "dog/5.jpg: not a readable image (image file is truncated",
        "hint: remove or replace the file, then --resume r",
    )  # fmt: skip
    return photos


def test_a_broken_picture_is_removed(distill, stopped, tmp_path):
    assert checkpoint.steps(tmp_path / "r/checkpoints")
    one_line(distill("train", "--resume", "r"), 1, "dog/5.jpg: not a readable image", "then --resume r")  # still
    (stopped / "dog/5.jpg").unlink()
    done = distill("train", "--resume", "r")
    assert done.code == 0, done.err
    assert "dog/5.jpg was found broken and is gone: dog/0.jpg takes its place" in done.err
    assert json.loads((tmp_path / "r/broken-pictures-0.jsonl").read_text()) == "dog/5.jpg"


def test_the_rule_of_the_place(photos, tmp_path):
    """The next picture of the class in the list, after the last the first; positions and labels stay."""
    images = open_images(str(photos), 8)
    listing.keep(images, tmp_path)
    gone = [photos / name for name in ("cat/1.jpg", "cat/2.jpg", "dog/5.jpg")]
    listing.note(tmp_path, photos, gone)
    for path in gone:
        path.unlink()
    (photos / "cat/2.png").write_bytes(jpeg(50))  # in its place, under another ending
    now = open_images(str(photos), 8)
    said = listing.prepare(now, tmp_path)
    assert [str(file.relative_to(photos)) for file in now.files] == [
        "cat/0.jpg", "cat/2.png", "cat/2.png", "cat/3.jpg", "cat/4.jpg", "cat/5.jpg",
        "dog/0.jpg", "dog/1.jpg", "dog/2.jpg", "dog/3.jpg", "dog/4.jpg", "dog/0.jpg",
    ]  # fmt: skip
    assert now.labels == images.labels
    assert "cat/2.jpg was found broken and has been replaced: cat/2.png is read as it is now" in said
    for path in (photos / "dog").iterdir():
        path.unlink()
    listing.note(tmp_path, photos, [photos / f"dog/{k}.jpg" for k in range(6)])
    with pytest.raises(UsageError, match="dog/0.jpg was the last picture of its class"):
        listing.prepare(open_images(str(photos), 8), tmp_path)


def test_a_broken_picture_is_replaced(distill, stopped, tmp_path):
    (stopped / "dog/5.jpg").write_bytes(jpeg(99))
    shutil.copytree(tmp_path / "r", tmp_path / "other")
    done = distill("train", "--resume", "r")
    assert done.code == 0, done.err
    assert "dog/5.jpg was found broken and has been replaced: dog/5.jpg is read as it is now" in done.err
    (stopped / "dog/5.jpg").write_bytes(jpeg(98))
    assert distill("train", "--resume", "other").code == 0
    weights = "teacher/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "r" / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


CHANGES = {
    "removed": (lambda p: (p / "cat/1.jpg").unlink(), "cat/1.jpg is gone since the run has begun"),
    "another": (lambda p: (p / "cat/1.jpg").write_bytes(jpeg(77, 40)), "cat/1.jpg has another size since"),
    "new": (lambda p: (p / "cat/7.jpg").write_bytes(jpeg(77)), "cat/7.jpg is new since"),
    "renamed": (lambda p: (p / "cat/1.jpg").rename(p / "cat/01.jpg"), "cat/01.jpg is new since"),
    "a class more": (lambda p: shutil.copytree(p / "cat", p / "owl"), "owl is a new class since"),
    "a class less": (lambda p: shutil.rmtree(p / "cat"), "cat/0.jpg (and 5 more) is gone since"),
    "a class renamed": (lambda p: (p / "cat").rename(p / "kit"), "kit is a new class since"),
    "the same number": (
        lambda p: ((p / "owl").mkdir(), [(p / f"cat/{k}.jpg").rename(p / f"owl/{k}.jpg") for k in range(3)]),
        "owl is a new class since",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_changes_are_refused_by_name(change, photos, tmp_path):
    listing.keep(open_images(str(photos), 8), tmp_path)
    make, says = CHANGES[change]
    make(photos)
    with pytest.raises(UsageError) as error:
        listing.prepare(open_images(str(photos), 8), tmp_path)
    assert says in error.value.message


def test_other_times_are_a_warning(photos, tmp_path):
    listing.keep(open_images(str(photos), 8), tmp_path)
    for path in photos.rglob("*.jpg"):
        os.utime(path, (1, 1))
    moved = photos.rename(tmp_path / "elsewhere")
    said = listing.prepare(open_images(str(moved), 8), tmp_path)
    assert [line for line in said if line.startswith("warning: 12 pictures have another time")]


def test_what_cannot_be_read_is_not_broken(photos, tmp_path, monkeypatch):
    """An I/O error is said as the system says it, and nobody is told to remove the file."""
    images = open_images(str(photos), 8)
    opened = Image.open

    def failing(path, *rest):
        if str(path).endswith("dog/3.jpg"):
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *rest)

    monkeypatch.setattr(Image, "open", failing)
    with pytest.raises(DistillError, match="dog/3.jpg: input/output error") as error:
        listing.prepare(images, tmp_path)
    assert "remove" not in error.value.hint
    assert not list(tmp_path.glob("broken*"))
    with listing.noting(tmp_path, photos), pytest.raises(DistillError, match="dog/3.jpg: input/output error"):
        images.batch([9], None)
    assert not list(tmp_path.glob("broken*"))


def test_the_list_itself(photos, tmp_path):
    """Each process notes what it finds; a list that was changed by hand is refused."""
    for rank, name in (("0", "cat/0.jpg"), ("1", "dog/1.jpg"), ("1", "dog/1.jpg"), ("1", "dog/2.jpg")):
        os.environ["RANK"] = rank
        listing.note(tmp_path, photos, [photos / name])
    del os.environ["RANK"]
    assert listing.found_broken(tmp_path) == {"cat/0.jpg", "dog/1.jpg", "dog/2.jpg"}
    assert listing.read(tmp_path) is None
    listing.keep(open_images(str(photos), 8), tmp_path)
    classes, rows = listing.read(tmp_path)
    assert (classes, len(rows), rows[7][0], rows[7][3]) == (["cat", "dog"], 12, "dog/1.jpg", 1)
    (tmp_path / "pictures.jsonl").write_text((tmp_path / "pictures.jsonl").read_text().replace("dog/1.jpg", "dog/9.jpg"))
    with pytest.raises(DistillError, match="pictures.jsonl: corrupt"):
        listing.read(tmp_path)


def test_a_run_of_before_has_no_list(distill, photos, tmp_path):
    """It resumes as it did, and has its list from now on; another class is one line."""
    assert distill(*TRAIN, "--steps", 2, "--out", "r").code == 0
    (tmp_path / "r/pictures.jsonl").unlink()
    (tmp_path / "r/begun.json").unlink()
    file = checkpoint.path_of(tmp_path / "r/checkpoints", 2) / "state.json"
    from distill_cli.files import sealed, unsealed

    state = unsealed(file.read_bytes())
    del state["state"]["begun"]["classes"]
    file.write_text(sealed(state))
    (photos / "owl").mkdir()
    (photos / "cat/1.jpg").rename(photos / "owl/1.jpg")
    one_line(
        distill("train", "--resume", "r", "--steps", 3), 2, "class_embedding.weight is (4, 32), in step-000002 (3, 32)", "other classes"
    )
    (photos / "owl/1.jpg").rename(photos / "cat/1.jpg")
    (photos / "owl").rmdir()
    done = distill("train", "--resume", "r", "--steps", 3)
    assert done.code == 0, done.err
    assert len((tmp_path / "r/pictures.jsonl").read_text().splitlines()) == 14


@pytest.mark.slow
def test_two_processes_go_on_after_a_broken_picture(photos, tmp_path, workers):
    """Either may find it; both take the same picture in its place."""
    from tests.test_processes import distill, ended

    cut(photos / "dog/2.jpg")
    code, _, err = ended(distill(tmp_path, *map(str, TRAIN), "--steps", "8", "--out", "r", "--num-processes", "2"))
    assert code == 1, err
    assert err.count("error:") == 1
    assert listing.found_broken(tmp_path / "r") == {"dog/2.jpg"}
    (photos / "dog/2.jpg").unlink()
    code, _, err = workers.ended(tmp_path, "train", "--resume", "r", processes=2)
    assert code == 0, err
    assert err.count("dog/2.jpg was found broken and is gone: dog/3.jpg takes its place") == 1

"""Folders of pictures with captions: where captions are read, whose they are, and what is refused."""

import json

import pytest
import torch
from PIL import Image

from distill_cli.data import open_images
from distill_cli.data.images import Captioned
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.methods.dmd2.objective import open
from distill_cli.runs import Run
from distill_cli.training.job import Job
from tests.options import options

NAMES = ("b/two.png", "a/one.png", "three.jpg")
WORDS = {"a/one.png": "a red circle", "b/two.png": "a blue\n square ", "three.jpg": "été, a cross"}
ORDER = sorted(NAMES)


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    for k, name in enumerate(ORDER):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (50 * k, 0, 200)).save(root / name)
    return root


def flat(root):
    """All pictures in one folder."""
    for name in ORDER:
        (root / name).rename(root / name.replace("/", "-"))
    return {name.replace("/", "-"): text for name, text in WORDS.items()}


def beside(root, words):
    for name, text in words.items():
        (root / name).with_suffix(".txt").write_text(text, "utf-8")


def metadata(key):
    def write(root, words):
        lines = [json.dumps({"file_name": f"./{name}", key: text, "other": 1}) for name, text in words.items()]
        (root / "metadata.jsonl").write_text("\n".join([*lines, "", json.dumps({"file_name": "gone.png", key: "not here"})]), "utf-8-sig")

    return write


def table(root, words):
    lines = [f'{name},1,"{text}"' for name, text in words.items()]
    (root / "metadata.csv").write_text("file_name,stars,text\n" + "\n".join(lines), "utf-8")


def samples(root, words):
    (root / "samples.jsonl").write_text("\n".join(json.dumps({"file": name, "prompt": text}) for name, text in words.items()), "utf-8")


@pytest.mark.parametrize("write", [beside, metadata("text"), metadata("caption"), table, samples])
def test_each_picture_has_its_own_caption(write, pictures):
    words = flat(pictures)
    write(pictures, words)
    images = open_images(str(pictures), 16)
    assert isinstance(images, Captioned)
    said = [" ".join(words[file.name].split()) for file in images.files]
    assert images.captions(range(3)) == said
    assert images.captions([2, 0]) == [said[2], said[0]]


def test_a_text_teacher_learns_each_picture_under_its_caption(pictures, tmp_path):
    """Real images of the discriminator: the latents of a picture, and the embedding of its words."""
    words = flat(pictures)
    beside(pictures, words)
    config = options(
        "dmd2",
        teacher="tiny-sd",
        data=str(pictures),
        resolution=64,
        batch_size=3,
        fake_steps=1,
        steps=1,
        out=tmp_path / "run",
        student_steps=1,
    )
    method = open(config, Job("dmd2"))
    method.prepare(torch.device("cpu"), Run(tmp_path))
    draws = Draws(0, range(3))
    x, condition = method.examples.batch(draws, torch.device("cpu"))
    for row in range(3):
        position = method.source.seen[method.order[row]]
        picture, _ = method.images.batch([position], Draws(0, [position]))
        mean, spread = method.teacher.codec.encode(picture)
        own = Draws(0, [row]).normal("augment", method.teacher.shape)
        assert (x[row] - (mean + spread * own)[0]).abs().max() < 1e-3
        said = method.teacher.conditioner.encode([" ".join(words[method.images.files[position].name].split())])
        assert (condition.parts["encoder_hidden_states"][row] - said.parts["encoder_hidden_states"][0]).abs().max() < 1e-2
    assert {len(set(words.values())), len({tuple(x[k].flatten()[:4].tolist()) for k in range(3)})} == {3}


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda root: None, "has no captions"),
        (lambda root: beside(root, {"three.jpg": "a cross"}), "2 of 3 pictures have no caption in the .txt files: a-one.png, b-two.png"),
        (lambda root: samples(root, {"three.jpg": "a cross", "a-one.png": " "}), "2 of 3 pictures have no caption in samples.jsonl"),
        (lambda root: (root / "metadata.jsonl").write_text('{"file_name": "three.jpg"}'), "line 1 has no file_name and text"),
        (lambda root: (root / "metadata.jsonl").write_text('{"a": 1}\n{"b'), "line 2 is no JSON"),
        (lambda root: (root / "metadata.jsonl").write_text("[1]"), "line 1 is no JSON object"),
        (lambda root: (root / "metadata.csv").write_text("name,text\na,b"), "line 2 has no file_name and text"),
        (lambda root: (root / "three.txt").write_bytes(b"\xff\xfe\xfa"), "three.txt: not text in UTF-8"),
    ],
)
def test_what_lacks_or_breaks_captions_is_refused(write, says, pictures):
    flat(pictures)
    write(pictures)
    with pytest.raises((UsageError, DistillError), match=says):
        open_images(str(pictures), 16).captions(range(3))

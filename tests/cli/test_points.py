"""Commands on points of the plane: what they write and say, and one line for each thing that only pictures have."""

import json

import numpy as np
import pytest

from distill_cli.data import open_images
from distill_cli.data.points import Moons
from distill_cli.diffusion.noise import Draws
from distill_cli.models import load


def small(folder, data, *more):
    network = ("network.channels=[32,32]", "sample_every=0", "device=cpu")
    return ("train", f"data={data}", "steps=2", "batch_size=4", *network, *more, "--out", folder)


@pytest.fixture
def teacher(distill):
    assert distill(*small("t", "moons")).code == 0
    return "t"


@pytest.fixture
def student(distill, teacher):
    assert distill("cm", "--teacher", teacher, "--data", "moons", "steps=2", "batch_size=4", "sample_every=0", "--out", "cd").code == 0
    return "cd"


def test_samples_are_points(distill, teacher, tmp_path):
    assert distill("sample", "--model", teacher, "--num", 5, "--steps", 3, "batch_size=2", "--out", "s").code == 0
    stored = np.load(tmp_path / "s/samples.npz")
    assert (stored["arr_0"].dtype, stored["arr_0"].shape, stored["arr_1"].tolist()) == (np.float32, (5, 2), [0, 1, 0, 1, 0])
    model = load(str(tmp_path / teacher))
    asked = model.with_defaults(None, 3, None)
    made = model.sample(Draws(0, range(5)), model.conditioner.labels(5), asked)
    np.testing.assert_allclose(stored["arr_0"], made.flatten(1).numpy(), rtol=1e-4, atol=1e-5)  # of other batches
    assert not list(tmp_path.glob("s/*.png"))
    assert [json.loads(line)["class"] for line in (tmp_path / "s/samples.jsonl").read_text().splitlines()] == ["outer", "inner"] * 2 + [
        "outer"
    ]


def test_a_run_draws_no_pictures_and_says_so(distill, teacher, tmp_path):
    ended = distill("dmd", "--teacher", teacher, "steps=2", "batch_size=4", "sample_every=1", "--out", "d")
    assert ended.code == 0
    assert "no comparison.png, and none in samples: points are not drawn" in ended.err
    assert not list(tmp_path.glob("d/**/*.png"))
    shown = distill("models", "show", "d")
    assert "points of the plane" in shown.out
    assert "opens with distill alone" in shown.out


REFUSED = [
    (("train", "data=moons", "--resolution", 1), "resolution 1: for pictures, not for points"),
    (("train", "data=moons", "flip=true"), "flip: moons must not be mirrored"),
    (("train", "data=moons", "network.attention=[true,true,false]"), "network.attention: for pictures, not for points"),
    (("train", "data=moons", "network.head=16"), "network.head: for pictures, not for points"),
    (("vae", "data=rings"), "vae: for pictures, not for points"),
    (("classifier", "data=rings"), "classifier: for pictures, not for points"),
    (("sample", "--model", "t", "--format", "png"), "--format png: for pictures, not for points"),
    (("sample", "--model", "t", "--grid"), "--grid: for pictures, not for points"),
    (("sample", "--model", "t", "--search-times", 2), "--search-times: for pictures, not for points"),
    (("sample", "--model", "t", "--resolution", 1), "resolution 1: for pictures, not for points"),
    (("pairs", "--teacher", "t", "--resolution", 8), "resolution 8: for pictures, not for points"),
    (("dmd", "--teacher", "t", "--pairs", "p", "regression_loss=lpips"), "regression_loss lpips: for pictures, not for points"),
    (("cm", "--teacher", "t", "--data", "moons", "metric=lpips"), "metric lpips: for pictures, not for points"),
    (("cm", "--teacher", "t", "--data", "digits"), "--data digits: images of (3, 16, 16), the teacher's are (2, 1, 1)"),
    (("cm", "--teacher", "tiny", "--data", "moons"), "--data moons: points of (2, 1, 1), the teacher's are (3, 16, 16)"),
    (("pd", "--teacher", "t", "--data", "digits"), "--data digits: images of (3, 16, 16), the teacher's are (2, 1, 1)"),
    (("cm", "--teacher", "t", "--data", "two-modes"), "--data two-modes: 0 classes, the teacher has 2"),
    (("evaluate", "--model", "t", "--data", "digits"), "--model t: makes points, --data digits has images"),
    (("evaluate", "--model", "tiny", "--data", "moons"), "--model tiny: makes images, --data moons has points"),
    (("evaluate", "--model", "t", "--data", "moons", "classifier=digits-2"), "classifier: for pictures, not for points"),
    (("evaluate", "--model", "t", "--data", "moons", "neighbours=4"), "neighbours: for pictures, not for points"),
    (("evaluate", "--model", "t", "--data", "two-modes", "--classes", "1"), "--classes 1: two-modes has 0 classes"),
    (("evaluate", "--model", "x.npz", "--data", "moons"), "--model x.npz: arr_0 is uint8 (4, 8, 8, 3), not float32 (N, 2)"),
]


def test_bad_input_is_one_line(distill, teacher, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    assert distill("pairs", "--teacher", teacher, "--num", 4, "--steps", 2, "--out", "p").code == 0
    for arguments, says in REFUSED:
        ended = distill(*arguments, *(() if "--search-times" in arguments else ("--out", "new")))
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert (ended.code, errors) == (2, [f"error: {says}"]), arguments
        assert not (tmp_path / "new").exists(), arguments


def test_edits_are_of_pictures(distill, student):
    ended = distill("edit", "interpolate", "--model", student, "--out", "e")
    assert (ended.code, ended.err.splitlines()[-2:]) == (
        2,
        ["error: edit interpolate: for pictures, not for points", "hint: --model cd makes points"],
    )


def test_evaluate_measures_points(distill, tmp_path):
    """A set against itself is at distance 0; one that is moved by d in x is at the mean of |d cos| over the directions, d 2/pi."""
    images = open_images("moons")
    x, spread = images.points.flatten(1).numpy(), images.points.double().flatten(1).var(0, correction=0).mean().sqrt().item()
    np.savez(tmp_path / "same.npz", arr_0=x, arr_1=images.labels.numpy())
    np.savez(tmp_path / "moved.npz", arr_0=(x + [0.3, 0]).astype(np.float32))
    ended = distill("evaluate", "--model", "same.npz", "--model", "moved.npz", "--data", "moons", "--out", "e", "--json")
    rows = json.loads(ended.out)["rows"]
    assert rows[0]["sliced_wasserstein"] < 1e-6
    assert rows[1]["sliced_wasserstein"] == pytest.approx(0.3 * 2 / np.pi / spread, rel=1e-3)
    assert rows[2]["model"] == "the reference, resampled"
    assert 0.005 < rows[2]["sliced_wasserstein"] < 0.05
    assert not (tmp_path / "e/picture.png").exists()
    assert "| same.npz | 10000 |" in (tmp_path / "e/report.md").read_text()
    only = distill("evaluate", "--model", "same.npz", "--data", "moons", "--classes", "1", "--out", "f", "--json")
    assert json.loads(only.out)["rows"][0]["sliced_wasserstein"] > 0.2
    assert "of classes 1 the 5000 points" in json.loads(only.out)["reference"]


def test_a_folder_with_another_network_is_refused(distill, teacher, tmp_path):
    index = tmp_path / "t/teacher/model_index.json"
    content = json.loads(index.read_text())
    assert content["mlp"] == ["distill_cli.models.plane", "PlaneMLP"]
    index.write_text(json.dumps({**content, "mlp": ["diffusers", "UNet2DModel"]}))
    assert "its mlp is ['diffusers', 'UNet2DModel'], not one of PlaneMLP" in distill("models", "show", "t").err
    index.write_text(json.dumps(content))
    config = tmp_path / "t/teacher/mlp/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 3}))
    assert "is of another shape" in distill("models", "show", "t").err


def test_classes_of_moons_are_halves():
    assert Moons().batch(range(4), Draws(0, range(4)))[1].tolist() == [0, 1, 0, 1]

"""The command against pictures whose quality is known."""

import json

import numpy as np
import pytest
import torch

from distill_cli.config import EvaluateConfig
from distill_cli.data import open_images
from distill_cli.data.pictures import from_uint8, to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.evaluate import report
from distill_cli.models import classifier


def npz(path, images, labels=None):
    np.savez(path, arr_0=to_uint8(images), **({} if labels is None else {"arr_1": labels.numpy()}))
    return str(path)


@pytest.fixture
def real(tmp_path):
    """700 of the real digits, in inks of another seed."""
    return open_images("digits").batch(range(700), Draws(9, range(700)))


def test_worse_pictures_get_worse_numbers(distill, tmp_path, real):
    images, labels = real
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    noisy = images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    ones = labels == 1
    files = [
        npz(tmp_path / "good.npz", images, labels),
        npz(tmp_path / "noisy.npz", noisy, labels),
        npz(tmp_path / "shuffled.npz", images, shuffled),
        npz(tmp_path / "one.npz", images[ones].repeat(10, 1, 1, 1)[:700], labels[ones].repeat(10)[:700]),
    ]
    result = distill("evaluate", *(f for file in files for f in ("--model", file)), "--out", "e", "--json")
    assert result.code == 0, result.err
    good, noisy, shuffled, one, again = result.json["rows"]
    assert good["accuracy"] > 0.99
    assert good["frechet"] < 3 * again["frechet"] < 0.5 * noisy["frechet"]
    assert noisy["precision"] < 0.6 < 0.95 < good["precision"]
    assert shuffled["accuracy"] < 0.2
    assert shuffled["frechet"] == good["frechet"]
    assert one["precision"] > 0.99
    assert one["recall"] < 0.2 < 0.8 < good["recall"]
    assert result.json["reference"].startswith("all 1797 images of digits, each once")
    stored = json.loads((tmp_path / "e/report.json").read_text())
    assert stored == result.json
    assert f"{good['frechet']:.4f}" in (tmp_path / "e/report.md").read_text()
    page = (tmp_path / "e/report.html").read_text()
    assert f"<td>{good['frechet']:.4f} ± {good['frechet_spread']:.4f}</td>" in page
    assert page.count("<img") == 5 * 40 + 4 * 8
    with np.load(files[0]) as stored, torch.no_grad():  # the worst first, each with the class that it should be
        certain = classifier.load("digits")(from_uint8(stored["arr_0"])).softmax(1)[torch.arange(700), labels]
    worst = page[page.index("good.npz: probability of the class") :]
    places = [worst.index(f"<div>{certain[i]:.2f}: {labels[i]}</div>") for i in certain.argsort(stable=True)[:8]]
    assert places == sorted(places)
    assert (tmp_path / "e/picture.png").stat().st_size > 10_000


def test_models_are_sampled_at_their_steps_and_kept(distill, tmp_path):
    arguments = ("evaluate", "--model", "tiny@2", "--model", "tiny", "--num", 20, "--seed", 5, "--out", "e", "--json")
    first = distill(*arguments)
    assert [row["network_evaluations"] for row in first.json["rows"]] == [3, 35, None]
    assert all(row["images_per_second"] > 0 for row in first.json["rows"][:2])
    distill("sample", "--model", "tiny", "--steps", 2, "--num", 20, "--seed", 5, "--format", "npz", "--out", "s")
    ours, direct = (np.load(tmp_path / path)["arr_0"] for path in ("e/samples/0-tiny@2/samples.npz", "s/samples.npz"))
    assert np.array_equal(ours, direct)
    again = distill(*arguments)
    assert "sample:" not in again.err  # nothing was made again, and the speed is that of before
    assert again.json["rows"] == first.json["rows"]


def test_too_few_images_are_said(distill):
    result = distill("evaluate", "--model", "tiny@1", "--num", 20, "--out", "e")
    assert result.code == 0
    assert "warning: tiny@1: 20 images for 64 features, their covariance is singular: real images in that number get a Fr" in result.err
    none = distill("evaluate", "--model", "tiny@1", "--num", 4, "--out", "f")
    assert none.code == 2
    assert "4 images are too few to measure anything" in none.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nowhere.npz"], "nowhere.npz: no such file"),
        (["--model", "bad.npz"], "bad.npz: corrupt"),
        (["--model", "flat.npz"], "flat.npz: arr_0 is float64 (3, 4)"),
        (["--model", "named.npz"], "named.npz: arr_1 is <U1 (9,)"),
        (["--model", "short.npz"], "short.npz: arr_1 is int64 (3,)"),
        (["--data", "photos", "--resolution", "16", "neighbours=1"], "has 0 of (3, 16, 16)"),
        (["--model", "large.npz"], "large.npz: images of (3, 32, 32), the reference has (3, 16, 16)"),
        (["--model", "tiny@x"], "tiny@x: a number of steps must follow @"),
        (["--classifier", "digitz"], "digitz: no classifier"),
        (["--data", "photos", "--resolution", "8"], "knows 10 classes of (3, 16, 16) images, --data photos has 0 of (3, 8, 8)"),
    ],
)
def test_bad_input(arguments, says, distill, tmp_path):
    from PIL import Image

    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "flat.npz", arr_0=np.zeros((3, 4)))
    digits = np.zeros((9, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "named.npz", arr_0=digits, arr_1=np.array(list("123456789")))
    np.savez(tmp_path / "short.npz", arr_0=digits, arr_1=np.arange(3))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 32, 32, 3), dtype=np.uint8))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos/a.png")
    result = distill("evaluate", *arguments)
    assert result.code in (1, 2)
    assert says in result.err.splitlines()[0]


def test_nothing_is_sampled_before_all_is_right(distill, tmp_path):
    result = distill("evaluate", "--model", "tiny", "--model", "nowhere.npz", "--out", "e")
    assert result.code == 2
    assert not (tmp_path / "e").exists()


def test_another_evaluation_does_not_overwrite_one(distill, tmp_path):
    assert distill("evaluate", "--model", "tiny@1", "--num", 20, "--out", "e").code == 0
    other = distill("evaluate", "--model", "tiny@2", "--num", 20, "--out", "e")
    assert other.code == 2
    assert "made with other settings: model is ['tiny@1'], not ['tiny@2']" in other.err


def test_models_without_classes_have_no_accuracy(tmp_path):
    images = torch.zeros(5, 3, 16, 16)
    npz(tmp_path / "x.npz", images, torch.zeros(5).long())
    assert report.read_npz(tmp_path / "x.npz")[1] is None
    npz(tmp_path / "y.npz", images, torch.arange(5))
    assert report.read_npz(tmp_path / "y.npz")[1].tolist() == [0, 1, 2, 3, 4]


def test_classes_narrow_both_sides(distill, tmp_path, real):
    """Threes against threes: the distance is that of good images, and not that of one class against ten."""
    images, labels = real
    threes = npz(tmp_path / "threes.npz", images[labels == 3], labels[labels == 3])
    found = distill("evaluate", "--model", threes, "classes=3", "--out", "a", "--json").json
    assert found["reference"].startswith("of classes 3 the 183 images of digits")
    against_all = distill("evaluate", "--model", threes, "--out", "b", "--json").json
    assert found["rows"][0]["frechet"] < 0.2 * against_all["rows"][0]["frechet"]
    assert found["rows"][0]["accuracy"] > 0.95
    zeros = distill("evaluate", "--model", "tiny@1", "--num", 20, "classes=0", "--out", "c", "--json").json
    assert zeros["rows"][0]["accuracy"] is not None


def test_evaluation_and_pairs_do_not_share_their_noise():
    """A student knows the noise of its pairs; the default seeds differ."""
    from distill_cli.config import PairsConfig

    assert EvaluateConfig().seed != PairsConfig().seed


def test_the_built_in_classifier_reads_the_digits():
    network = classifier.load("digits")
    images, labels = open_images("digits").batch(range(1797), Draws(77, range(1797)))
    assert (network.measure(images)[1] == labels).double().mean() > 0.995  # a fifth of them it has never seen: 0.994 of those
    assert network.info.accuracy > 0.99


def test_a_classifier_of_ones_own(distill, tmp_path):
    """Red and blue squares, brighter or darker: learned from a folder, saved, loaded, and used to evaluate."""
    from PIL import Image

    for name, colour in (("blue", (0, 0, 1)), ("red", (1, 0, 0))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), tuple(c * (100 + 7 * i) for c in colour)).save(tmp_path / f"photos/{name}/{i}.png")
    result = distill(
        "classifier",
        "--data",
        "photos",
        "--resolution",
        8,
        "--steps",
        40,
        "--lr",
        3e-3,
        "width=8",
        "ema_halflife=0",
        "--out",
        "c",
        "--json",
    )
    assert result.code == 0, result.err
    assert result.json["held_out"] == 8
    assert result.json["accuracy"] == 1.0
    images, labels = open_images("photos", 8).batch(range(40), Draws(0, range(40)))
    file = npz(tmp_path / "same.npz", images, labels)
    rows = distill("evaluate", "--model", file, "--data", "photos", "--resolution", 8, "--classifier", "c", "--out", "e", "--json").json[
        "rows"
    ]
    assert rows[0]["accuracy"] == 1.0
    assert rows[0]["frechet"] == pytest.approx(0, abs=1e-6)
    few = distill("evaluate", "--model", file, "--data", "photos", "--resolution", 8, "--classifier", "c", "neighbours=39", "--out", "f")
    assert few.code == 2
    assert "40 images are too few to measure" in few.err
    flat = distill("classifier", "--data", "photos/red", "--resolution", 8)
    assert flat.code == 2
    assert "a classifier needs two or more" in flat.err


def test_a_damaged_classifier_is_said(tmp_path):
    classifier.load("digits").save(tmp_path / "c")
    (tmp_path / "c/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(Exception, match="no readable classifier"):
        classifier.load(str(tmp_path / "c"))


def test_steps_of_a_model():
    assert report.split("runs/cd@2") == ("runs/cd", 2)
    assert report.split("digits") == ("digits", None)
    with pytest.raises(UsageError, match="number of steps"):
        report.split("digits@0")
    assert EvaluateConfig(model="digits").model == ["digits"]


def test_two_processes_measure_as_one(distill, tmp_path, workers):
    """The measures are shared out, and what they draw does not depend on who computes them: all scores and spreads are equal."""
    npz(tmp_path / "x.npz", *open_images("digits").batch(range(300), Draws(1, range(300))))
    every = "measures=accuracy,frechet,kid,inception-score,precision-recall,density-coverage,diversity,memorisation"
    asked = ["evaluate", "--model", str(tmp_path / "x.npz"), "--data", "digits", "--num", "300", every]
    assert distill(*asked, "--out", "one").code == 0
    workers.finish([*asked, "--out", str(tmp_path / "two")], 2)
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("one", "two"))
    assert one == two
    assert one[0]["copies_spread"] > 0

"""Published protocols: the numbers of torch-fidelity's own program on the same folders, and files of statistics as others publish them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from distill_cli.data.pictures import to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.evaluate.distances import Statistics, frechet_of

SUBSET = 8


def pictures(folder, count, seed, colour=0):
    """Smooth pictures of 32 pixels, as PNG files."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for k in range(count):
        small = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8) // 2 + colour
        Image.fromarray(small.astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{k:03d}.png")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights for torch-fidelity's Inception, whose layers neither vanish nor explode."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(kind, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = kind("inception", ["2048"])
    norms = [layer for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8))
    for layer in network.Mixed_7c.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.data.fill_(0.3)  # as small as real features, so that float32 is good to 1e-6 in theirs
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def kept(folder):
    (file,) = folder.glob(".features/*/000000.safetensors")
    return load_file(file)["features"].double()


def test_the_numbers_are_torch_fidelitys(weights, distill, tmp_path):
    """FID to 1e-5, or nearer to the truth; KID, Inception Score, precision and recall to 1e-6, of KID, which is in the thousands here, its
    millionth."""
    import torch_fidelity

    pictures(tmp_path / "real", 12, 0)
    pictures(tmp_path / "fake", 20, 1, 20)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "fake"), input2=str(tmp_path / "real"), fid=True, kid=True, isc=True, prc=True, cuda=False, cache=False,
        kid_subset_size=SUBSET, feature_extractor_weights_path=str(weights), verbose=False, save_cpu_ram=True,
        feature_extractor="inception-v3-compat",
    )  # fmt: skip
    ended = distill(
        "evaluate", "--model", "fake", "--data", "real", "--features", "inception", f"inception={weights}", f"kid_subset_size={SUBSET}",
        "bootstrap=0", "--out", "e", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    row, again = ended.json["rows"]
    assert row["inception_kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert row["inception_kid_spread"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-5)
    assert row["inception_score"] == pytest.approx(theirs["inception_score_mean"], abs=1e-6)
    assert row["inception_score_spread"] == pytest.approx(theirs["inception_score_std"], abs=1e-6)
    assert (row["inception_precision"], row["inception_recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    # the covariances have rank 19 and 11, so the truth is known from the few pictures: tr (A B)^(1/2) = sum of singular values of X Y^T
    x, y = (each - each.mean(0) for each in (kept(tmp_path / "fake"), kept(tmp_path / "real")))
    truth = (
        (kept(tmp_path / "fake").mean(0) - kept(tmp_path / "real").mean(0)).square().sum() + x.square().sum() / 19 + y.square().sum() / 11
    )
    truth = (truth - 2 * torch.linalg.svdvals(x @ y.T).sum() / (19 * 11) ** 0.5).item()
    other = theirs["frechet_inception_distance"]
    assert row["inception_frechet"] == pytest.approx(truth, rel=1e-9)
    assert abs(row["inception_frechet"] - other) < 1e-5 or abs(row["inception_frechet"] - truth) < abs(other - truth)
    assert again["inception_frechet"] > 0
    assert "resized to 299 pixels as TensorFlow 1 does" in ended.json["features"]
    assert "KID over 100 subsets of 8" in ended.json["features"]
    assert ended.json["warnings"][0].startswith("fake: 12 real images for 2048 features, their covariance is singular")


@pytest.mark.parametrize("name", ["missing", "other", "given"])
def test_inceptions_weights_are_asked_for(name, distill, tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    pictures(tmp_path / "real", 6, 0)
    given = {"missing": (), "other": ("inception=other.pth",), "given": ("inception=nowhere.pth",)}[name]
    ended = distill("evaluate", "--model", "real", "--data", "real", "--features", "inception", *given, "--out", "e")
    assert ended.code == 1
    error, hint = [line for line in ended.err.splitlines() if line.startswith(("error", "hint"))]
    says = {"missing": "features inception: the weights are not in", "other": "not torch-fidelity's", "given": "nowhere.pth: no such file"}
    assert says[name] in error
    assert "weights-inception-2015-12-05-6726825d.pth" in hint
    assert "inception=FILE" in hint or name == "other"


@pytest.fixture(scope="module")
def digits():
    """120 digits and their labels, and 150 others."""
    from distill_cli.data import open_images

    images = open_images("digits")
    return [
        (to_uint8(x), labels.numpy())
        for x, labels in (images.batch(range(*part), Draws(3, range(*part))) for part in ((0, 120), (120, 270)))
    ]


def test_folders_and_files_give_the_same_numbers(digits, distill, tmp_path):
    """To the last bit; so does a packed file. Subfolders name the classes, samples.jsonl the labels of a flat folder."""
    x, labels = digits[0]
    np.savez(tmp_path / "x.npz", arr_0=x, arr_1=labels)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=x, arr_1=labels)
    (tmp_path / "x").mkdir()
    lines = []
    for k, (picture, label) in enumerate(zip(x, labels)):
        (tmp_path / "classes" / str(label)).mkdir(parents=True, exist_ok=True)
        for place in (f"x/{k:03d}.png", f"classes/{label}/{k}.png"):
            Image.fromarray(picture).save(tmp_path / place)
        lines.append(json.dumps({"file": f"{k:03d}.png", "label": int(label)}))
    (tmp_path / "x/samples.jsonl").write_text("\n".join(lines) + "\n")
    models = [word for spec in ("x.npz", "packed.npz", "x", "classes") for word in ("--model", spec)]
    every = "measures=accuracy,frechet,kid,inception-score,precision-recall,density-coverage,diversity,memorisation"
    ended = distill("evaluate", *models, every, "--out", "e", "--json")
    assert ended.code == 0, ended.err
    first, *others = [{key: value for key, value in row.items() if key != "model"} for row in ended.json["rows"]]
    assert others[0] == first
    assert others[1] == first
    assert others[2]["accuracy"] == first["accuracy"] > 0.95
    assert others[2]["frechet"] == pytest.approx(first["frechet"], rel=1e-4)
    assert first["precision"] > 0.9
    assert 0 < first["diversity"] < 1


LAYOUTS = {
    "edm": lambda mu, sigma: {"mu": mu, "sigma": sigma},
    "pytorch-fid": lambda mu, sigma: {"mu": mu.astype(np.float64), "sigma": sigma},
    "guided-diffusion": lambda mu, sigma: {"mu": mu, "sigma": sigma, "mu_s": np.zeros(7), "sigma_s": np.eye(7)},
}


def test_statistics_of_three_publishers(digits, distill, tmp_path):
    from distill_cli.config import EvaluateConfig
    from distill_cli.data.pictures import from_uint8
    from distill_cli.evaluate.networks import Own

    (x, _), (real, _) = digits
    np.savez(tmp_path / "x.npz", arr_0=x)
    network = Own(EvaluateConfig(), torch.device("cpu"))
    a, b = (Statistics.of(network(from_uint8(each))["features"]) for each in (x, real))
    for name, layout in LAYOUTS.items():
        write = np.savez_compressed if name == "pytorch-fid" else np.savez
        write(tmp_path / f"{name}.npz", **layout(b.mean.numpy(), b.covariance.numpy()))
        ended = distill("evaluate", "--model", "x.npz", "--data", f"{name}.npz", "--out", name, "--json")
        assert ended.code == 0, ended.err
        (row,) = ended.json["rows"]
        assert row["frechet"] == pytest.approx(frechet_of(a, b), rel=1e-9)
        assert "precision" not in row
        assert "taken to be of classifier: the file does not say" in ended.json["reference"]
        assert "they give the frechet alone" in ended.json["reference"]
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "askew.npz", mu=np.zeros(64), sigma=np.triu(np.ones((64, 64))))
    (tmp_path / "s.pkl").write_bytes(b"cos\nsystem\n")
    for arguments, code, says in (
        (("--data", "edm.npz", "measures=kid"), 2, "--data edm.npz: statistics, of which kid cannot be made: it needs the pictures"),
        (("--data", "wide.npz"), 1, "wide.npz: statistics of another feature network: 2048 features, not 64 features of the classifier"),
        (("--data", "askew.npz"), 1, "askew.npz: sigma is no covariance"),
        (("--data", "s.pkl"), 2, "--data s.pkl: a pickle, which may run code, is not read"),
        (("--data", "x.npz", "classes=3"), 2, "--classes: x.npz has no labels"),
    ):
        ended = distill("evaluate", "--model", "x.npz", *arguments, "--out", "bad")
        assert ended.code == code, ended.err
        assert says in ended.err.splitlines()[0]


def test_inceptions_file_of_guided_diffusion_has_both(weights, distill, tmp_path):
    """Pictures beside statistics: the distance is that to the statistics, recall that to the pictures."""
    pictures(tmp_path / "fake", 6, 1)
    x = np.stack([np.asarray(Image.open(file)) for file in sorted((tmp_path / "fake").glob("*.png"))])
    np.savez(tmp_path / "both.npz", arr_0=x, mu=np.zeros(2048), sigma=np.eye(2048))
    asked = ("--features", "inception", f"inception={weights}", "measures=frechet,precision-recall", "bootstrap=0")
    row = distill("evaluate", "--model", "fake", "--data", "both.npz", *asked, "--out", "e", "--json").json["rows"][0]
    assert row["inception_recall"] == 1
    assert row["inception_frechet"] > 100


def test_statistics_that_are_saved_are_read(digits, distill, tmp_path):
    (x, labels), (real, _) = digits
    np.savez(tmp_path / "x.npz", arr_0=x, arr_1=labels)
    ended = distill("evaluate", "--save-statistics", "s.npz", "--out", "a", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["rows"] == []
    direct = distill("evaluate", "--model", "x.npz", "--out", "b", "--json").json["rows"][0]
    ended = distill("evaluate", "--model", "x.npz", "--data", "s.npz", "--out", "c", "--json")
    assert ended.json["rows"][0]["frechet"] == pytest.approx(direct["frechet"], rel=1e-9)
    assert "mean and covariance of 1797 images in s.npz" in ended.json["reference"]
    assert "taken to be" not in ended.json["reference"]
    stored = dict(np.load(tmp_path / "s.npz"))
    np.savez(tmp_path / "s.npz", **{**stored, "network": np.array("f" * 64)})
    assert "statistics of another feature network" in distill("evaluate", "--model", "x.npz", "--data", "s.npz", "--out", "d").err


def test_pictures_of_mixed_sizes_are_named(distill, tmp_path):
    (tmp_path / "p").mkdir()
    for k, size in enumerate(((16, 16), (16, 16), (20, 16))):
        Image.new("RGB", size).save(tmp_path / f"p/{k}.png")
    ended = distill("evaluate", "--model", "p", "--out", "e")
    assert ended.code == 2
    assert ended.err.splitlines()[0] == "error: --model p: pictures of mixed sizes: 0.png is 16x16, 2.png is 20x16"
    assert not (tmp_path / "e").exists()

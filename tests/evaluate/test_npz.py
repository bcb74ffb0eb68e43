"""npz files of other tools: each gets a line of its own, and only a damaged one is called corrupt."""

import numpy as np
import pytest

from distill_cli.errors import DistillError
from distill_cli.evaluate.report import read_npz

X = np.random.default_rng(0).integers(0, 255, (50, 16, 16, 3), dtype=np.uint8)
OTHERS = {
    "images": ({"images": X}, "no arr_0: it has images"),
    "statistics": ({"mu": np.zeros(64), "sigma": np.eye(64)}, "mean and covariance of features, no images: it has mu, sigma"),
    "objects": ({"arr_0": np.array([X[0], None], dtype=object)}, "arr_0 holds Python objects"),
    "labels": ({"arr_0": X, "arr_1": np.array([None] * 50)}, "arr_1 holds Python objects"),
    "floats": ({"arr_0": X / 255}, "arr_0 is float64 (50, 16, 16, 3), not uint8"),
    "channels": ({"arr_0": X.transpose(0, 3, 1, 2)}, "arr_0 is uint8 (50, 3, 16, 16), not uint8 (N, H, W, 3)"),
    "grey": ({"arr_0": X[..., 0]}, "arr_0 is uint8 (50, 16, 16), not"),
    "one-hot": ({"arr_0": X, "arr_1": np.eye(50)}, "arr_1 is float64 (50, 50)"),
    "nothing": ({}, "no arr_0: it has nothing"),
    "escape": ({"a\x1b[31m": X}, r"no arr_0: it has a\x1b[31m"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_said(name, tmp_path):
    arrays, says = OTHERS[name]
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    with pytest.raises(DistillError) as caught:
        read_npz(tmp_path / "x.npz")
    assert says in caught.value.message
    assert "corrupt" not in caught.value.message
    hints = {"channels": "x.transpose(0, 2, 3, 1)", "floats": "(255 * x).round()"}
    assert hints.get(name, "") in caught.value.hint


def test_statistics_beside_images_do_no_harm(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=X, mu=np.zeros(4), sigma=np.eye(4))
    assert len(read_npz(tmp_path / "x.npz")[0]) == 50


def test_only_a_damaged_file_is_corrupt(tmp_path, monkeypatch):
    whole = tmp_path / "x.npz"
    np.savez(whole, arr_0=X)
    content = whole.read_bytes()
    flipped = bytearray(content)
    flipped[2000] ^= 1
    for name, data, says in (
        ("cut", content[:-100], "corrupt"),
        ("flipped", bytes(flipped), "corrupt"),
        ("zip", b"PK nothing", "corrupt"),
        ("empty", b"", "empty"),
        ("html", b"<html>", "no npz file"),
    ):
        (tmp_path / f"{name}.npz").write_bytes(data)
        with pytest.raises(DistillError, match=f"{name}.npz: {says}$"):
            read_npz(tmp_path / f"{name}.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DistillError, match="folder.npz: is a directory"):
        read_npz(tmp_path / "folder.npz")

    def refuse(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(DistillError, match="x.npz: input/output error") as caught:
        read_npz(whole)
    assert caught.value.hint == ""


@pytest.mark.parametrize(("labels", "wrong"), [(np.arange(50) % 10 + 1, 10), (np.full(50, -1), -1)])
def test_labels_beyond_the_classes_are_refused(labels, wrong, distill, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=X, arr_1=labels)
    result = distill("evaluate", "--model", "x.npz", "--out", "e")
    assert result.code == 2
    says = f"error: --model x.npz: arr_1 has label {wrong}, and --classifier digits knows 0 to 9"
    assert [line for line in result.err.splitlines() if line.startswith("error")] == [says]
    assert not (tmp_path / "e").exists()


def test_an_evaluation_says_what_it_reads(distill, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=X, arr_1=np.arange(50) % 10)
    np.savez(tmp_path / "y.npz", arr_0=X, arr_1=np.zeros(50, int))
    result = distill("evaluate", "--model", "x.npz", "--model", "y.npz", "--out", "e")
    assert result.code == 0, result.err
    says = "evaluate: 1797 pictures of 10 classes in digits; 50 images of x.npz; 50 images of y.npz, no labels"
    assert result.err.splitlines()[0] == says

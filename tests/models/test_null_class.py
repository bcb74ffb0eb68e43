"""A null class that was never trained is no null class."""

import json

from PIL import Image

from distill_cli.models import load
from tests.models.published import write_nvlabs
from tests.models.test_convert import SMALL, random_tensors


def test_a_null_class_that_was_never_trained_is_none(distill, tmp_path):
    """NVlabs published without label dropout: guidance and label dropout are refused, cm's default is turned off with a word."""
    write_nvlabs(random_tensors(SMALL), SMALL, tmp_path / "x.pkl")
    assert distill("convert", "x.pkl", "--out", "m").code == 0
    stored = json.loads((tmp_path / "m/distill.json").read_text())
    assert (len(stored["classes"]), stored["null_label"]) == (3, None)
    (tmp_path / "m/distill.json").write_text(json.dumps(stored | {"null_label": 3}))  # as earlier versions converted it
    for command in ("sample", "pairs"):
        flag = "--model" if command == "sample" else "--teacher"
        result = distill(command, flag, "m", "--num", 2, "--steps", 2, "--guidance-scale", 2, "--out", "o")
        assert (result.code, "knows no null class" in result.err) == (2, True)
    data = tmp_path / "d"
    for name in "abc":
        (data / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(data / name / "1.png")
    options = ("cm", "--teacher", "m", "--data", data, "resolution=8", "batch_size=2", "sample_every=0", "scales=3")
    refused = distill(*options, "label_dropout=0.2", "--steps", 1, "--out", "r")
    assert refused.code == 2
    assert "label_dropout 0.2: m was trained without label dropout: it has no null class" in refused.err.replace("x was", "m was")
    done = distill(*options, "--steps", 1, "--out", "r")
    assert done.code == 0, done.err
    assert "label_dropout 0: x was trained without label dropout" in done.err
    assert "label_dropout: 0.0" in (tmp_path / "r/recipe.yaml").read_text()
    assert load("r").conditioner.null_label is None
    assert "label_dropout" not in distill("cm", "--resume", "r", "--steps", 2).err
    write_nvlabs(random_tensors(SMALL), SMALL | {"label_dropout": 0.1}, tmp_path / "dropped.pkl")
    assert distill("convert", "dropped.pkl", "--out", "n").code == 0
    assert load("n").conditioner.null_label == 3
    assert distill("sample", "--model", "n", "--num", 2, "--steps", 2, "--guidance-scale", 2, "--out", "g").code == 0

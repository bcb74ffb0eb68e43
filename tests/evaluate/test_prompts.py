"""Finished pictures of prompts: attributes, judges of one's own, the features of DINOv2, and how much pictures of one prompt differ."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from distill_cli.data.pictures import to_uint8
from distill_cli.data.shapes import HELD, render
from distill_cli.evaluate.attributes import ATTRIBUTES, shapes
from distill_cli.evaluate.distances import Statistics, frechet_of


@pytest.fixture(scope="module")
def drawn():
    """A picture of every fourth held-back caption, and the captions."""
    generator = torch.Generator().manual_seed(0)
    things = HELD[::4]
    x = torch.stack([render(thing, torch.rand(6, generator=generator, dtype=torch.float64)) for thing in things])
    return to_uint8(x), [thing.caption for thing in things], things


def test_shapes_are_read(drawn):
    """Each picture has what its caption says; under the caption of another, exactly the attributes that both share."""
    x, captions, things = drawn
    right = shapes(x, captions)
    assert all(bool(hits.all()) for hits in right.values())
    wrong = shapes(x, captions[1:] + captions[:1])
    for name in ATTRIBUTES:
        shared = [getattr(a, name) == getattr(b, name) for a, b in zip(things, (*things[1:], things[0]))]
        assert wrong[name].tolist() == shared
    nothing = shapes(np.full((1, 64, 64, 3), 250, np.uint8), captions[:1])
    assert not nothing["shape"].any()


@pytest.fixture
def dinov2(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    return model


def test_finished_pictures_of_prompts(drawn, dinov2, distill, tmp_path):
    x, captions, _ = drawn
    (tmp_path / "c.txt").write_text("\n".join(captions[:8]) + "\n")
    for name, order in {"right": range(16), "same": [k // 2 * 2 for k in range(16)]}.items():
        (tmp_path / name).mkdir()
        for k, place in enumerate(order):
            Image.fromarray(x[place]).save(tmp_path / name / f"{k:03d}.png")
    (tmp_path / "mine.py").write_text(
        "def judge(pictures, asked):\n    return {'large': ['large' in text for text in asked], 'first pixel': pictures[:, 0, 0, 0]}\n"
    )
    ended = distill(
        "evaluate", "--model", "right", "--model", "same", "--prompts", "c.txt", "images_per_prompt=2", "--features", "dinov2",
        "dinov2=dino", "--data", "right", "measures=frechet,diversity,memorisation", "--attributes", "shapes,mine:judge",
        "--out", "e", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    right, same, again = ended.json["rows"]
    assert right["dinov2_frechet"] == pytest.approx(0, abs=1e-6)
    assert same["dinov2_diversity"] == pytest.approx(0, abs=1e-3)
    assert right["dinov2_diversity"] > 0.5
    assert right["dinov2_copies"] == 1
    assert right["large"] == pytest.approx(np.mean(["large" in text for text in captions[:8]]))
    assert right["first_pixel"] == pytest.approx(x[:16, 0, 0, 0].mean())
    assert 0 < right["all_attributes_spread"] < 0.2
    assert again["model"] == "the reference, resampled"
    assert again["large"] is None
    # the distance is that of transformers' own class tokens, of pictures resized by Pillow
    mean, std = (np.array(each, np.float32) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = np.stack([np.asarray(Image.fromarray(each).resize((224, 224), Image.Resampling.BICUBIC)) for each in x[:16]])
    with torch.no_grad():
        seen = dinov2(torch.from_numpy((pixels / np.float32(255) - mean) / std).permute(0, 3, 1, 2).float()).last_hidden_state[:, 0]
    a, b = Statistics.of(seen[[k // 2 * 2 for k in range(16)]]), Statistics.of(seen)
    assert same["dinov2_frechet"] == pytest.approx(frechet_of(a, b), rel=1e-4)
    page = (tmp_path / "e/report.html").read_text()
    strip = page[page.index("same: all attributes") : page.index("same: first pixel")]
    hits = shapes(x[[k // 2 * 2 for k in range(16)]], [captions[k // 2] for k in range(16)])["all attributes"]
    assert strip.count("<div>0.00: ") == min(8, (~hits).sum())
    table = (tmp_path / "e/report.md").read_text()
    assert "| FD-DINOv2 |" in table
    assert "all attributes" in table
    stored = json.loads((tmp_path / "e/report.json").read_text())
    assert stored["columns"]["FD-DINOv2"] == ["dinov2_frechet", ".4f"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--attributes", "shape"), "attributes shape: no built-in judge, and not like module:function"),
        (("--attributes", "nowhere:judge"), "attributes nowhere:judge: cannot be imported (No module named 'nowhere')"),
        (("--attributes", "shapes", "--features", "dinov2"), "features dinov2: no network given"),
        (("--features", "clip"), "features clip: no network given"),
        (("--attributes", "shapes", "measures=frechet"), "measures is not for prompts unless features are of inception, dinov2 or clip"),
        (
            ("--features", "dinov2", "dinov2=dino", "measures=frechet"),
            "measures frechet: measured against real pictures, and none are given",
        ),
        (("--features", "dinov2", "dinov2=dino", "measures=diversity"), "measures diversity: one image for each prompt"),
    ],
)
def test_bad_input_is_one_line(arguments, says, dinov2, distill, tmp_path):
    (tmp_path / "c.txt").write_text("a circle\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "p").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "p/0.png")
    ended = distill("evaluate", "--model", "p", "--prompts", "c.txt", *arguments, "--out", "e")
    assert ended.code in (1, 2)
    assert says in ended.err
    assert not (tmp_path / "e").exists()
    empty = distill("evaluate", "--model", "p", "--prompts", "empty.txt", "--attributes", "shapes", "--out", "e")
    assert "empty.txt" in empty.err
    assert "no prompts" in empty.err

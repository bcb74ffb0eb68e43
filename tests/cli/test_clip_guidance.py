"""CLIP guidance by the command line, on models with random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from distill_cli.models import clip
from tests.cli.test_bad_input import one_line
from tests.models.test_clip import tiny

PROMPTS = ("a red circle", "a small blue square", "a green triangle")


@pytest.fixture
def place(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    tiny().save(tmp_path / "c")
    return tmp_path


def pictures(folder):
    return np.stack([np.asarray(Image.open(folder / json.loads(line)["file"])) for line in (folder / "samples.jsonl").open()])


@pytest.mark.parametrize("model", ["tiny", "tiny-sd"])
def test_guided_pictures_are_led(model, distill, place):
    """Of a model of pixels with classes, which is called under its null class, and of latents with text; in any batch the same."""
    sample = ("sample", "--model", model, "--prompts", "p.txt", "--steps", 4)
    guided = (*sample, "--clip-guidance", "c")
    first = distill(*guided, "--clip-scale", 1e-9, "--out", "plain")
    assert first.code == 0, first.err
    assert f"guidance by CLIP c at scale 1e-09 leads the unconditional estimate of {model}" in first.err
    strong = ("--clip-scale", 5)
    for name, more in (("all", ()), ("single", ("--batch-size", 1)), ("network", ("clip_through=network",))):
        done = distill(*guided, *strong, *more, "--out", name)
        assert done.code == 0, done.err
    shown = {name: pictures(place / name).astype(int) for name in ("plain", "all", "single", "network")}
    assert np.abs(shown["all"] - shown["single"]).max() <= 1
    assert all(np.abs(shown["all"] - shown[name]).max() > 1 for name in ("plain", "network"))
    settings = json.loads((place / "all/sampling.json").read_text())
    assert (settings["clip_scale"], settings["clip_through"], settings["clip_cutouts"]) == (5, "estimate", 0)
    assert [json.loads(line)["prompt"] for line in (place / "all/samples.jsonl").open()] == list(PROMPTS)
    one_line(distill(*guided, "--clip-scale", 6, "--out", "all"), 2, "clip_scale is 5.0, not 6.0")  # other settings


def test_what_clip_guidance_refuses(distill, place, tiny_pairs):
    (place / "empty").mkdir()
    (place / "text").mkdir()
    (place / "text/config.json").write_text('{"model_type": "clip_text_model"}')
    sample, asked = ("sample", "--model", "tiny", "--num", 1, "--steps", 1, "--out", "s"), ("--prompts", "p.txt")
    one_line(distill(*sample, "--clip-guidance", "c"), 2, "--clip-guidance: leads by prompts, and there are none")
    one_line(distill(*sample, *asked, "--clip-guidance", "none"), 2, "--clip-guidance none: no CLIP model of that name and no such folder")
    one_line(distill(*sample, *asked, "--clip-guidance", "empty"), 1, "--clip-guidance empty: no CLIP model: no config.json")
    one_line(distill(*sample, *asked, "--clip-guidance", "text"), 1, 'model_type "clip_text_model"')
    one_line(distill(*sample, *asked, "--clip-scale", 3), 2, "clip_scale needs clip_guidance")
    one_line(distill(*sample, *asked, "--clip-guidance", "c", "clip_cutouts=4"), 2, "clip_cutouts 4: the pictures' 16 pixels are no more")
    one_line(distill(*sample, *asked, "--clip-guidance", "c", "--classes", 3), 2, "--classes 3: not with CLIP guidance")
    made = distill("dmd", "--teacher", "tiny", "--pairs", tiny_pairs, "--steps", 1, "--batch-size", 2, "sample_every=0", "--out", "r")
    assert made.code == 0, made.err
    student = ("sample", "--model", "r", "--num", 1, *asked, "--clip-guidance", "c", "--out", "t")
    one_line(distill(*student), 2, "is a student, its guidance is built in")
    teacher = ("dmd", "--teacher", "tiny", "--pairs", tiny_pairs, "--clip-guidance", "c", "--out", "q")
    one_line(distill(*teacher), 2, "--clip-guidance: tiny has no text to tell a student")


def test_a_guided_teacher_of_a_student_with_text(distill, place):
    """dmd without pairs learns from the guided score: another student than without the guide, from the same start."""
    from safetensors.torch import load_file

    dmd = ("dmd", "--teacher", "tiny-sd", "--prompts", "p.txt", "--steps", 2, "--batch-size", 2, "regression_weight=0", "sample_every=0")
    for name, more in (("plain", ("--guidance-scale", 1)), ("led", ("--guidance-scale", 1, "--clip-guidance", "c", "--clip-scale", 5))):
        done = distill(*dmd, *more, "health_every=0", "--out", name)
        assert done.code == 0, done.err
    one, other = (load_file(place / name / "student/unet/diffusion_pytorch_model.safetensors") for name in ("plain", "led"))
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert "clip_guidance" in json.loads((place / "led/begun.json").read_text())


def test_a_dry_run_downloads_no_guide(distill, place, monkeypatch):
    """The plan says so, and goes on without it."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the hub"))
    asked = ("--clip-guidance", "openai/clip-vit-base-patch32", "--prompts", "p.txt", "--num", 2, "--dry-run")
    done = distill("sample", "--model", "tiny-sd", *asked)
    assert done.code == 0, done.err
    assert "--clip-guidance: openai/clip-vit-base-patch32 from the Hugging Face hub would be downloaded" in done.err
    planned = distill("dmd", "--teacher", "tiny-sd", "--prompts", "p.txt", "--clip-guidance", "c", "--guidance-scale", 1, "--dry-run")
    assert "guided: by CLIP c; the plan leaves out its calls" in planned.out


def test_the_built_in_model_scores_the_built_in_prompts(distill, place, monkeypatch):
    """Found by its name, and the default of evaluate's CLIP score for built-in prompts alone."""
    (place / "c").rename(place / "shapes-clip")
    monkeypatch.setattr(clip, "BUILTIN", place)
    monkeypatch.chdir(place.parent)
    assert clip.names() == ["shapes-clip"]
    evaluate = ("evaluate", "--model", "tiny-sd@1", "--num", 2, "--json")
    scores = [
        distill(*evaluate, "--prompts", "shapes-held", *more, "--out", place / f"e{k}").json["rows"][0]["clip_score"]
        for k, more in enumerate(((), ("--clip", "shapes-clip")))
    ]
    assert scores[0] == scores[1] > 0
    one_line(distill(*evaluate, "--prompts", place / "p.txt", "--out", place / "f"), 2, "measured by a CLIP model: none given")

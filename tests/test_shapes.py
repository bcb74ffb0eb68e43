"""The built-in text-to-image teacher by the outside judge, on captions that it was not trained on."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.shapes_judge import judge


def judged(distill, tmp_path, *options):
    model = () if "--model" in options else ("--model", "shapes")
    done = distill("sample", *model, "--prompts", "shapes-held", "--seed", 7, "--out", "s", *options)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "s/samples.jsonl").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(tmp_path / "s" / line["file"])) for line in lines])
    return judge(images, [line["prompt"] for line in lines])


def test_the_teacher_ships_small(distill):
    from distill_cli.models.sources.registry import BUILTIN

    assert sum(path.stat().st_size for path in (BUILTIN / "shapes").rglob("*") if path.is_file()) < 12e6
    shown = distill("models", "show", "shapes", "--json").json
    assert shown["pixels"] == 64
    assert shown["shape"] == [4, 8, 8]
    assert shown["parameterisation"] == "v"


@pytest.mark.slow
def test_the_teacher_paints_what_it_is_told(distill, tmp_path):
    """All five attributes of at least 95% of 96 held-out captions, 20 steps, guidance as recommended."""
    assert judged(distill, tmp_path, "--steps", 20)["all"] >= 0.95


@pytest.mark.slow
def test_it_needs_its_prompt(distill, tmp_path):
    """Led away from what is asked for, it is right far less often."""
    assert judged(distill, tmp_path, "--negative-prompt", "a large circle in the centre", "--guidance-scale", 8, "--steps", 10)["all"] < 0.8


def test_plain_diffusers_opens_it(tmp_path):
    """The folder that ships is a StableDiffusionPipeline; from the same latents it paints the same picture."""
    import diffusers
    import torch

    from distill_cli.data.pictures import to_uint8
    from distill_cli.diffusion.noise import Draws
    from distill_cli.models import load
    from distill_cli.models.sources.registry import BUILTIN

    prompts = ["a large red circle at the top left of a white background", "a small blue cross in the centre of a pink background"]
    model = load("shapes").with_prompts(prompts)
    draws = Draws(3, range(2))
    ours = to_uint8(model.sample(draws, torch.tensor([0, 1]), model.with_defaults(None, 10, None)))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(BUILTIN / "shapes", torch_dtype=torch.float32)
    latents = draws.normal("prior", model.shape)
    theirs = pipeline(
        prompts, latents=latents, num_inference_steps=10, guidance_scale=model.sampling.guidance_scale, output_type="np"
    ).images
    assert abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1
    found = judge(ours, prompts)
    assert found["all"] == 1.0


@pytest.mark.slow
def test_a_short_distillation_goes_most_of_the_way(distill, tmp_path):
    """40 steps take one evaluation from a blur to pictures that are mostly as told."""
    before = judged(distill, tmp_path, "--solver", "few-step")
    shutil.rmtree(tmp_path / "s")
    assert distill("pairs", "--recipe", "shapes-pairs", "--num", 144, "--steps", 10, "--out", "p").code == 0
    short = ("--steps", 40, "--batch-size", 32, "warmup_steps=10", "ema_halflife=600", "sample_every=0")
    run = distill("dmd", "--recipe", "shapes-dmd", "--pairs", "p", "--out", "r", *short)
    assert run.code == 0, run.err
    after = judged(distill, tmp_path, "--model", "r")
    assert before["all"] < 0.2
    assert after["all"] > 0.5

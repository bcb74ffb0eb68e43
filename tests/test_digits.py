"""The built-in teacher, and a short distillation of it, by the outside judge."""

import numpy as np
import pytest

from tests.judge import judge


def judged(distill, model, *options):
    assert distill("sample", "--model", model, "--format", "npz", "--out", f"judge-{len(options)}", *options).code == 0
    with np.load(f"judge-{len(options)}/samples.npz") as stored:
        return judge(stored["arr_0"], stored["arr_1"])


def test_the_teacher_ships_small(distill):
    from distill_cli.models.sources.registry import BUILTIN

    assert (BUILTIN / "digits/unet/diffusion_pytorch_model.safetensors").stat().st_size < 4e6
    shown = distill("models", "show", "digits", "--json").json
    assert shown["sampling"] == {"solver": "heun", "steps": 18, "guidance_scale": 1.0, "guidance_calls": 1}
    assert shown["null_label"] == 10
    assert 0.8e6 < shown["parameters"] < 2e6


@pytest.mark.slow
def test_the_teacher_is_good(distill):
    """By 500 pictures: the real ones, drawn 500 times, are 0.115 from themselves; 2,000 of the teacher's are 0.070 away (0.026)."""
    figures = judged(distill, "digits", "--num", 500, "--seed", 7)
    assert figures["accuracy"] >= 0.97
    assert figures["frechet"] <= 0.22
    assert figures["nearest"] >= 0.9
    assert 0.9 < figures["spread"] < 1.1
    assert figures["hue"] < 5.5  # a teacher without one of the hues would have 6.7


@pytest.mark.slow
def test_a_short_distillation_goes_most_of_the_way(distill):
    """40 steps take one evaluation from a blur (4.1) to digits that are mostly read right (0.42, an accuracy of 0.98)."""
    before = judged(distill, "digits", "--num", 400, "--seed", 7, "--solver", "few-step")
    assert distill("pairs", "--num", 200, "--steps", 9, "--out", "p").code == 0
    short = ("--steps", 40, "--batch-size", 32, "warmup_steps=10", "ema_halflife=600", "sample_every=0")
    run = distill("dmd", "--recipe", "demo-dmd", "--pairs", "p", "--out", "r", *short)
    assert run.code == 0, run.err
    after = judged(distill, "r", "--num", 400, "--seed", 7)
    assert before["frechet"] > 1.0
    assert after["frechet"] < 0.2 * before["frechet"]
    assert after["accuracy"] > 0.95 > before["accuracy"]

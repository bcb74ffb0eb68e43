"""Pairs and pictures by compiled networks, and by networks in another layout: the same as without."""

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from distill_cli.config import PairsConfig, SampleConfig
from distill_cli.diffusion.noise import Draws
from distill_cli.models import codec, compiled, load
from distill_cli.models.sampler import Sampling
from distill_cli.pairs.generate import generate
from distill_cli.pairs.store import PairStore
from distill_cli.sample.batch import sample
from tests.contracts.families import TRANSFORMERS, lacking

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def eager(monkeypatch):
    """Traced by torch, without a C++ compiler, which takes half a minute a graph."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """Networks as CUDA graphs have them: an answer is gone (here: nan) when any of them is asked again."""
    answers = []

    def compile_(part, backend, dynamic, mode=None):
        def call(*arguments, **named):
            for answer in answers:
                answer.fill_(torch.nan)
            answers.clear()
            out = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, part._call_impl(*arguments, **named))
            tree_map(lambda x: answers.append(x) if isinstance(x, torch.Tensor) else None, out)
            return out

        part._compiled_call_impl = call if mode == "reduce-overhead" else part._call_impl

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    monkeypatch.setattr(compiled, "check", lambda _: None)


@pytest.mark.parametrize(
    "options",
    [{}, dict(guidance_calls=2), dict(solver="dpm++"), dict(solver="heun"), dict(solver="few-step", guidance_scale=1.0), dict(steps=1)],
    ids=str,
)
@pytest.mark.parametrize("tiles", [None, 64])
def test_no_answer_of_a_graph_is_needed_after_the_next_one(options, tiles, graphs, monkeypatch):
    """Guided by one call or two, by solvers that remember; two pictures decoded one after the other, whole or in tiles."""
    model = load("tiny-sd").with_prompts(PROMPTS)
    if tiles:
        model = model.with_resolution(128).decoding(None, tiles)
    monkeypatch.setattr(codec, "AT_A_TIME", 1)
    asked = Draws(0, range(2)), torch.arange(2), Sampling(**dict(solver="ddim", steps=3, guidance_scale=2.0) | options)
    plain = model.sample(*asked)
    compiled.compile_model("whole", model, torch.device("cuda"))
    assert torch.equal(model.sample(*asked), plain)
    assert torch.isfinite(plain).all()


@pytest.mark.parametrize("family", ["tiny", *TRANSFORMERS, "tiny-sdxl", "tiny-sd3"])
def test_every_familys_networks_run_as_graphs(family, graphs):
    if lack := lacking(family):
        pytest.skip(lack)
    model = load(family)
    model = model.with_prompts(PROMPTS) if model.text is not None else model.copy()
    asked = Draws(0, range(2)), torch.arange(2), model.with_defaults(None, 2, None)
    plain = model.sample(*asked)
    compiled.compile_model("whole", model, torch.device("cuda"))
    assert torch.equal(model.sample(*asked), plain)


@pytest.mark.parametrize("options", [dict(compile="blocks"), dict(compile="whole"), dict(channels_last=True)], ids=str)
def test_pairs_and_pictures_are_the_same(options, tmp_path, eager, capsys):
    """A tiny Stable Diffusion's in a batch of two and one of one: pairs within 1e-5, pictures within 1 of 255."""
    pictures, pairs = [], []
    for name, more in (("plain", {}), ("fast", options)):
        asked = dict(num=3, batch_size=2, guidance_scale=2.0, device="cpu", **more)
        sample(SampleConfig(model="tiny-sd", steps=1, format="npz", **asked), load("tiny-sd").with_prompts(PROMPTS), tmp_path / name)
        pictures.append(np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int))
        config = PairsConfig(teacher="tiny-sd", steps=2, shard_size=3, dtype="float32", **asked)
        generate(config, load("tiny-sd").with_prompts(PROMPTS), tmp_path / f"{name}-pairs")
        pairs.append(PairStore(tmp_path / f"{name}-pairs").batch([0, 1, 2])["x0"])
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert (pairs[0] - pairs[1]).abs().max() <= 1e-5 * pairs[0].abs().max()
    said = {"blocks": "BasicTransformerBlock", "whole": "1 Decoder, 1 UNet2DConditionModel"}.get(options.get("compile"), "")
    assert said in capsys.readouterr().err
    for file in ("{}/sampling.json", "{}-pairs/manifest.json"):
        plain, fast = ((tmp_path / file.format(name)).read_text() for name in ("plain", "fast"))
        for key in options:
            assert key in fast
            assert key not in plain, "folders of older versions go on"


def test_channels_last_is_the_layout_of_weights_and_decoder():
    model = load("tiny-sd")
    compiled.prepare(SampleConfig(model="tiny-sd", channels_last=True), model, torch.device("cpu"))
    for network in (model.net, *model.codec.decoders()):
        assert all(value.is_contiguous(memory_format=torch.channels_last) for value in network.parameters() if value.ndim == 4)


def test_a_plan_says_from_how_many_pictures_on_compiling_pays(distill):
    """60 s, against 0.04 s for each of a batch's calls: 25 calls spare a second a batch of 8."""
    assert compiled.pays_from(8, Sampling(solver="ddim", steps=25)) == 480
    assert compiled.pays_from(8, Sampling(solver="ddim", steps=1)) == 12_000
    assert compiled.pays_from(8, Sampling(solver="ddim", steps=25, guidance_scale=2.0)) == 480
    assert compiled.pays_from(8, Sampling(solver="ddim", steps=25, guidance_scale=2.0, guidance_calls=2)) == 240
    for command in (["sample", "--model"], ["pairs", "--teacher"]):
        asked = [*command, "tiny", "solver=ddim", "steps=25", "batch_size=8", "--dry-run"]
        assert "compile: whole, pays from about 480 images a process on, in batches of one size" in distill(*asked, "compile=whole").out
        assert "pays from" not in distill(*asked).out


def test_what_was_made_otherwise_is_named(distill):
    """By the values that one could give; also by parts that do not fit together, and where times alone are looked for."""
    made = ("pairs", "--teacher", "tiny", "--num", 4, "--steps", 2, "shard_size=2")
    assert distill(*made, "--shards", "0/2", "--out", "a").code == 0
    assert distill(*made, "--shards", "1/2", "--out", "b", "channels_last=true").code == 0
    assert "made with other settings: channels_last is False, not True" in distill(*made, "--out", "a", "channels_last=true").err
    assert "made with other settings: channels_last is True, not False" in distill(*made, "--out", "b").err
    merged = distill("pairs", "--merge", "a", "--merge", "b", "--out", "c")
    assert "pairs of another job than a, whose channels_last is False, not True" in merged.err
    assert distill(*made, "--out", "a", "compile=none").code == 0
    shown = ("sample", "--model", "tiny", "--num", 2, "--steps", 1, "--out", "s")
    assert distill(*shown).code == 0
    assert "compile is none, not blocks" in distill(*shown, "compile=blocks").err
    assert "so --compile has no use here" in distill("sample", "--model", "tiny", "--search-times", 2, "compile=blocks").err


def test_a_model_is_said_to_be_compiled_once(eager, capsys):
    model = load("tiny")
    for _ in range(2):
        compiled.compile_model("whole", model, torch.device("cpu"))
    assert capsys.readouterr().err.count("compile whole: 1 UNet2DModel") == 1

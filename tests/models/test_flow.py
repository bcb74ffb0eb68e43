"""Folders of flow-matching models of pixels and of latents."""

from dataclasses import replace

import pytest
import torch

from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import FlowSchedule
from distill_cli.errors import DistillError
from distill_cli.models import formats, load
from distill_cli.models.sampler import Sampler
from distill_cli.models.stable_diffusion import create
from tests.contracts import diffusers_alone
from tests.contracts.families import pixels
from tests.models.test_foreign_folders import configure

DRAWS, LABELS = Draws(0, range(2)), torch.zeros(2, dtype=torch.long)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "m"
    pixels("flow").make(folder)
    return load(str(folder))


@pytest.mark.parametrize("own", [False, True])
def test_a_pixel_teachers_pictures_are_those_of_the_pipeline(made, own, tmp_path):
    """With distill.json, and as a foreign folder without it: shifted, in 6 steps and in 50."""
    model = replace(made, sampler=Sampler(solver="euler", steps=6 if own else 50))
    formats.save(model, tmp_path / "m")
    if not own:
        (tmp_path / "m/distill.json").unlink()
    again = load(str(tmp_path / "m"))
    assert (again.sampler.steps, again.denoiser.schedule) == (model.sampler.steps, FlowSchedule(2.0))
    theirs = diffusers_alone.pictures(tmp_path / "m", DRAWS, model.shape, [0, 0], ["", ""])
    assert (again.sample(DRAWS, LABELS) - theirs).abs().max() < 1e-4
    assert formats.format_of(again).in_diffusers(again).differs == ""


def test_what_the_pipeline_cannot_do_is_said(made):
    """It has no place for a list of times."""
    few = Sampler(solver="few-step", steps=2, knows="own times", answers="endpoint", guidance="inside", times=(1.0, 0.4))
    said = {
        Sampler.walking("euler", (1.0, 0.4)): "the scheduler's times",
        few: "the scheduler's times",
        Sampler.one_step(FlowSchedule()): "",
        Sampler(solver="ancestral", steps=6): "here it is sampled by ancestral",
    }
    for sampler, words in said.items():
        differs = formats.format_of(made).in_diffusers(replace(made, sampler=sampler)).differs
        assert words in differs
        assert bool(words) == bool(differs)


def test_latents_open_here_alone(tmp_path):
    """The pipeline cannot use the scheduler: the card says so, and a folder of others is refused."""
    from distill_cli.config import NetworkConfig, TextConfig

    tiny = load("tiny-sd")
    model = create(
        vae=tiny.codec.vae, tokenizer=tiny.text.tokenizers()["tokenizer"], pixels=64,
        network=NetworkConfig(channels=[8, 16], attention=[False, True], groups=4, head=8), text=TextConfig(width=16, layers=1, heads=2),
        scheduler=None, schedule=FlowSchedule(3.0), parameterisation="flow", lineage=tiny.lineage, guidance_scale=2.0, solver="euler",
    ).with_prompts(["a red circle"])  # fmt: skip
    formats.save(model, tmp_path / "m")
    again = load(str(tmp_path / "m")).with_prompts(["a red circle"])
    assert again.denoiser.schedule == FlowSchedule(3.0)
    assert torch.equal(again.sample(DRAWS, LABELS), model.sample(DRAWS, LABELS))
    assert "| in diffusers | not as distill samples it: StableDiffusionPipeline asks" in (tmp_path / "m/README.md").read_text()
    with pytest.raises(AttributeError, match="init_noise_sigma"):
        import diffusers

        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "m")("a red circle", num_inference_steps=2)
    (tmp_path / "m/distill.json").unlink()
    with pytest.raises(DistillError, match="FlowMatchEulerDiscreteScheduler in a StableDiffusionPipeline, which cannot use it"):
        load(str(tmp_path / "m"))
    configure(tmp_path / "m/model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    with pytest.raises(DistillError, match="FlowMatchEulerDiscreteScheduler is not read: it has no table of betas"):
        load(str(tmp_path / "m"))

"""StableDiffusionXLPipeline folders: the same pictures as diffusers, guided and told sizes, students there, and what cannot be read."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import codec as codecs
from distill_cli.models import cost, formats, load, sdxl
from distill_cli.models.sampler import Sampler, Sampling
from tests.contracts import diffusers_alone
from tests.models.test_foreign_folders import configure, rewrite

PROMPTS = ["a red circle", "a small blue square " * 9]
DRAWS, LABELS = Draws(0, range(2)), torch.tensor([1, 0])
TEXTS = [PROMPTS[k] for k in LABELS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl") / "m"
    formats.save(load("tiny-sdxl"), path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    """diffusers' own, as anyone opens it."""
    import diffusers

    made = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def theirs(pipeline, model, steps=4, scale=5.0, **options):
    latents = DRAWS.normal("prior", model.shape)
    made = pipeline(TEXTS, latents=latents, num_inference_steps=steps, guidance_scale=scale, output_type="np", **options)
    return torch.from_numpy(made.images).permute(0, 3, 1, 2) * 2 - 1


def ours(model, steps=4, scale=5.0):
    return model.sample(DRAWS, LABELS, model.with_defaults(None, steps, scale))


def same(one, other):
    return bool((one - other).abs().max() < 1e-4)


def test_a_teachers_pictures_are_those_of_diffusers(folder, pipeline):
    """By the folder's own scheduler, guided or not; a negative prompt that is not given is zeros, an empty one is encoded."""
    model = load(str(folder)).with_prompts(PROMPTS)
    assert model.sampling == Sampling(solver="euler", steps=50, guidance_scale=5.0)
    assert same(ours(model, 3, 1.0), theirs(pipeline, model, 3, 1.0))
    assert pipeline.config.force_zeros_for_empty_prompt
    found = {}
    for negative in (None, "", "green"):
        found[negative] = ours(load(str(folder)).with_prompts(PROMPTS, negative))
        assert same(found[negative], theirs(pipeline, model, negative_prompt=None if negative is None else [negative] * 2)), negative
    assert not same(found[None], found[""])
    assert not same(found[""], found["green"])
    assert ours(model).std() > 0.01


def test_without_zeros_an_empty_prompt_is_encoded(folder, pipeline, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    configure(tmp_path / "m/model_index.json", force_zeros_for_empty_prompt=False)
    model = load(str(tmp_path / "m")).with_prompts(PROMPTS)
    assert same(ours(model), theirs(pipeline, model, negative_prompt=[""] * 2))
    formats.save(model, tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text())["force_zeros_for_empty_prompt"] is False


@pytest.mark.parametrize("size", [(8, 8), (12, 12), (8, 12)])
def test_the_network_is_told_sizes_and_crops(folder, pipeline, size):
    """By default the whole picture of the size that is made; another one if asked, for the null condition too."""
    model = load(str(folder)).with_prompts(PROMPTS).with_size(size)
    height, width = (8 * side for side in size)
    whole = ours(model, 3)
    assert same(whole, theirs(pipeline, model, 3, height=height, width=width))
    told = replace(model, conditioner=model.conditioner.framed((200, 100), (16, 8), (48, 56)))
    sizes = dict(original_size=(200, 100), crops_coords_top_left=(16, 8), target_size=(48, 56))
    assert same(ours(told, 3), theirs(pipeline, model, 3, height=height, width=width, **sizes))
    assert not same(ours(told, 3), whole)
    cropped = replace(model, conditioner=model.conditioner.framed((200, 100), (16, 8)))
    assert cropped.conditioner.null.parts[sdxl.SIZES].tolist() == [[200, 100, 16, 8, height, width]]


def test_a_resolution_changes_what_is_told(folder):
    model = load(str(folder)).with_prompts(PROMPTS).with_resolution(96)
    assert model.conditioner(LABELS).parts[sdxl.SIZES].tolist() == [[96, 96, 0, 0, 96, 96]] * 2
    assert model.at((4, 8, 12)).conditioner.null.parts[sdxl.SIZES].tolist() == [[64, 96, 0, 0, 64, 96]]


SAVED = {
    "one step": lambda m: Sampler.one_step(m.denoiser.schedule),
    "one step, told 399": lambda m: Sampler.one_step(m.denoiser.schedule, 399.0),
    "four steps": lambda m: Sampler.renoising([999.0, 749.0, 499.0, 249.0], 4),
    "a walk": lambda m: Sampler.walking("ddim", [999.0, 499.0]),
}


@pytest.mark.parametrize("size", [None, (12, 12), (8, 12)])
@pytest.mark.parametrize("name", SAVED)
def test_students_open_in_plain_diffusers(name, size, tmp_path):
    model = load("tiny-sdxl").with_size(size)
    model.sampler = SAVED[name](model)
    if name == "four steps":
        model.denoiser.boundary = 10.0
    if name == "a walk":
        model.scheduler = {**model.scheduler, "_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "set_alpha_to_one": True}
    model.lineage = model.lineage.model_copy(update={"kind": "student", "method": "dmd"})
    formats.save(model, tmp_path / "m")
    again = load(str(tmp_path / "m")).with_prompts(PROMPTS)
    assert again.shape == model.shape
    assert again.conditioner.said == model.conditioner.said
    made = again.sample(DRAWS, LABELS)
    assert same(made, diffusers_alone.pictures(tmp_path / "m", DRAWS, model.shape, LABELS.tolist(), TEXTS))
    assert "| in diffusers | as distill samples it |" in (tmp_path / "m/README.md").read_text()
    with pytest.raises(UsageError, match="negative prompt is built in"):
        again.with_prompts(PROMPTS, "")


def test_a_student_told_its_scale(tmp_path):
    """StableDiffusionXLPipeline has a place for it."""
    model = load("tiny-sdxl")
    model.denoiser.network = model.backbone.told()
    torch.nn.init.normal_(model.net.time_embedding.cond_proj.weight, std=0.1)
    model.sampler = Sampler.renoising([999.0, 499.0], 2).with_told(4.0, (1.0, 8.0))
    model.denoiser.boundary = 10.0
    model.lineage = model.lineage.model_copy(update={"kind": "student", "method": "lcm"})
    formats.save(model, tmp_path / "m")
    again = load(str(tmp_path / "m")).with_prompts(PROMPTS)
    made = again.sample(DRAWS, LABELS)
    assert same(made, diffusers_alone.pictures(tmp_path / "m", DRAWS, model.shape, LABELS.tolist(), TEXTS))
    assert not same(made, again.sample(DRAWS, LABELS, again.with_defaults(None, None, 7.0)))


def test_embeddings_on_disk_hold_text_alone(tmp_path):
    """Sizes are no part of them, zeros are; the same files serve every size."""
    prompts = load("tiny-sdxl").with_prompts(PROMPTS).conditioner
    stored = prompts.stored(tmp_path, "float32")
    stored.complete(torch.device("cpu"))
    for part, value in prompts(LABELS).parts.items():
        assert torch.allclose(stored(LABELS).parts[part], value, atol=1e-5), part
    assert set(stored.table.names) == {"encoder_hidden_states", sdxl.POOLED}
    assert not any(value.any() for part, value in stored.null.parts.items() if part != sdxl.SIZES)
    assert stored.sized(96, 64)(LABELS).parts[sdxl.SIZES].tolist() == [[96, 64, 0, 0, 96, 64]] * 2
    empty = load("tiny-sdxl").with_prompts(PROMPTS, "").conditioner.stored(tmp_path, "float32")
    assert empty.table.folder != stored.table.folder
    assert empty.null.parts[sdxl.POOLED].any()


def test_an_autoencoder_that_wants_float32_gets_it(folder):
    """fp16 overflows in SDXL's; bf16 has the range. An autoencoder that says nothing is left as it is."""
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    codec = load(str(folder)).codec
    assert codec.upcast
    plain = codecs.VAECodec(codec.vae)
    with torch.no_grad():
        exact = codec.raw(z)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(codec.raw(z), exact)
            assert not torch.equal(plain.raw(z), exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(codec.raw(z), exact)


INDEX = "model_index.json"
BROKEN = {
    "the refiner": (lambda f: configure(f / INDEX, text_encoder=[None, None]), "its text_encoder is missing, not CLIPTextModel"),
    "no pooled text": (
        lambda f: configure(f / INDEX, text_encoder_2=["transformers", "CLIPTextModel"]),
        "text_encoder_2 is CLIPTextModel, ",
    ),
    "its folder is gone": (lambda f: shutil.rmtree(f / "text_encoder_2"), "text_encoder_2: no such folder"),
    "no second tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2: no such folder"),
    "zeros": (lambda f: configure(f / INDEX, force_zeros_for_empty_prompt="yes"), 'force_zeros_for_empty_prompt is "yes"'),
    "no projection": (
        lambda f: rewrite(f / "text_encoder_2/model.safetensors", lambda w: {k: v for k, v in w.items() if k != "text_projection.weight"}),
        "text_projection.weight is missing",
    ),
    "other sizes": (
        lambda f: configure(f / "unet/config.json", addition_time_embed_dim=16),
        "is 64, but the pooled text has 16 .* sizes 16",
    ),
    "no sizes": (
        lambda f: (
            configure(f / "unet/config.json", drop=("addition_embed_type",)),
            rewrite(
                f / "unet/diffusion_pytorch_model.safetensors", lambda w: {k: v for k, v in w.items() if not k.startswith("add_embedding")}
            ),
        ),
        "addition_embed_type is null",
    ),
    "means": (lambda f: configure(f / "vae/config.json", latents_mean=[0.1] * 4), "latents_mean is"),
    "tokens": (lambda f: configure(f / "tokenizer/tokenizer_config.json", model_max_length=12), "make 12 and 16 tokens"),
    "too many": (lambda f: configure(f / "tokenizer_2/tokenizer_config.json", model_max_length=20), "it reads 16 tokens, .* makes 20"),
    "flow matching": (
        lambda f: configure(f / "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
        "FlowMatchEulerDiscreteScheduler is not read",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_said_in_one_line(name, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    breaking, message = BROKEN[name]
    breaking(tmp_path / "m")
    with pytest.raises(DistillError, match=message) as caught:
        load(str(tmp_path / "m"))
    assert "\n" not in caught.value.message


def test_the_published_architecture_without_weights():
    """The parameters that the published networks have: "2.6B" of the UNet (2307.01952, table 1)."""
    model = cost.sketch("sdxl")
    counts = {part: sum(p.numel() for p in network.parameters()) for part, network in model.parts().items()}
    assert counts == {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}
    assert (model.pixels, model.lineage.licence) == (1024, "CreativeML Open RAIL++-M")
    assert model.conditioner.said == (1024, 1024, 0, 0, 1024, 1024)

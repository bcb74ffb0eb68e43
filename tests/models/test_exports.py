"""Exports are what other programs read: diffusers' own readers give back the same picture, and the same LoRA."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill_cli.errors import DistillError
from distill_cli.models import exports, load
from distill_cli.models.backbones import UNet2DCondition
from distill_cli.models.cost import sketch
from distill_cli.models.original import original
from distill_cli.tensors import write
from tests.models import pipelines

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "net.0.proj", "net.2", "conv1", "conv2", "conv_shortcut",
           "time_emb_proj", "samplers.0.conv")  # fmt: skip
VERSIONS = {"1": dict(version=1), "2": dict(version=2, prediction="v_prediction", zero=True), "XL": dict(version=3)}


class Adapter(UNet2DCondition):
    """A stand-in for a LoRA student's network."""

    def __init__(self, net, tensors):
        super().__init__(net)
        self.low = tensors

    def tensors(self):
        return self.low

    def merged(self):
        out = UNet2DCondition(self.net).fresh()
        state = dict(self.net.state_dict())
        for name in self.low:
            if name.endswith("lora_A.weight"):
                weight = name.replace("lora_A.", "")
                a, b = self.low[name].flatten(1), self.low[name.replace("lora_A", "lora_B")].flatten(1)
                state[weight] = state[weight] + (b @ a).reshape(state[weight].shape)
        out.net.load_state_dict(state)
        return out


@pytest.fixture(scope="module", params=VERSIONS)
def pipe(request, tmp_path_factory):
    """A small pipeline, its folder, and its picture."""
    made = pipelines.pipeline(**VERSIONS[request.param])
    folder = tmp_path_factory.mktemp("pipe") / "folder"
    made.save_pretrained(folder)
    return made, folder, pipelines.picture(made)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Stable Diffusion 1 in miniature: the folder."""
    folder = tmp_path_factory.mktemp("first") / "folder"
    pipelines.pipeline(1).save_pretrained(folder)
    return folder


def test_diffusers_reads_the_single_file(pipe, tmp_path):
    """The same picture, from the folder's configuration and the file's weights: none of the folder's own are there."""
    made, folder, picture = pipe
    write(tmp_path / "x.safetensors", original(pipelines.networks(made)))
    for weights in folder.rglob("*/*.safetensors"):
        weights.rename(weights.with_suffix(".gone"))
    back = type(made).from_single_file(tmp_path / "x.safetensors", config=str(folder), local_files_only=True)
    for weights in folder.rglob("*/*.gone"):
        weights.rename(weights.with_suffix(".safetensors"))
    back.set_progress_bar_config(disable=True)
    assert torch.allclose(pipelines.picture(back), picture, atol=1e-5)


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_command_writes_what_we_read_and_says_what_it_predicts(version, tmp_path, distill):
    """Bit for bit; the file's own marks win over a configuration that says eps."""
    made = pipelines.pipeline(**VERSIONS[version])
    made.save_pretrained("folder")
    done = distill("export", "folder", "--to", "single-file", "--json")
    assert done.code == 0, done.err
    assert "no published Stable Diffusion reads text of 16 channels" in done.err
    made.scheduler.register_to_config(prediction_type="epsilon", rescale_betas_zero_snr=False)
    made.scheduler.save_pretrained("folder/scheduler")
    for weights in tmp_path.glob("folder/*/*.safetensors"):
        weights.unlink()
    (tmp_path / "folder.safetensors").rename("folder/x.safetensors")
    back, networks = load("folder/x.safetensors"), pipelines.networks(made)
    for part, network in back.parts().items():
        assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), networks[part].state_dict().values(), strict=True))
    v = version == "2"
    assert (back.denoiser.parameterisation, back.denoiser.schedule.alphas_cumprod[-1] == 0) == ("v" if v else "eps", v)


@pytest.mark.parametrize(("name", "act"), [("sd15", "quick_gelu"), ("sd21", "gelu")])
def test_published_architectures_have_the_published_names(name, act):
    """Without weights. Names of v1-5-pruned-emaonly.safetensors and v2-1_768-ema-pruned.safetensors, which diffusers' readers know."""
    model = sketch(name)
    parts = model.parts()
    parts["text_encoder"].config.hidden_act = act
    made = original(parts)
    place = "model.diffusion_model.output_blocks."
    assert made[f"{place}11.0.skip_connection.weight"].shape == (320, 640, 1, 1)
    assert made[f"{place}5.2.conv.weight"].shape == (1280, 1280, 3, 3)
    assert made[f"{place}2.1.conv.bias"].shape == (1280,)
    assert made["first_stage_model.decoder.up.0.block.2.conv2.weight"].shape == (128, 128, 3, 3)
    assert made["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    if act == "gelu":
        assert made["cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight"].shape == (3072, 1024)


def test_a_number_too_large_for_half_precision_is_refused(first, tmp_path):
    model = load(str(first))
    model.net.conv_in.bias.fill_(1e5)
    with pytest.raises(DistillError, match=r"model.diffusion_model.input_blocks.0.0.bias has numbers that float16 cannot hold"):
        exports.single_file(model, tmp_path / "x.safetensors", torch.float16)
    assert not list(tmp_path.iterdir())


def student(folder):
    model = load(str(folder))
    model.denoiser.network = Adapter(model.net, pipelines.adapter(model.net, 3, 0, TARGETS))
    return model


@pytest.mark.parametrize("target", ["single-file", "folder"])
def test_a_lora_student_is_merged(target, first, tmp_path):
    """Into one file, or into a folder that diffusers opens: the picture of the base with the LoRA beside it."""
    model, out = student(first), tmp_path / "x.safetensors"
    notes = exports.TARGETS[target].write(model, out, torch.float32)
    assert "its LoRA is merged into the weights of its base" in notes[0]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(first)
    pipe.load_lora_weights({f"unet.{name}": value for name, value in model.backbone.tensors().items()})
    kind = diffusers.StableDiffusionPipeline
    back = kind.from_pretrained(out) if target == "folder" else kind.from_single_file(out, config=str(first), local_files_only=True)
    for each in (pipe, back):
        each.set_progress_bar_config(disable=True)
    torch.testing.assert_close(pipelines.picture(back), pipelines.picture(pipe), atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["lora-kohya", "lora-comfyui"])
def test_diffusers_converts_the_lora_back(pipe, target, tmp_path, monkeypatch):
    """The same keys and values; the names are diffusers' for 1 and 2, and the original blocks' for XL, as in kohya's scripts."""
    made, _, _ = pipe
    tensors, xl = pipelines.adapter(made.unet, 3, 0, TARGETS), "text_encoder_2" in made.components
    model = load("tiny-sd")
    model.denoiser.network = Adapter(made.unet, tensors)
    monkeypatch.setattr(exports, "_stable_diffusion", lambda *_: xl)
    exports.TARGETS[target].write(model, tmp_path / "x.safetensors", torch.float32)
    stored = load_file(tmp_path / "x.safetensors")
    first = "lora_unet_input_blocks_3_1_" if xl else "lora_unet_down_blocks_0_attentions_0_"
    assert f"{first}transformer_blocks_0_attn1_to_q.lora_down.weight" in stored
    assert {value.item() for name, value in stored.items() if name.endswith(".alpha")} == {3.0}
    back, alphas = type(made).lora_state_dict(dict(stored), unet_config=made.unet.config)[:2]
    back = diffusers.utils.convert_unet_state_dict_to_peft({name.removeprefix("unet."): value for name, value in back.items()})
    assert set(alphas.values()) == {3.0}
    assert {name.replace(".processor", "") for name in back} == set(tensors)
    assert all(torch.equal(value, tensors[name.replace(".processor", "")]) for name, value in back.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "3", "3.0")


def test_what_a_target_cannot_hold_is_refused_in_one_line(first, distill, tmp_path):
    cases = {
        ("tiny", "single-file"): "single-file holds Stable Diffusion 1, 2 and XL with noise or v prediction, not a edm model",
        ("tiny-sd3", "single-file"): "not a flow model of a StableDiffusion3Pipeline",
        ("tiny-sd", "lora-kohya"): "lora-kohya is for LoRA students: this model has whole weights",
        ("tiny-sd", "lora"): "--to lora: none of single-file, lora-kohya, lora-comfyui, folder",
    }
    for (model, target), message in cases.items():
        done = distill("export", model, "--to", target)
        assert done.code in (1, 2)
        assert message in done.err.splitlines()[-2], done.err
    assert "--dtype int8: none of" in distill("export", "tiny", "--to", "folder", "--dtype", "int8").err
    assert "exists already" in distill("export", "tiny", "--to", "folder", "--out", tmp_path).err
    assert "single-file writes a .safetensors file" in distill("export", "tiny-sd", "--to", "single-file", "--out", "x.ckpt").err
    model = student(first)
    model.backbone.low = pipelines.adapter(model.net, 2, 0, ["conv_in", "to_q"])
    with pytest.raises(DistillError, match="kohya's scripts have no LoRA for conv_in"):
        exports.TARGETS["lora-kohya"].write(model, tmp_path / "x.safetensors", torch.float32)


def test_a_network_without_a_place_in_the_layout_is_refused(first):
    model = load(str(first))
    told = replace(model, denoiser=model.copy().denoiser)
    told.denoiser.network = told.backbone.told()
    with pytest.raises(DistillError, match=r"unet: time_embedding.cond_proj.weight has no place in the original layout"):
        original(told.parts())


def test_a_folder_in_half_precision(distill):
    done = distill("export", "tiny", "--to", "folder", "--dtype", "float16", "--out", "half", "--json")
    assert done.code == 0, done.err
    assert {value.dtype for value in load_file("half/unet/diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    assert done.json["bytes"] == sum(file.stat().st_size for file in Path("half").rglob("*") if file.is_file())

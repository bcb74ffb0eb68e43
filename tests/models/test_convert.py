"""Published files: the papers' own numbers through the converter, layouts, and hostile files."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from distill_cli.diffusion.condition import NOTHING
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import load
from distill_cli.models.edm import EDMUNet
from distill_cli.models.sampler import Sampling
from distill_cli.models.sources import convert, unpickle
from distill_cli.models.sources.convert import convert_file, model_of, open_file, place
from tests.conditions import of
from tests.models.published import CIFAR10, IMAGENET64, Persistent, dump, nvlabs_shapes, openai_shapes, write_nvlabs

GOLDEN = Path(os.environ.get("DISTILL_GOLDEN", Path(__file__).parents[2].parent / "shared/golden"))
NVLABS = ("edm_net_adm", "edm_net_ddpmpp", "edm_net_ncsnpp")
SMALL = dict(CIFAR10, img_resolution=8, model_channels=16, num_blocks=1, attn_resolutions=[4], channel_mult=[1, 2], label_dim=3)


def golden(name):
    here = Path(__file__).parents[1] / "golden" / f"{name}.safetensors"
    path = here if here.exists() else GOLDEN / here.name
    if not path.exists():
        pytest.skip(f"{path} is absent: set DISTILL_GOLDEN")
    with safe_open(path, "pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        kwargs = json.loads(handle.metadata()["init_kwargs"])
    return tensors, {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}, kwargs


def random_tensors(kwargs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in nvlabs_shapes(kwargs).items()}


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("name", NVLABS)
def test_nvlabs_networks_are_the_papers(name, tmp_path):
    """Written as a pickle, converted, loaded from the folder: raw network, null class and denoiser in float64."""
    g, state, kwargs = golden(name)
    convert_file(write_nvlabs(state, kwargs, tmp_path / "x.pkl"), tmp_path / "m")
    model = load(str(tmp_path / "m"))
    model.denoiser.double()
    labels = g["class_labels"].argmax(1) if kwargs["label_dim"] else None
    condition = NOTHING if labels is None else of(labels)
    c_in = (g["sigma"] ** 2 + 0.25).rsqrt().view(-1, 1, 1, 1)
    with torch.no_grad():
        close(model.denoiser(g["x"], g["sigma"], condition), g["denoised"])
        close(model.denoiser.network(c_in * g["x"], g["sigma"].log() / 4, condition), g["raw"])
        if labels is not None:
            null = torch.full_like(labels, len(model.conditioner.classes))
            assert model.conditioner.null_label is None  # never trained: published without label dropout
            close(model.denoiser.network(c_in * g["x"], g["sigma"].log() / 4, of(null)), g["raw_null"])


@pytest.mark.parametrize("kind", ["edm", "cd"])
def test_openai_networks_are_the_papers(kind, tmp_path):
    g, state, kwargs = golden("openai_net")
    path = tmp_path / f"{kind}_imagenet64.pt"
    torch.save(state, path)
    found = convert_file(path, tmp_path / "m", kwargs["image_size"])
    model = load(str(tmp_path / "m"))
    assert found["kind"] == model.lineage.kind == ("teacher" if kind == "edm" else "student")
    model.denoiser.double()
    c_in = (g["sigma"] ** 2 + 0.25).rsqrt().view(-1, 1, 1, 1)
    with torch.no_grad():
        close(model.denoiser(g["x"], g["sigma"], of(g["class_labels"])), g["denoised" if kind == "edm" else "consistency"])
        close(model.denoiser.network(c_in * g["x"], 250 * g["sigma"].log(), of(g["class_labels"])), g["raw"])


@pytest.mark.parametrize("name", NVLABS)
def test_the_layouts_of_the_tests_are_those_of_the_golden_files(name):
    _, state, kwargs = golden(name)
    assert {k: tuple(v.shape) for k, v in state.items()} == nvlabs_shapes(kwargs)


@pytest.mark.parametrize(("kwargs", "parameters"), [(IMAGENET64, 295.9e6), (CIFAR10, 55.7e6)])
def test_full_size_networks_take_every_tensor(kwargs, parameters):
    with torch.device("meta"):
        _, network = convert.nvlabs_network(kwargs)
        tensors = {name.removeprefix("model."): torch.empty(shape) for name, shape in nvlabs_shapes(kwargs).items()}
    placed = place(network, tensors, convert.nvlabs_name, convert.interleaved)
    assert placed.keys() == network.state_dict().keys()
    assert sum(v.numel() for v in placed.values()) == pytest.approx(parameters, rel=1e-3)
    if kwargs is IMAGENET64:
        assert len(placed) == 629


def test_the_layout_of_openais_file_is_that_of_the_golden_one():
    _, state, kwargs = golden("openai_net")
    assert {k: tuple(v.shape) for k, v in state.items()} == openai_shapes(**OPENAI)
    assert kwargs["model_channels"] == OPENAI["channels"]


OPENAI = dict(channels=64, mults=(1, 2), blocks=1, attention=(False, True), classes=5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blocks": 3},
        {"mults": (1, 2, 2), "attention": (False, True, True), "blocks": 2},
        {"classes": 0},
        {"scale_shift": False},
        {"attention": (True, True)},
    ],
)
def test_openai_files_of_other_configurations_are_placed(changes, tmp_path):
    shapes = openai_shapes(**OPENAI | changes)
    tensors = {name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}
    torch.save(tensors, tmp_path / "edm_x64.pt")
    found = convert_file(tmp_path / "edm_x64.pt", tmp_path / "m", 16)
    attended = sum("qkv" in name for name in tensors) // 2
    assert found["tensors"] == len(tensors) + 4 * attended
    assert found["classes"] == {**OPENAI, **changes}["classes"]
    unet = load(str(tmp_path / "m")).net
    last = len((OPENAI | changes)["mults"]) - 1
    assert torch.equal(
        unet.up_blocks[last].resnets[0].conv1.weight,
        tensors[f"output_blocks.{last * ((OPENAI | changes)['blocks'] + 1)}.0.in_layers.2.weight"],
    )
    assert open_file(tmp_path / "edm_x64.pt").network.config.sample_size == 64  # the number in the name


@pytest.mark.parametrize(
    "changes",
    [
        {"label_dim": 0},
        {"img_channels": 1},
        {"num_blocks": 2, "channel_mult": [1, 2, 2, 4], "img_resolution": 16, "attn_resolutions": [8, 2]},
        {
            "encoder_type": "residual",
            "resample_filter": [1, 3, 3, 1],
            "embedding_type": "fourier",
            "channel_mult_noise": 2,
            "channel_mult": [1, 2, 3],
            "img_resolution": 16,
        },
        {"model_type": "DhariwalUNet", "channel_mult": [1, 2, 2], "model_channels": 64, "img_resolution": 16, "attn_resolutions": [8, 4]},
    ],
)
def test_nvlabs_files_of_other_configurations_are_placed(changes, tmp_path):
    kwargs = SMALL | changes
    if kwargs["model_type"] == "DhariwalUNet":
        kwargs = {k: kwargs[k] for k in (*IMAGENET64,)}
    tensors = random_tensors(kwargs)
    found = convert_file(write_nvlabs(tensors, kwargs, tmp_path / "x.pkl"), tmp_path / "m")
    kept = [name for name in tensors if not convert.DROPPED.search(name)]
    assert found["tensors"] == len(kept) + 4 * sum("qkv.weight" in name for name in kept)
    model = load(str(tmp_path / "m"))
    labels = torch.zeros(2, dtype=torch.long)
    assert torch.isfinite(model.sample(Draws(0, range(2)), labels, Sampling(steps=2))).all()
    if found["classes"]:  # without labels the network is the one of the null class
        x, t = torch.randn(2, *model.shape), torch.zeros(2)
        null = torch.full((2,), found["classes"])
        assert torch.equal(model.net(x, t)[0], model.net(x, t, null)[0])


def test_orders_of_attention_weights():
    """Two heads of two channels: NVlabs interleaves q, k, v inside a head, OpenAI stacks three blocks."""
    names = torch.arange(12).float()
    assert [v.tolist() for v in convert.interleaved(names, 2)] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert [v.tolist() for v in convert.blocks(names, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_conversion_keeps_every_bit(tmp_path):
    tensors = random_tensors(SMALL)
    found = convert_file(write_nvlabs(tensors, SMALL, tmp_path / "x.pkl"), tmp_path / "m")
    assert (found["format"], found["architecture"], found["classes"]) == ("NVlabs pickle", "DDPM++", 3)
    assert "CC BY-NC-SA" in found["licence"]
    network = load(str(tmp_path / "m")).net
    assert isinstance(network, EDMUNet)
    assert torch.equal(network.enc["8x8_block0"].resnet.conv1.weight, tensors["model.enc.8x8_block0.conv0.weight"])
    assert torch.equal(network.conv_out.bias, tensors["model.dec.8x8_aux_conv.bias"])
    assert "map_augment.weight" not in network.state_dict()
    again = EDMUNet.from_pretrained(tmp_path / "m/unet")  # an ordinary diffusers model
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(x, torch.zeros(2))[0], network(x, torch.zeros(2))[0])


def test_arguments_that_a_file_leaves_out_are_the_published_defaults():
    """SongUNet's own defaults: 128 channels, [1, 2, 2, 2], 4 blocks, attention at 16."""
    with torch.device("meta"):
        name, network = convert.nvlabs_network({"img_resolution": 64, "img_channels": 3, "model_type": "SongUNet"})
    assert name == "DDPM++"
    assert (network.config.model_channels, network.config.channel_mult, network.config.num_blocks) == (128, (1, 2, 2, 2), 4)
    assert network.enc["16x16_block0"].attention is not None
    assert network.enc["32x32_block0"].attention is None


@pytest.mark.parametrize("spoil", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_are_named(spoil, tmp_path):
    tensors = random_tensors(SMALL)
    name = "model.enc.8x8_block0.conv0.weight"
    value = tensors.pop(name)
    if spoil == "extra":
        tensors |= {name: value, "model.enc.8x8_block0.conv9.weight": value}
    if spoil == "shape":
        tensors[name] = value[:, :-1]
    with pytest.raises(DistillError, match=r"x.pkl: (enc.8x8_block0.resnet.conv1.weight is not|tensor enc.8x8_block0.conv[09].weight has)"):
        open_file(write_nvlabs(tensors, SMALL, tmp_path / "x.pkl"))


def test_numpy_scalars_of_both_generations_are_numbers(tmp_path):
    import numpy as np

    stream = pickle.dumps({"ema": np.float64(0.5), "n": np.int32(7)}, protocol=4)
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    for content in (stream, stream.replace(bytes([len(new)]) + new, bytes([len(old)]) + old)):
        content = content[:3] + struct.pack("<Q", len(content) - 11) + content[11:]
        (tmp_path / "x.pkl").write_bytes(content)
        assert unpickle.read(tmp_path / "x.pkl") == {"ema": 0.5, "n": 7}


def test_truncated_files_are_refused(tmp_path):
    path = write_nvlabs(random_tensors(SMALL), SMALL, tmp_path / "x.pkl")
    content = path.read_bytes()
    for size in (1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DistillError, match="x.pkl: "):
            open_file(path)


def test_other_objects_are_said(tmp_path):
    with pytest.raises(DistillError, match="no EDM network in the file, but StyleGAN"):
        open_file(dump({"ema": Persistent("StyleGAN", {})}, tmp_path / "x.pkl"))
    with pytest.raises(UsageError, match="no such file"):
        open_file(tmp_path / "nothing.pkl")


def test_the_command(distill, tmp_path):
    write_nvlabs(random_tensors(SMALL), SMALL, tmp_path / "x.pkl")
    done = distill("convert", "x.pkl", "--out", "m", "--json")
    assert done.code == 0, done.err
    assert done.json["tensors"] == len(load("m").net.state_dict())
    assert distill("convert", "x.pkl", "--out", "m").code == 2
    assert load("m").sampling.steps == 18
    (tmp_path / "x.pkl").rename(tmp_path / "edm-ffhq-64x64-uncond-vp.pkl")
    assert distill("convert", "edm-ffhq-64x64-uncond-vp.pkl", "--out", "f").code == 0
    assert (load("f").lineage.name, load("f").sampling.steps) == ("edm-ffhq64", 40)
    shown = distill("models", "show", "m").out
    assert "CC BY-NC-SA 4.0" in shown
    assert distill("pairs", "--teacher", "m", "--num", 4, "--steps", 2, "--out", "p").code == 0
    run = distill("dmd", "--teacher", "m", "--pairs", "p", "--steps", 1, "--out", "r", "batch_size=2")
    assert run.code == 0, run.err
    assert load("r").lineage.licence == "CC BY-NC-SA 4.0 (NVIDIA)"


def test_a_converted_teacher_in_a_loop_of_plain_diffusers(tmp_path):
    """The saved scheduler states the time input: EDMEulerScheduler's times are ln(sigma) / 4."""
    from diffusers import EDMEulerScheduler

    convert_file(write_nvlabs(random_tensors(SMALL), SMALL, tmp_path / "x.pkl"), tmp_path / "m")
    model = load(str(tmp_path / "m"))
    network, scheduler = EDMUNet.from_pretrained(tmp_path / "m/unet").eval(), EDMEulerScheduler.from_pretrained(tmp_path / "m/scheduler")
    scheduler.set_timesteps(6)
    draws, labels = Draws(0, range(2)), torch.tensor([0, 2])
    x = draws.normal("prior", model.shape) * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t, labels)[0], t, x).prev_sample
    ours = model.sample(draws, labels, Sampling(solver="euler", steps=6))
    assert (ours - x.clamp(-1, 1)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.xdist_group("memory")
def test_full_size_cifar10_makes_pairs_and_distils(distill, tmp_path):
    tensors = {name: value * (0.2 if value.ndim > 1 else 1) for name, value in random_tensors(CIFAR10).items()}
    write_nvlabs(tensors, CIFAR10, tmp_path / "edm-cifar10.pkl")
    del tensors
    assert distill("convert", "edm-cifar10.pkl", "--out", "m", "--json").json["parameters"] == pytest.approx(55.7e6, rel=1e-3)
    settings = json.loads((tmp_path / "m/distill.json").read_text())
    settings["sampler"]["steps"] = 2  # the picture at the end of dmd samples the teacher, which takes minutes with 18 steps here
    (tmp_path / "m/distill.json").write_text(json.dumps(settings))
    assert distill("pairs", "--teacher", "m", "--num", 4, "--batch-size", 4, "--out", "p").code == 0
    run = distill("dmd", "--teacher", "m", "--pairs", "p", "--steps", 2, "--out", "r", "batch_size=2", "sample_every=0", "keep=1")
    assert run.code == 0, run.err
    assert "student: r/student" in run.out


def test_consistency_students_sample(tmp_path):
    _, state, kwargs = golden("openai_net")
    torch.save(state, tmp_path / "cd_x.pt")
    model = model_of(open_file(tmp_path / "cd_x.pt", kwargs["image_size"]), "x")
    images = model.sample(Draws(0, range(2)), model.conditioner.labels(2))
    assert images.shape == (2, 3, 16, 16)
    assert model.sampler.times == pytest.approx([80.0, 1.38237], rel=1e-4)  # the published two-step times
    assert model.sampling.steps == 1

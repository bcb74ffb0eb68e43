"""compile, channels_last and gradient_checkpointing: the same numbers, names and resumes, and what is refused."""

import copy
import json
import os

import pytest
import torch

from distill_cli.config import TrainingConfig
from distill_cli.errors import UsageError
from distill_cli.models import compiled, load
from distill_cli.models.autoencoder import create
from distill_cli.training.placed import check, placed
from tests.contracts.families import lacking, moons
from tests.fake_card_cases import edm
from tests.training.test_engine import NETWORK, engine_of, same, weights


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Trace and differentiate as inductor does, and leave the kernels to torch: a C++ compiler takes half a minute a graph here."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def gradients(model, settings):
    """The output of a model's trained network on fixed inputs, and its gradients by name."""
    torch.manual_seed(0)
    backbone = model.copy().backbone.requires_grad_(True)
    counted = placed(TrainingConfig(**settings), backbone, torch.device("cpu"), trained=True)
    x, t = torch.randn(2, *model.shape), torch.tensor([3.0, 400.0])
    out = backbone(x, t, model.conditioner.example(2, "cpu"))
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in backbone.named_parameters()}, counted


BLOCKS = {"tiny": ({"ResnetBlock2D"}, "UNet2DModel"), "tiny-sd": ({"ResnetBlock2D", "BasicTransformerBlock"}, "UNet2DConditionModel")}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "settings", [{"compile": "blocks"}, {"compile": "whole"}, {"channels_last": True}, {"gradient_checkpointing": True}], ids=str
)
def test_options_change_no_number(name, settings):
    model = load(name)
    plain, theirs, _ = gradients(model, {})
    out, ours, counted = gradients(model, settings)
    assert (out - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert ours.keys() == theirs.keys(), "the names in a state dict stay"
    scale = max(grad.abs().max() for grad in theirs.values())
    assert max((ours[key] - theirs[key]).abs().max() for key in theirs) <= 1e-5 * scale
    blocks, whole = BLOCKS[name]
    if settings.get("compile") == "blocks":
        assert counted.keys() >= blocks
    else:
        assert dict(counted) == ({whole: 1} if "compile" in settings else {})


REPEATED = {
    "tiny": {"ResnetBlock2D": 8, "Attention": 4},
    "tiny-sd": {"ResnetBlock2D": 8, "BasicTransformerBlock": 4},
    "tiny-sdxl": {"ResnetBlock2D": 8, "BasicTransformerBlock": 8},
    "tiny-sd3": {"JointTransformerBlock": 2},
    "tiny-sana": {"SanaTransformerBlock": 2},
    "tiny-lumina2": {"Lumina2TransformerBlock": 4},
    "tiny-z-image": {"ZImageTransformerBlock": 4},
    "tiny-klein": {"Flux2TransformerBlock": 1, "Flux2SingleTransformerBlock": 2},
    "edm": {"Block": 10},
    "moons": {"Block": 2},
}
"""How many blocks of each class the networks of a family have."""


@pytest.mark.parametrize("name", REPEATED)
def test_the_blocks_that_a_family_names_are_in_its_network(name, tmp_path, monkeypatch):
    """All that are named, as often as they are there, and nothing else."""
    if why := lacking(name):
        pytest.skip(why)
    make, place, parts = {"edm": edm, "moons": moons}.get(name), tmp_path / "model", []
    if make:
        make(place)
    model = load(str(place) if make else name)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **_: parts.append(part))
    counted = compiled.compile_network(model.denoiser, "blocks")
    assert counted == REPEATED[name]
    assert counted.keys() == set(model.backbone.blocks)
    assert parts == [part for part in model.backbone.net.modules() if type(part).__name__ in REPEATED[name]]


def test_checkpointing_keeps_fewer_activations():
    """Bytes of the tensors that the backward pass keeps besides the weights."""

    def kept(settings):
        model, seen = load("tiny-sd"), {}
        backbone = model.copy().backbone.requires_grad_(True)
        placed(TrainingConfig(**settings), backbone, torch.device("cpu"), trained=True)
        own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}

        def pack(value):
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            backbone(torch.randn(2, *model.shape), torch.ones(2), model.conditioner.example(2, "cpu"))
        return sum(seen.values())

    assert kept({"gradient_checkpointing": True}) < 0.5 * kept({})


def test_copies_of_a_compiled_network_are_not_compiled():
    model = load("tiny")
    counted = compiled.compile_network(model.denoiser, "whole")
    assert counted == {"UNet2DModel": 1}
    assert model.net._compiled_call_impl is not None
    assert copy.deepcopy(model.denoiser).network.net._compiled_call_impl is None
    assert model.copy().net._compiled_call_impl is None
    compiled.uncompile(model.denoiser)
    assert model.net._compiled_call_impl is None


SETTINGS = [
    ("dmd", {"compile": "blocks", "channels_last": True}),
    ("cm", {"compile": "whole", "gradient_checkpointing": True}),
    ("train", {"channels_last": True, "gradient_checkpointing": True}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=lambda value: str(value))
def test_runs_equal_plain_ones_and_resume_exactly(kind, settings, tmp_path, tiny, tiny_pairs):
    more = {"network": NETWORK} if kind == "train" else {}  # without dropout, whose masks lie as a picture lies in memory
    runs = {"plain": ({}, 4), "whole": (settings, 4), "resumed": (settings, 2)}
    for name, (chosen, steps) in runs.items():
        engine = engine_of(kind, tmp_path / name, tiny, tiny_pairs, steps=4, **more, **chosen)
        for _ in range(steps):
            engine.advance()
        engine.save()
    engine = engine_of(kind, tmp_path / "resumed", tiny, tiny_pairs, resume=True, steps=4, **more, **settings)
    for _ in range(2):
        engine.advance()
    engine.save()
    assert same(weights(tmp_path / "whole", 4), weights(tmp_path / "resumed", 4))
    plain, ours = (weights(tmp_path / run, 4) for run in ("plain", "whole"))
    del plain["optimizers"]
    for name, tensors in plain.items():
        for key, value in tensors.items():
            assert torch.allclose(ours[name][key], value, atol=2e-4, rtol=0), (name, key)  # of rates up to 1e-3 a step
    noted = json.loads((tmp_path / "whole" / "env.json").read_text())["arithmetic"]
    assert {key: noted[key] for key in settings} == settings


def test_compiled_modules_are_named(tmp_path, tiny, tiny_pairs, capsys):
    engine = engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, compile="whole")
    assert "compile whole: 3 UNet2DModel" in capsys.readouterr().err  # teacher, student, fake score
    assert engine.ema.network.network.net._compiled_call_impl is None


def test_options_that_a_network_does_not_have_are_refused():
    vae = create(16, 3, type("N", (), dict(channels=[8, 8], layers=1, latent_channels=4, groups=4)), 0)
    with pytest.raises(UsageError, match="compile blocks: for networks that denoise, vae is Autoencoder"):
        check(TrainingConfig(compile="blocks"), {"vae": vae})
    check(TrainingConfig(gradient_checkpointing=True), {"vae": vae})
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="gradient_checkpointing: the classifier's network, Linear, has none"):
        check(TrainingConfig(gradient_checkpointing=True), {"classifier": plain})


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="compile: no compiler found"):
        compiled.check(torch.device("cpu"))


@pytest.mark.skipif(not os.environ.get("DISTILL_INDUCTOR"), reason="compiles for minutes: DISTILL_INDUCTOR=1 runs it")
def test_inductor_gives_the_same_numbers(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    model = load("tiny")
    plain, theirs, _ = gradients(model, {})
    out, ours, _ = gradients(model, {"compile": "whole"})
    assert (out - plain).abs().max() <= 1e-5 * plain.abs().max()
    scale = max(grad.abs().max() for grad in theirs.values())
    assert max((ours[key] - theirs[key]).abs().max() for key in theirs) <= 1e-5 * scale

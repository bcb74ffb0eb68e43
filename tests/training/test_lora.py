"""LoRA students: one shared base is as good as copies of it, what is saved is what was trained, and what does not fit is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_cli.config import StudentConfig
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError
from distill_cli.methods.cm.config import CDConfig, ICTConfig
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import DMD
from distill_cli.models import compiled, formats, load
from distill_cli.models.lora import Adapter
from distill_cli.models.sampler import Sampler
from distill_cli.training.ema import EMA
from distill_cli.training.objective import Objective
from distill_cli.training.placed import placed
from tests.contracts import diffusers_alone
from tests.contracts.families import lacking
from tests.contracts.running import Seen, call, words

pytest.importorskip("peft")
PROMPTS = ["a red circle", "a small blue square"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """tiny-sd as a folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny-sd"
    formats.save(load("tiny-sd"), folder)
    return folder


def filled(adapter, seed=0):
    """An adapter that changes something: A and B are drawn."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapter


def student(base, **options):
    """A one-step student on a folder, with a LoRA that was never trained."""
    model = load(str(base))
    objective = Objective(DMDConfig(teacher=str(base), lora=4, **options), "student")
    hashed = model.weights_hash()
    denoiser = objective.begun_from(model)
    filled(denoiser.network)
    sampler = Sampler.one_step(denoiser.schedule)
    lineage = model.lineage.model_copy(update={"kind": "student", "method": "dmd", "teacher": "tiny-sd", "teacher_hash": hashed})
    return replace(model, denoiser=denoiser.eval(), sampler=sampler, lineage=lineage)


def picture(model, **draws):
    return model.with_prompts(PROMPTS).sample(Draws(1, range(2)), torch.tensor([0, 1]), **draws)


def gradients(monkeypatch, method, apart, **options):
    """Losses and gradients of a step's turns; `apart`: each network has a base of its own."""
    begun = Objective.begun_from
    with monkeypatch.context() as patch:
        if apart:
            patch.setattr(Objective, "begun_from", lambda self, teacher, base="teacher": begun(self, teacher.copy(), base))
        objective = method(options)
    networks = [each.module for each in objective.trained.values()] + list(objective.kept.values())
    bases = {id(network.network.base) for network in networks} | {id(network.network) for network in [objective.teacher.denoiser]}
    assert len(bases) == (len(objective.trained) + 1 if apart else 1)
    for k, network in enumerate(networks):
        filled(network.network, k)
        placed(objective.config, network, torch.device("cpu"), trained=True)
    losses = []
    for loss in objective.turns(0, Draws(0, range(2))):
        loss.value.backward()
        losses.append(loss.value.item())
    return losses, [p.grad for each in objective.trained.values() for p in each.parameters()]


def dmd(options):
    return DMD(DMDConfig(teacher="tiny-sd", lora=4, batch_size=2, device="cpu", **options), load("tiny-sd"), None, PROMPTS)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"compile": "blocks"}], ids=str)
def test_one_base_is_as_good_as_copies(monkeypatch, options):
    """Losses and gradients, where activations are computed again too: in the backward pass, when another adapter was called since."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    shared, copies = (gradients(monkeypatch, dmd, apart, **({} if apart else options)) for apart in (False, True))
    assert shared[0] == pytest.approx(copies[0], rel=1e-6)
    assert len(shared[1]) == len(copies[1]) > 100
    for one, other in zip(shared[1], copies[1], strict=True):
        assert other.abs().max() > 0
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


def test_adapters_do_not_touch_each_other_or_the_teacher(base):
    """A teacher's answers, and each adapter's, stay the same to the bit when another adapter is added, copied, averaged or trained."""
    model = load(str(base))
    x, t = torch.randn(2, *model.shape), torch.full((2,), 500.0)
    condition = model.with_prompts(PROMPTS).conditioner(torch.tensor([0, 1]))
    before = model.denoiser(x, t, condition)
    objective = Objective(DMDConfig(teacher=str(base), lora=4), "student")
    one = objective.begun_from(model)
    assert torch.equal(one(x, t, condition), before)  # B is 0
    filled(one.network)
    answer = one(x, t, condition)
    other = copy.deepcopy(one)
    average = EMA(one, 100)
    assert torch.equal(other(x, t, condition), answer)
    for parameter in other.parameters():
        parameter.data += 1
    average.update(other, 1000, 10)
    assert torch.equal(one(x, t, condition), answer)
    assert torch.equal(model.denoiser(x, t, condition), before)
    assert (average.network(x, t, condition) - answer).abs().max() > 0.1
    assert {*dict(one.named_parameters())} == {*one.state_dict()}
    assert all(".lora_" in name for name in one.state_dict())
    assert model.weights_hash() == load(str(base)).weights_hash()


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_a_saved_lora_is_the_student(base, tmp_path, alpha):
    """It opens here, and in diffusers as its card says, with the same picture; alpha is in the weights, so no scale is needed."""
    made = student(base, lora_alpha=alpha)
    formats.save(made, tmp_path / "student")
    ours = picture(made)
    assert (ours - picture(replace(made, denoiser=load(str(base)).denoiser))).abs().max() > 0.05
    again = load(str(tmp_path / "student"))
    assert (picture(again) - ours).abs().max() < 1e-5
    theirs = diffusers_alone.pictures(tmp_path / "student", Draws(1, range(2)), made.shape, [0, 1], PROMPTS)
    assert (theirs - ours).abs().max() < 1e-4
    formats.save(again, tmp_path / "again")
    name = "pytorch_lora_weights.safetensors"
    one, other = (load_file(tmp_path / folder / name) for folder in ("student", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_second_lora_stacks_on_it(base, tmp_path):
    """In diffusers, student and a foreign style: the picture of both in the weights."""
    from diffusers import LCMScheduler, StableDiffusionPipeline

    made = student(base)
    formats.save(made, tmp_path / "student")
    style = filled(copy.deepcopy(made.denoiser.network), seed=7)
    half = {name: value * (0.5 if "lora_B" in name else 1) for name, value in style.tensors().items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "style", unet_lora_layers=half)
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = LCMScheduler.from_pretrained(tmp_path / "student", subfolder="scheduler")
    pipeline.load_lora_weights(tmp_path / "student", adapter_name="student")
    pipeline.load_lora_weights(tmp_path / "style", adapter_name="style")
    pipeline.set_adapters(["student", "style"], [1.0, 1.0])
    noise = Draws(1, range(2)).normal("prior", made.shape)
    theirs = pipeline(PROMPTS, latents=noise, num_inference_steps=1, guidance_scale=1, output_type="pt").images * 2 - 1
    merged = made.whole()
    for name, value in merged.net.state_dict().items():
        path = name.removesuffix(".weight")
        if f"{path}.lora_A.weight" in half:
            value += torch.einsum("or...,ri...->oi...", half[f"{path}.lora_B.weight"], half[f"{path}.lora_A.weight"])
    assert (picture(merged) - theirs).abs().max() < 1e-4
    assert (picture(made) - theirs).abs().max() > 0.05


def test_merged_in_half_precision_it_keeps_the_teachers_weights(base, tmp_path):
    """To the last bit, where the LoRA changes nothing."""
    formats.save(student(base, merge=True, precision="bf16"), tmp_path / "whole")
    ours, theirs = (load(str(folder)).net.state_dict()["time_embedding.linear_1.weight"] for folder in (tmp_path / "whole", base))
    assert torch.equal(ours, theirs)


def test_merged_it_is_a_whole_model(base, tmp_path):
    made = student(base, merge=True)
    formats.save(made, tmp_path / "whole")
    assert (tmp_path / "whole/unet").is_dir()
    assert (picture(load(str(tmp_path / "whole"))) - picture(made)).abs().max() < 1e-5


def test_a_pixel_student_is_saved_merged_which_is_said(tmp_path):
    out = tmp_path / "run"
    options = ["--lora", "2", "--steps", "2", "--batch-size", "2", "--lr", "1e-2", "warmup_steps=0", "sample_every=0"]
    ended = call(["dmd", "--teacher", "tiny", *options, "--out", str(out)])
    assert ended.check().err.count("lora: saved as whole weights: no pipeline of diffusers loads a LoRA of tiny") == 1
    model = load(str(out / "student"))
    assert not isinstance(model.backbone, Adapter)
    state = load_file(out / "checkpoints/step-000002/average.safetensors")
    for end in ("to_q", "conv1"):
        name = next(key for key in state if f"{end}.lora_A" in key)
        delta = torch.einsum("or...,ri...->oi...", state[name.replace("lora_A", "lora_B")], state[name])
        path = name.removeprefix("network.adapter.").replace(".lora_A", "")
        apart = model.net.state_dict()[path] - load("tiny").net.state_dict()[path]
        assert (apart - delta).abs().max() < 1e-6 < delta.abs().max()


def test_in_half_precision_the_base_is_stored_in_it(base):
    """Its layers, once, for all adapters, which stay float32 as norms do; called outside of autocast it answers in its own type."""
    made = student(base, precision="bf16")
    network = made.denoiser.network
    norms = (torch.nn.GroupNorm, torch.nn.LayerNorm)
    layers = [module for name, module in network.net.named_modules() if not name.startswith("conv_in") and ".lora_" not in name]
    kinds = {(isinstance(layer, norms), p.dtype) for layer in layers for p in layer.parameters(recurse=False)}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    apart = (picture(made) - picture(student(base))).abs()
    assert 0 < apart.mean() < 0.02


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3", "tiny-sana", "tiny-lumina2", "tiny-z-image", "tiny-klein", "shapes", "tiny"])
def test_stored_matrices_give_what_autocast_gives(name):
    """To the bit: what is stored in half precision is what autocast would make at each call. And back to float32."""
    if why := lacking(name):
        pytest.skip(why)
    model = load(name)
    model = model.with_prompts(PROMPTS) if model.text is not None else model
    condition, x, t = model.conditioner(torch.tensor([1, 0])), torch.randn(2, *model.shape), model.denoiser.schedule.times(5)[1:3].float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model.denoiser(x, t, condition)
        model.backbone.cast(torch.bfloat16)
        assert torch.equal(model.denoiser(x, t, condition), before)
    model.backbone.cast(None)
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_base_of_integers(precision, base, tmp_path):
    """Its matrices are int8; the pictures are near, and gradients flow. Without torchao it is refused."""
    if importlib.util.find_spec("torchao") is None:
        ended = call(["dmd", "--teacher", "tiny-sd", "lora=4", "quantize=int8", "--dry-run", "--out", str(tmp_path / "run")])
        assert ended.refused()
        assert "quantize int8: torchao is not installed" in ended.err
        pytest.skip("torchao is not installed")
    made, plain = student(base, quantize="int8", precision=precision), student(base)
    layer = made.net.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").base_layer
    assert type(layer.weight).__name__ == "Int8Tensor"
    apart = (picture(made) - picture(plain)).abs()
    assert 0 < apart.mean() < 0.02
    x, t = torch.randn(2, *made.shape), torch.full((2,), 500.0)
    made.denoiser(x, t, made.with_prompts(PROMPTS).conditioner(torch.tensor([0, 1]))).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in made.denoiser.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(lora_alpha=2), "lora_alpha is for a LoRA: lora=RANK"),
        (dict(merge=True), "merge is for a LoRA: lora=RANK"),
        (dict(lora=0, lora_targets="to_q"), "lora_targets is for a LoRA"),
        (dict(lora=-1), "greater than or equal to 0"),
    ],
)
def test_options_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        StudentConfig(**options)


def test_a_method_without_teacher_has_no_lora():
    with pytest.raises(ValueError, match="lora needs a teacher"):
        ICTConfig(data="digits", lora=4)
    assert CDConfig(lora=4, lora_targets="to_q, to_k").lora_targets == ["to_q", "to_k"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("dmd lora=4 lora_targets=to_z", "lora_targets to_z: no layer of a UNet2DConditionModel ends so"),
        ("dmd lora=100000", "lora 100000: more than the rank of any layer of the UNet2DConditionModel"),
        ("dmd lora=4 lora_targets=attn1", "lora_targets attn1: no layer"),
        ("cm data=shapes lora=4 dropout=0.1", "dropout 0.1: not with lora"),
        ("cm method=lcm data=shapes lora=4 guidance_range=[1,4]", "guidance_range: a LoRA has no place for the scale's embedding"),
    ],
)
def test_what_a_lora_cannot_be(command, said, tmp_path):
    name, *options = command.split()
    ended = call([name, "--teacher", "tiny-sd", *options, "--dry-run", "--out", str(tmp_path / "run")])
    assert ended.refused()
    assert f"error: {said}" in ended.err


def test_folders_that_do_not_fit(base, tmp_path):
    """Another base, tensors that are missing, left over or of another shape, a LoRA from elsewhere, and a base that is gone."""
    folder = tmp_path / "student"
    formats.save(student(base), folder)
    file, extra = folder / "pytorch_lora_weights.safetensors", json.loads((folder / "distill.json").read_text())
    tensors = load_file(file)
    first = min(tensors)

    def refused(said, weights=None, **changes):
        save_file(weights or tensors, file)
        (folder / "distill.json").write_text(json.dumps(extra | changes))
        with pytest.raises(DistillError, match=said):
            load(str(folder))

    refused("is missing", {name: value for name, value in tensors.items() if name != first})
    refused("no place in the network", {**tensors, "unet.conv_in.lora_A.weight": tensors[first].clone()})
    refused("is of another shape", {**tensors, first: torch.zeros(3, 3)})
    refused("another shape", lora=extra["lora"] | {"rank": 8})
    refused("its base .* has other weights", lineage=extra["lineage"] | {"teacher_hash": "0" * 64})
    refused("its base is not here: .*gone: no model of that name", lora=extra["lora"] | {"base": str(tmp_path / "gone")})
    refused("distill.json does not name its base", lora=None)
    refused("is a LoRA itself", lora=extra["lora"] | {"base": str(folder)})
    refused("lora.targets", lora=extra["lora"] | {"targets": []})
    scheduler = folder / "scheduler/scheduler_config.json"
    config = json.loads(scheduler.read_text())
    for changes, said in (({"_class_name": "Other"}, "Other"), ({"beta_end": 0.5}, "other noise levels")):
        scheduler.write_text(json.dumps(config | changes))
        refused(said)
    scheduler.write_text(json.dumps(config))
    file.write_bytes(b"no safetensors")
    with pytest.raises(DistillError, match="no readable safetensors|its base"):
        load(str(folder))


def test_a_lora_run_stops_and_goes_on(base, tmp_path):
    """In half precision with activations computed again: an uninterrupted run's weights; its checkpoints hold adapters alone."""
    settings = dict(teacher=str(base), lora=2, steps=3, batch_size=2, precision="bf16", gradient_checkpointing=True, save_every=1)
    options = words({**settings, "log_every": 1, "sample_every": 0, "ema_halflife": 20, "device": "cpu", "prompts": "shapes"})
    one, two = tmp_path / "one", tmp_path / "two"
    call(["dmd", *options, "--out", str(one)], again=True).check()
    assert "stopped at step 2 of 3" in call(["dmd", *options, "--out", str(two)], Seen(2), again=True).check().err
    call(["dmd", "--resume", str(two)], again=True).check()
    for name in ("student", "fake", "average"):
        ours, theirs = (load_file(run / f"checkpoints/step-000003/{name}.safetensors") for run in (one, two))
        assert all(".lora_" in key and value.dtype == torch.float32 for key, value in ours.items())
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())

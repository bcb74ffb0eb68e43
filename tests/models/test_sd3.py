"""StableDiffusion3Pipeline folders: the same pictures as diffusers, and what cannot be read."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import FlowSchedule
from distill_cli.diffusion.shift import Shift
from distill_cli.diffusion.solvers import few_step
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import cost, embeddings, flow_matching, formats, load
from distill_cli.models.lineage import Lineage
from distill_cli.models.sampler import Sampler
from distill_cli.models.sd3 import SD3Prompts, assemble
from distill_cli.models.sources.hub import files_of
from distill_cli.models.text import Reader
from tests.contracts import diffusers_alone
from tests.models.test_foreign_folders import configure, rewrite

PROMPTS = ["a red circle", "a small blue square " * 9]
DRAWS, LABELS = Draws(0, range(2)), torch.tensor([1, 0])


def tiny():
    return load("tiny-sd3").with_prompts(PROMPTS)


def plain(folder, model):
    """The pictures that diffusers makes by the program in the card."""
    return diffusers_alone.pictures(folder, DRAWS, model.shape, LABELS.tolist(), [PROMPTS[k] for k in LABELS], between=False)


def asked(steps, scale, calls=1):
    return dict(sampler=Sampler(solver="euler", steps=steps, guidance_scale=scale, guidance_calls=calls))


SHIFTED = replace(tiny().denoiser.schedule, shift=1.7)
TEACHERS = {
    "the pipeline's defaults": {},
    "few steps": asked(5, 7.0),
    "without guidance": asked(6, 1.0),
    "two calls": asked(4, 3.5, 2),
    "not square": dict(asked(4, 3.0), size=(8, 12)),
}


@pytest.mark.parametrize("name", [*TEACHERS, "another shift", "a shift by size"])
def test_a_teachers_pictures_are_those_of_diffusers(name, tmp_path):
    model = replace(tiny(), **TEACHERS.get(name, asked(5, 2.0)))
    if name == "another shift":
        model.denoiser.schedule = SHIFTED
    if name == "a shift by size":
        shift = Shift(base_tokens=8, most_tokens=64, base=0.3, most=0.9)
        model = replace(model, denoiser=model.denoiser.on(FlowSchedule().moved(shift))).with_size((8, 12))
    formats.save(model, tmp_path / "m")
    again = load(str(tmp_path / "m")).with_prompts(PROMPTS)
    ours = again.sample(DRAWS, LABELS)
    assert torch.equal(ours, model.sample(DRAWS, LABELS))
    assert again.denoiser.schedule == model.denoiser.schedule
    assert ours.shape[2:] == (64, 96 if name in ("not square", "a shift by size") else 64)
    theirs = plain(tmp_path / "m", model)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours[0] - ours[1]).abs().max() > 0.1


def with_t5():
    """tiny-sd3 and a T5 of another length than CLIP's."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    words = [(f"\u2581{word}", -2.0) for word in ["a", "red", "small", "blue", "circle", "square"]]
    letters = [(letter, -5.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *words, *letters], extra_ids=0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu")
    torch.manual_seed(0)
    reader = Reader(tokenizer, T5EncoderModel(config).eval().requires_grad_(False), 256)
    model = tiny()
    readers = {**model.text.readers, "text_encoder_3": reader}
    return assemble(model.net, model.codec.vae, readers, Lineage(name="t5"), model.denoiser.schedule).with_prompts(PROMPTS)


def test_t5_is_read_where_it_is_there(tmp_path):
    model = replace(with_t5(), **asked(4, 3.0))
    formats.save(model, tmp_path / "m")
    again = load(str(tmp_path / "m")).with_prompts(PROMPTS)
    assert again.notes == ()
    ours = again.sample(DRAWS, LABELS)
    assert (ours - plain(tmp_path / "m", model)).abs().max() < 1e-4
    assert (ours - replace(tiny(), **asked(4, 3.0)).sample(DRAWS, LABELS)).abs().max() > 0.01


def test_what_each_encoder_reads_is_said(capsys):
    with_t5().conditioner.say_cut(range(2))
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"1 of 2 prompts are longer than the 16 tokens that {name} reads: cut there" for name in ("text_encoder", "text_encoder_2")
    ]


def test_a_student_of_several_steps_follows_torchs_seed(tmp_path):
    """FlowMatchLCMScheduler, which draws at every step and uses all draws but the last one."""
    times = (1.0, 0.9, 0.75, 0.5)
    sampler = Sampler(solver="few-step", steps=4, knows="own times", answers="endpoint", guidance="inside", times=times)
    model = replace(tiny(), sampler=sampler)
    formats.save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m/scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "FlowMatchLCMScheduler"
    assert (config["shift"], config["use_dynamic_shifting"], config["shift_terminal"]) == (1.0, False, None)
    theirs = plain(tmp_path / "m", model)  # the card's program seeds torch with 0
    torch.manual_seed(0)
    noise = [torch.randn(2, *model.shape) for _ in times]
    again = load(str(tmp_path / "m")).with_prompts(PROMPTS)
    start, condition = DRAWS.normal("prior", model.shape), again.conditioner(LABELS)
    ts = torch.tensor(times, dtype=torch.float64)
    with torch.no_grad():
        x = few_step(again.denoiser, again.denoiser.schedule, start, ts, condition, noise=lambda k: noise[k - 1])
        ours = again.codec.decode(x)
    assert (ours - theirs).abs().max() < 1e-4
    assert "torch.manual_seed(0)" in (tmp_path / "m/README.md").read_text()


@pytest.mark.parametrize("size", [None, (16, 16), (8, 12)])
def test_a_one_step_student_has_its_own_size(size, tmp_path):
    model = replace(tiny(), sampler=Sampler.one_step(FlowSchedule(3.0)), size=size)
    formats.save(model, tmp_path / "m")
    again = load(str(tmp_path / "m")).with_prompts(PROMPTS)
    assert again.shape == model.shape
    assert (again.sample(DRAWS, LABELS) - plain(tmp_path / "m", model)).abs().max() < 1e-4
    config = json.loads((tmp_path / "m/scheduler/scheduler_config.json").read_text())
    assert (config["_class_name"], config["shift"]) == ("FlowMatchEulerDiscreteScheduler", 1.0)


def test_resolutions_end_with_the_table_of_positions():
    assert tiny().with_resolution(96).shape == (16, 12, 12)
    assert tiny().with_resolution(256).shape == (16, 32, 32)
    with pytest.raises(UsageError, match="at most 256 pixels"):
        tiny().with_resolution(272)
    with pytest.raises(UsageError, match="multiples of 16"):
        tiny().with_resolution(72)


SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
BROKEN = {
    "no second encoder": (
        lambda f: configure(f / INDEX, text_encoder_2=[None, None]),
        "its text_encoder_2 is missing, not CLIPTextModelWith",
    ),
    "no pooled text": (
        lambda f: configure(f / INDEX, text_encoder=["transformers", "CLIPTextModel"]),
        "its text_encoder is CLIPTextModel, ",
    ),
    "its folder is gone": (lambda f: shutil.rmtree(f / "text_encoder_2"), "text_encoder_2: no such folder"),
    "T5's folder is gone": (
        lambda f: configure(f / INDEX, text_encoder_3=["transformers", "T5EncoderModel"]),
        "tokenizer_3: no tokenizer.json",
    ),
    "no projection": (
        lambda f: rewrite(f / "text_encoder_2/model.safetensors", lambda w: {k: v for k, v in w.items() if k != "text_projection.weight"}),
        "text_projection.weight is missing",
    ),
    "no block": (
        lambda f: rewrite(
            f / "transformer/diffusion_pytorch_model.safetensors", lambda w: {k: v for k, v in w.items() if "blocks.1" not in k}
        ),
        "transformer_blocks.1.* is missing",
    ),
    "PNDM": (lambda f: configure(f / SCHEDULER, _class_name="PNDMScheduler"), "PNDMScheduler is no scheduler of flow matching"),
    "a terminal": (lambda f: configure(f / SCHEDULER, shift_terminal=0.1), "shift_terminal is 0.1, which is not read"),
    "no shift": (lambda f: configure(f / SCHEDULER, shift=0), "shift 0 make no schedule"),
    "latents not moved": (lambda f: configure(f / "vae/config.json", drop=("shift_factor",)), "shift_factor is null, a number is expected"),
    "means": (lambda f: configure(f / "vae/config.json", latents_mean=[0.1] * 16), "latents_mean is"),
    "tokens": (lambda f: configure(f / "tokenizer/tokenizer_config.json", model_max_length=20), "it reads 16 tokens, .* makes 20"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_said_in_one_line(name, tmp_path):
    formats.save(tiny(), tmp_path / "m")
    breaking, message = BROKEN[name]
    breaking(tmp_path / "m")
    with pytest.raises(DistillError, match=message) as caught:
        load(str(tmp_path / "m"))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(joint_attention_dim=24), "reads text of width 24, the CLIP encoders make 28"),
        (dict(pooled_projection_dim=24), "reads pooled_projections of width 24, .* makes 28"),
        (dict(in_channels=4, out_channels=4), "the autoencoder has 16 channels, the network 4"),
    ],
)
def test_networks_that_do_not_fit_are_refused(changes, message, tmp_path):
    from diffusers import SD3Transformer2DModel

    model = tiny()
    config = {key: value for key, value in model.net.config.items() if not key.startswith("_")}
    model.denoiser.network = type(model.backbone)(SD3Transformer2DModel(**config | changes))
    formats.save(model, tmp_path / "m")
    with pytest.raises(DistillError, match=message):
        load(str(tmp_path / "m"))


def test_an_older_diffusers_is_named(monkeypatch, tmp_path):
    import diffusers

    sampler = Sampler(solver="few-step", steps=2, knows="own times", answers="endpoint", guidance="inside", times=(1.0, 0.5))
    model = replace(tiny(), sampler=sampler)
    formats.save(model, tmp_path / "m")
    monkeypatch.delitem(diffusers._class_to_module, "FlowMatchLCMScheduler")
    monkeypatch.delattr(diffusers, "FlowMatchLCMScheduler")
    for command in (lambda: flow_matching.scheduler_of(model), lambda: load(str(tmp_path / "m"))):
        with pytest.raises(DistillError, match=r"FlowMatchLCMScheduler came with diffusers 0\.34, and .* is installed"):
            command()


def test_conditions_of_several_parts_are_stored_whole(tmp_path, monkeypatch):
    """Each part as it was encoded, under its own name; another second encoder has another folder."""
    monkeypatch.setattr(embeddings, "SHARD", 1)
    prompts = tiny().conditioner
    stored = prompts.stored(tmp_path, "float32")
    for part, value in prompts(LABELS).parts.items():
        assert torch.allclose(stored(LABELS).parts[part], value, atol=1e-5)
        assert torch.allclose(stored.null.parts[part], prompts.null.parts[part], atol=1e-6)
    assert prompts.embedding == (16 + 256) * 32 + 28
    readers = prompts.readers
    other = SD3Prompts({**readers, "text_encoder_2": readers["text_encoder"]}, 32).given(PROMPTS)
    assert other.stored(tmp_path, "float32").table.folder != stored.table.folder


@pytest.mark.parametrize(("name", "count"), [("sd3-medium", 2_028_328_000), ("sd35-medium", 2_243_171_520)])
def test_published_architectures_without_weights(name, count):
    """The parameters that the published transformers have."""
    model = cost.sketch(name)
    assert sum(p.numel() for p in model.denoiser.parameters()) == count
    assert (model.pixels, model.lineage.licence) == (1024, "Stability Community")


def test_the_files_to_download():
    """fp16 where there is some, T5's in parts; no single file of all, no pickles."""
    weights = {
        "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors", "text_encoder_3/model.safetensors.index.fp16.json",
        *(f"text_encoder_3/model.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)),
    }  # fmt: skip
    others = {"sd3_medium.safetensors", "text_encoder/model.safetensors", "text_encoder_3/model-00001-of-00002.safetensors", "x/y.bin"}
    small = {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer_3/tokenizer.json"}
    small |= {f"{part}/config.json" for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")}
    found = files_of([SimpleNamespace(rfilename=name, size=7) for name in weights | others | small], half=True)
    assert set(found) == weights | small

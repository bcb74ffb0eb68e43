"""Folders of the families of transformers: what cannot be read, what is kept as it was stored, and older libraries."""

import shutil
from dataclasses import replace

import pytest
import torch

from distill_cli.diffusion.schedule import FlowSchedule
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import formats, installed, load
from distill_cli.models.language import lengths_of
from distill_cli.models.sampler import Sampler
from tests.contracts import diffusers_alone
from tests.models.test_families import DRAWS, LABELS, MODULES, PROMPTS, asked, installed_here, on, plain, tiny
from tests.models.test_foreign_folders import configure, rewrite

__all__ = ["installed_here"]  # a fixture

SCHEDULER, INDEX, TRANSFORMER = "scheduler/scheduler_config.json", "model_index.json", "transformer/config.json"
ALL = {
    "no text encoder": (lambda f: configure(f / INDEX, text_encoder=[None, None]), "its text_encoder is missing, not "),
    "its folder is gone": (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder: no such folder"),
    "no vocabulary": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer: no tokenizer.json"),
    "another tokenizer": (
        lambda f: configure(f / "tokenizer/tokenizer_config.json", tokenizer_class="CLIPTokenizer"),
        'tokenizer_class is "CLIPTokenizer", not ',
    ),
    "another version": (lambda f: configure(f / TRANSFORMER, moe_layers=4), "moe_layers is 4, which is no option of "),
    "another network": (lambda f: configure(f / TRANSFORMER, _class_name="SD3Transformer2DModel"), "_class_name is .*, not "),
    "no layer": (
        lambda f: rewrite(f / "transformer/diffusion_pytorch_model.safetensors", lambda w: dict(list(w.items())[1:])),
        "is missing",
    ),
    "PNDM": (lambda f: configure(f / SCHEDULER, _class_name="PNDMScheduler"), "PNDMScheduler is no scheduler of flow matching"),
    "a terminal": (
        lambda f: configure(f / SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler", shift_terminal=0.1),
        "shift_terminal is 0.1, which is not read",
    ),
}
OWN = {
    "tiny-sana": {
        "guidance inside": (lambda f: configure(f / TRANSFORMER, guidance_embeds=True), "guidance_embeds is true|is missing"),
        "by size": (lambda f: configure(f / SCHEDULER, use_dynamic_shifting=True), "use_dynamic_shifting is true, which is not read"),
        "another order": (lambda f: configure(f / SCHEDULER, solver_order=3), "solver_order is 3, which is not read"),
        "a table": (lambda f: configure(f / SCHEDULER, use_flow_sigmas=False), "use_flow_sigmas is false, which is not read"),
    },
    "tiny-lumina2": {"narrow text": (lambda f: configure(f / "text_encoder/config.json", hidden_size=12), "text_encoder: ")},
    "tiny-z-image": {
        "no chat": (lambda f: chatless(f / "tokenizer"), "tokenizer: no chat template"),
        "pictures too": (lambda f: configure(f / TRANSFORMER, siglip_feat_dim=8), "siglip_feat_dim is 8|is missing"),
        "few places": (lambda f: configure(f / TRANSFORMER, axes_lens=[300, 64, 64]), "axes_lens begins with 300"),
        "no shift": (
            lambda f: configure(f / SCHEDULER, use_dynamic_shifting=True, base_image_seq_len=9, max_image_seq_len=9),
            "base_image_seq_len 9, max_image_seq_len 9, .* make no shift",
        ),
    },
    "tiny-klein": {
        "distilled": (lambda f: configure(f / INDEX, is_distilled=True), "is_distilled is true: a distilled model"),
        "guidance inside": (lambda f: configure(f / TRANSFORMER, guidance_embeds=True), "guidance_embeds is true|is missing"),
        "few layers": (
            lambda f: cut(f / "text_encoder", 20),
            "20 layers, and the pipeline takes the answer of layer 27",
        ),
    },
}  # fmt: skip


def chatless(folder):
    configure(folder / "tokenizer_config.json", drop=("chat_template",))
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def cut(folder, layers):
    """A language model of fewer layers."""
    configure(folder / "config.json", num_hidden_layers=layers, drop=("layer_types",))
    gone = tuple(f"model.layers.{k}." for k in range(layers, 28))
    rewrite(folder / "model.safetensors", lambda w: {k: v for k, v in w.items() if not k.startswith(gone)})


CASES = [(name, case) for name in MODULES for case in (*(ALL if name == "tiny-klein" else ()), *OWN.get(name, ()))]


@pytest.mark.parametrize(("name", "case"), CASES, ids=map("-".join, CASES))
def test_what_cannot_be_read_is_said_in_one_line(name, case, tmp_path):
    formats.save(load(name), tmp_path / "m")
    breaking, message = (ALL | OWN.get(name, {}))[case]
    breaking(tmp_path / "m")
    with pytest.raises(DistillError, match=message) as caught:
        load(str(tmp_path / "m"))
    assert "\n" not in caught.value.message


def test_a_distilled_model_is_no_teacher(tmp_path):
    """By its hub id; a folder that looks like Z-Image-Turbo's is read with a note, as its shift is all that tells."""
    with pytest.raises(UsageError, match="distilled already") as caught:
        load("Tongyi-MAI/Z-Image-Turbo")
    assert caught.value.hint == "its base: z-image"
    model = load("tiny-z-image")
    for shift, notes in ((3.0, 1), (6.0, 0)):
        formats.save(on(model, FlowSchedule(shift)), tmp_path / f"{shift}")
        (tmp_path / f"{shift}/distill.json").unlink()
        assert len(load(str(tmp_path / f"{shift}")).notes) == notes


def test_positions_made_by_a_size_stay_a_students(tmp_path):
    """SANA's for large pictures: its configuration keeps the size that its positions are made by."""
    model = tiny("tiny-sana")
    config = {key: value for key, value in model.net.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    network = type(model.backbone)(type(model.net)(**config | {"interpolation_scale": 1.0})).eval().requires_grad_(False)
    student = replace(model, denoiser=model.denoiser.around(network)).with_size((16, 16))
    student = replace(student, sampler=Sampler.one_step(student.denoiser.schedule))
    ours = student.sample(DRAWS, LABELS)
    formats.save(student, tmp_path / "s")
    again = load(str(tmp_path / "s")).with_prompts(PROMPTS)
    assert again.shape == student.shape
    assert torch.equal(again.sample(DRAWS, LABELS), ours)
    assert (ours - plain(tmp_path / "s", student)).abs().max() < 1e-4


def test_lengths_of_long_texts_are_right_in_half_precision():
    """bf16 has no odd whole numbers above 256."""
    mask = torch.zeros(3, 512, dtype=torch.bfloat16)
    for row, count in enumerate((301, 257, 511)):
        mask[row, :count] = 1
    assert lengths_of(mask) == [301, 257, 511]


@pytest.mark.parametrize("name", MODULES)
def test_a_prompt_that_is_too_long_is_cut_as_the_pipeline_cuts_it(name, tmp_path, capsys):
    model = asked(load(name), steps=3, guidance_scale=2.0)
    texts = ["red circle " * 600, ""]
    formats.save(model, tmp_path / "m")
    ours = load(str(tmp_path / "m")).with_prompts(texts).sample(DRAWS, torch.arange(2))
    theirs = diffusers_alone.pictures(tmp_path / "m", DRAWS, model.shape, [0, 1], list(texts))
    assert (ours - theirs).abs().max() < 1e-4
    model.with_prompts(texts).conditioner.say_cut(range(2))
    assert capsys.readouterr().err.splitlines()[-1].startswith("1 of 2 prompts are longer than the ")


def test_a_shift_that_is_none_is_refused(tmp_path):
    """A line over the tokens that falls below 0, as of Lumina's few."""
    formats.save(load("tiny-lumina2"), tmp_path / "m")
    numbers = dict(use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.05, max_shift=1.15)
    configure(tmp_path / "m" / SCHEDULER, **numbers)
    with pytest.raises(DistillError, match=r"a shift by size that is -0\.0187 for 16 tokens"):
        load(str(tmp_path / "m"))


def test_an_autoencoder_may_say_more_than_its_class_takes(tmp_path):
    """As klein's published one does."""
    model = tiny("tiny-klein")
    formats.save(model, tmp_path / "m")
    configure(tmp_path / "m/vae/config.json", force_upcast=True)
    assert torch.equal(load(str(tmp_path / "m")).with_prompts(PROMPTS).sample(DRAWS, LABELS), model.sample(DRAWS, LABELS))


def test_the_head_of_a_language_model_is_left_out(tmp_path):
    """Z-Image's text encoder may be stored with it."""
    model = tiny("tiny-z-image")
    formats.save(model, tmp_path / "m")
    rewrite(tmp_path / "m/text_encoder/model.safetensors", lambda w: w | {"lm_head.weight": torch.zeros(len(model.text.tokenizers()), 16)})
    assert torch.equal(load(str(tmp_path / "m")).with_prompts(PROMPTS).sample(DRAWS, LABELS), model.sample(DRAWS, LABELS))


def test_sizes_that_do_not_divide_are_refused():
    for name, pixels, whole in (("tiny-klein", 72, 16), ("tiny-z-image", 72, 16), ("tiny-sana", 60, 8)):
        with pytest.raises(UsageError, match=f"multiples of {whole} pixels"):
            tiny(name).with_resolution(pixels)
    assert tiny("tiny-klein").with_resolution(96).shape == (16, 6, 6)
    with pytest.raises(UsageError, match="at most 1024 pixels"):
        tiny("tiny-z-image").with_resolution(1040)


def test_an_older_library_is_named(monkeypatch, tmp_path):
    import diffusers

    formats.save(load("tiny-klein"), tmp_path / "m")
    for kind in ("Flux2Transformer2DModel", "Flux2KleinPipeline"):
        monkeypatch.delitem(diffusers._class_to_module, kind)
        monkeypatch.delattr(diffusers, kind, raising=False)
        with pytest.raises(DistillError, match=r"Flux2\w+ came with diffusers 0\.37, and .* is installed"):
            load(str(tmp_path / "m"))
    with pytest.raises(DistillError, match=r"Flux2\w+ came with diffusers 0\.37, and .* is installed"):
        load("tiny-klein")
    with pytest.raises(DistillError, match=r"Qwen9Model came with transformers 9\.9, and .* is installed"):
        installed.class_of("Qwen9Model", "transformers", "9.9")


def test_how_a_language_model_is_asked_is_part_of_what_is_stored(tmp_path, monkeypatch):
    """Another instruction gives other embeddings, in another folder; equal ones are read again."""
    from distill_cli.models import sana

    prompts = tiny("tiny-sana").conditioner
    stored = prompts.stored(tmp_path, "float32")
    assert torch.allclose(stored(LABELS).parts["encoder_hidden_states"], prompts(LABELS).parts["encoder_hidden_states"], atol=1e-5)
    assert prompts.stored(tmp_path, "float32").table.folder == stored.table.folder
    wording = replace(sana.FAMILY.wording, before=lambda: "draw ")
    prompts.readers["text_encoder"].wording = wording
    assert prompts.stored(tmp_path, "float32").table.folder != stored.table.folder


def test_a_text_encoder_stored_in_bf16_stays_so(tmp_path):
    """It takes half the memory, here, on the card and on disk; what it says is near, and the rest of the model is float32."""
    from safetensors.torch import load_file

    model = tiny("tiny-z-image")
    formats.save(model, tmp_path / "m")
    rewrite(tmp_path / "m/text_encoder/model.safetensors", lambda w: {name: value.bfloat16() for name, value in w.items()})
    again = load(str(tmp_path / "m")).with_prompts(PROMPTS)
    encoder = again.parts()["text_encoder"]
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in again.denoiser.parameters()} == {torch.float32}
    ours, exact = again.conditioner(LABELS), model.conditioner(LABELS)
    text = exact.parts["encoder_hidden_states"]
    assert ours.parts["encoder_hidden_states"].dtype == torch.float32
    assert 0 < (ours.parts["encoder_hidden_states"] - text).norm() < 0.03 * text.norm()
    formats.save(again, tmp_path / "again")
    assert {value.dtype for value in load_file(tmp_path / "again/text_encoder/model.safetensors").values()} == {torch.bfloat16}
    assert again.held(torch.bfloat16) < again.held(None) < model.held(None)


def test_tied_weights_are_stored_once_and_others_all(tmp_path):
    from safetensors import safe_open
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from distill_cli.models.language import TINY
    from distill_cli.models.text import save_encoder

    for tied in (True, False):
        encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=9, num_hidden_layers=1, tie_word_embeddings=tied, **TINY))
        save_encoder(encoder, tmp_path / f"{tied}")
        with safe_open(tmp_path / f"{tied}/model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118

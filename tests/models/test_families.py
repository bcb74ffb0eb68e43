"""Families of transformers that one language model tells: diffusers' pictures, its LoRAs, and what cannot be read."""

import json
import math
import shutil
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.guidance import Guided
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import FlowSchedule
from distill_cli.diffusion.shift import Shift
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import cost, formats, installed, load
from distill_cli.models.formats.transformer import TRANSFORMERS
from distill_cli.models.language import MASK, lengths_of
from distill_cli.models.lora import adapted
from distill_cli.models.sampler import Sampler
from tests.contracts import diffusers_alone, families
from tests.models.test_foreign_folders import configure, rewrite

PROMPTS = ["a red circle", "a small blue square on a green background in the centre"]
DRAWS, LABELS = Draws(0, range(2)), torch.tensor([1, 0])
MODULES = families.TRANSFORMERS
FAMILY = {name: import_module(f"distill_cli.models.{module}").FAMILY for name, module in MODULES.items()}
MOVING = [name for name in MODULES if FAMILY[name].moving is not None]
"""Whose pipelines shift by size."""


@pytest.fixture(autouse=True)
def installed_here(request):
    """Older versions of diffusers and transformers lack some families, which are skipped."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    for each in MODULES if name not in MODULES else [name]:
        if why := families.lacking(each):
            pytest.skip(why)


def tiny(name):
    return load(name).with_prompts(PROMPTS)


def plain(folder, model):
    """The pictures that diffusers makes by the program in the card."""
    return diffusers_alone.pictures(folder, DRAWS, model.shape, LABELS.tolist(), [PROMPTS[k] for k in LABELS])


def asked(model, **changes):
    return replace(model, sampler=model.sampler.model_copy(update=changes))


def on(model, schedule):
    return replace(model, denoiser=model.denoiser.on(schedule))


def shifted(model):
    """Another constant shift."""
    return on(model, replace(model.denoiser.schedule, shift=1.7, moving=None))


def moved(model):
    """A shift by size, with numbers of its own."""
    rule = FAMILY[model.lineage.name].moving.rule
    shift = Shift(rule, base_tokens=8, most_tokens=64, base=0.3, most=0.9)
    return on(model, FlowSchedule(ends="steps").moved(shift)).with_size(model.size)


TEACHERS = {
    "guided": lambda model: asked(model, steps=4, guidance_scale=3.0),
    "the pipeline's defaults": lambda model: asked(model, steps=7),
    "without guidance": lambda model: asked(model, steps=4, guidance_scale=1.0),
    "two calls, not square": lambda model: asked(model, steps=4, guidance_calls=2).with_size((model.shape[1], model.shape[2] * 3 // 2)),
    "another shift": lambda model: shifted(asked(model, steps=4)),
    "Euler's steps": lambda model: asked(model, steps=4, solver="euler"),
    "by size": lambda model: moved(asked(model, steps=4)),
    "by another size": lambda model: moved(asked(model, steps=5)).with_size((model.shape[1] * 2, model.shape[2])),
}


@pytest.mark.parametrize("case", TEACHERS)
@pytest.mark.parametrize("name", MODULES)
def test_a_teachers_pictures_are_those_of_diffusers(name, case, tmp_path):
    """Of two prompts of different lengths; read again, the model is the same to the bit."""
    if (case.startswith("by ") and name not in MOVING) or (case == "Euler's steps" and not FAMILY[name].multistep):
        pytest.skip("its pipeline cannot" if name not in MOVING else "they are its own")
    model = TEACHERS[case](tiny(name))
    formats.save(model, tmp_path / "m")
    again = load(str(tmp_path / "m")).with_prompts(PROMPTS)
    ours = again.sample(DRAWS, LABELS)
    assert torch.equal(ours, model.sample(DRAWS, LABELS))
    assert (again.denoiser.schedule, again.shape) == (model.denoiser.schedule, model.shape)
    assert (ours - plain(tmp_path / "m", model)).abs().max() < 1e-4
    assert (ours[0] - ours[1]).abs().max() > 0.1


def test_shifts_by_size_differ_with_it_and_with_steps():
    """As the pipelines compute them: FLUX's line at 1024 pixels ends at mu 1.15; klein's depends on the steps; Lumina's takes channels."""
    assert Shift(tokens=4096).of() == pytest.approx(math.exp(1.15))
    assert Shift(tokens=256, kind="linear").of() == pytest.approx(0.5)
    klein = tiny("tiny-klein").denoiser.schedule
    assert klein.moving.of(4) > klein.moving.of(50) == klein.shift
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    for tokens, steps in ((1024, 4), (4096, 28), (5000, 50)):
        assert math.log(Shift("tokens and steps", tokens=tokens).of(steps)) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)
    large = moved(tiny("tiny-z-image")).with_size((16, 8)).denoiser.schedule
    assert large.moving.tokens == 32
    assert moved(tiny("tiny-lumina2")).denoiser.schedule.moving.tokens == 16


@pytest.mark.parametrize("name", MODULES)
def test_our_estimate_makes_the_pipelines_step(name, tmp_path):
    """From the pipeline's own latents after its first step to those after its second, to 1e-5 of their size."""
    import diffusers

    model = asked(shifted(tiny(name)), solver="euler", steps=4, guidance_scale=1.0)
    formats.save(model, tmp_path / "m")
    index = json.loads((tmp_path / "m/model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(tmp_path / "m")
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def keep(pipe, step, t, kept):
        seen.append(kept["latents"].clone())
        return kept

    less = 1.0 - FAMILY[name].less
    height, width = (side * model.codec.factor for side in model.shape[1:])
    more: dict = eval(f"dict({FAMILY[name].called.removeprefix(',')})")
    more |= {"latents": DRAWS.normal("prior", model.shape), "output_type": "latent", "callback_on_step_end": keep}
    pipeline(prompt=list(PROMPTS), num_inference_steps=4, guidance_scale=less, height=height, width=width, **more)
    first, second = (each if each.ndim == 4 else each.mT.unflatten(2, model.shape[1:]) for each in seen[:2])
    times, condition = model.denoiser.schedule.times(4), model.conditioner(torch.arange(2))
    with torch.no_grad():
        x0 = model.denoiser(first, times[1].float().expand(2), condition)
    t, r = times[1].item(), times[2].item()
    ours = r / t * first + (1 - r / t) * x0
    assert (ours - second).abs().max() < 1e-5 * second.abs().max()
    assert (ours - first).abs().max() > 0.01


STUDENTS = {
    "one step": lambda model: Sampler.one_step(model.denoiser.schedule),
    "own times": lambda model: Sampler.walking("euler", (1.0, 0.9, 0.75, 0.5)),
    "renoising": lambda model: Sampler.renoising([1.0, 0.8, 0.3], 3),
}


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("name", MODULES)
def test_a_lora_opens_in_diffusers_with_the_same_pictures(name, kind, tmp_path):
    """By load_lora_weights; its scheduler shifts nothing, and its size is its own."""
    formats.save(load(name), tmp_path / "base")
    base = load(str(tmp_path / "base")).with_prompts(PROMPTS)
    base = base.with_size((base.shape[1] * 2, base.shape[2])) if kind == "one step" else base
    adapter = adapted(base.backbone, 2, None, None, 0)
    adapter.source = str(tmp_path / "base")
    for number, parameter in enumerate(adapter.parameters()):
        torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(number))
    old = base.denoiser
    denoiser = NetworkDenoiser(adapter, old.schedule, old.parameterisation, old.scales, old.time_input).eval().requires_grad_(False)
    lineage = base.lineage.model_copy(update={"kind": "student", "method": "dmd2", "teacher_hash": base.weights_hash()})
    model = replace(base, denoiser=denoiser, sampler=STUDENTS[kind](base), lineage=lineage)
    ours = model.sample(DRAWS, LABELS)
    formats.save(model, tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir() if path.is_file()) == [
        "README.md", "distill.json", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    config = json.loads((tmp_path / "lora/scheduler/scheduler_config.json").read_text())
    assert (config["shift"], config["use_dynamic_shifting"], config["shift_terminal"]) == (1.0, False, None)
    theirs = diffusers_alone.pictures(tmp_path / "lora", DRAWS, model.shape, LABELS.tolist(), [PROMPTS[k] for k in LABELS])
    assert (ours - theirs).abs().max() < 1e-4
    assert torch.equal(load(str(tmp_path / "lora")).with_prompts(PROMPTS).sample(DRAWS, LABELS), ours)
    plain_base = replace(base, sampler=model.sampler)
    assert (ours - plain_base.sample(DRAWS, LABELS)).abs().max() > 0.01  # it does something


def test_guidance_counts_alike_and_says_what_the_pipeline_counts(tmp_path):
    """Z-Image's own scale is one smaller; at our scale 1 both are without guidance."""
    model = asked(tiny("tiny-z-image"), guidance_scale=4.0)
    formats.save(model, tmp_path / "m")
    text = (tmp_path / "m/README.md").read_text()
    assert "guidance scale 4 (3 as ZImagePipeline counts it)" in text
    assert "guidance_scale=3)" in text


def test_renormed_guidance_keeps_the_length_of_each_row():
    """Of the flow x_t - x0, in closed form; and it is not plain guidance."""
    draws = torch.Generator().manual_seed(0)
    x, cond, uncond = (torch.randn(2, 3, 4, 5, generator=draws, dtype=torch.float64) for _ in range(3))

    def denoiser(x, t, condition):
        return torch.where(condition.parts["a"][:, None, None, None] > 0, cond, uncond)

    from distill_cli.diffusion.condition import Condition

    there, null = Condition({"a": torch.ones(2)}), Condition({"a": torch.zeros(1)})
    out = Guided(denoiser, 3.0, null, calls=2, rule="renormed rows")(x, torch.full((2,), 0.7), there)
    led = uncond + 3.0 * (cond - uncond)
    assert torch.allclose((x - out).norm(dim=-1), (x - cond).norm(dim=-1))
    assert torch.allclose(torch.nn.functional.cosine_similarity(x - out, x - led, dim=-1), torch.ones(2, 3, 4, dtype=torch.float64))
    assert (out - led).abs().max() > 0.1


@pytest.mark.parametrize("name", ["tiny-sana", "tiny-lumina2", "tiny-z-image"])
def test_what_is_filled_up_has_no_say(name):
    """Numbers in the place of tokens behind a text change nothing, in a batch of texts of different lengths."""
    model = tiny(name)
    condition = model.conditioner(LABELS)
    mask = condition.parts[MASK]
    assert mask[0].sum() > mask[1].sum() > 0
    assert torch.equal(mask.sort(dim=1, descending=True).values, mask)
    text = condition.parts["encoder_hidden_states"]
    other = condition.plus("encoder_hidden_states", torch.where(mask[..., None] > 0, text, torch.randn_like(text)))
    x, t = torch.randn(2, *model.shape), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        together, changed = model.denoiser(x, t, condition), model.denoiser(x, t, other)
        alone = torch.cat([model.denoiser(x[k : k + 1], t[k : k + 1], condition[k : k + 1]) for k in range(2)])
    assert (together - changed).abs().max() < 1e-5
    assert (together - alone).abs().max() < 1e-5


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


@pytest.mark.parametrize(
    ("name", "count", "published"),
    [
        ("sana", 1_604_462_752, "1.6B"), ("sana-600m", 591_747_872, "0.6B"), ("lumina2", 2_609_769_152, "2.6B"),
        ("z-image", 6_154_908_736, "6B"), ("klein", 3_875_544_576, "4B"), ("sd35-large", 8_056_627_520, "8.1B"),
    ],
)  # fmt: skip
def test_published_architectures_without_weights(name, count, published):
    """The parameters of the configurations that diffusers' conversion scripts and the published folders have."""
    model = cost.sketch(name)
    assert sum(p.numel() for p in model.denoiser.parameters()) == count
    digits = len(published.partition(".")[2].removesuffix("B"))
    assert f"{count / 1e9:.{digits}f}B" == published
    assert model.pixels == 1024


def test_every_family_is_tried_here():
    assert {known.family for known in TRANSFORMERS} == set(FAMILY.values())

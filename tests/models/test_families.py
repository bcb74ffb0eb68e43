"""Families of transformers that one language model tells: diffusers' pictures, its LoRAs, and what cannot be read."""

import json
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.guidance import Guided
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import FlowSchedule
from distill_cli.diffusion.shift import Shift
from distill_cli.models import cost, formats, load
from distill_cli.models.formats.transformer import TRANSFORMERS
from distill_cli.models.language import MASK
from distill_cli.models.lora import adapted
from distill_cli.models.sampler import Sampler
from tests.contracts import diffusers_alone, families

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
    more = {"latents": DRAWS.normal("prior", model.shape), "output_type": "latent", "callback_on_step_end": keep}
    more |= {"height": height, "width": width, **FAMILY[name].called}
    pipeline(prompt=list(PROMPTS), num_inference_steps=4, guidance_scale=less, **more)
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

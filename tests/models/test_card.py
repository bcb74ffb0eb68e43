"""The card of a model's folder: its header, its settings for ComfyUI, and programs that run as they stand."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from distill_cli.models import formats, header, load
from distill_cli.models.backbones import backbone_of
from distill_cli.models.conditioners import ClassConditioner
from distill_cli.models.edm import EDMUNet
from distill_cli.models.formats import comfyui, format_of
from distill_cli.models.formats.card import InDiffusers, card, with_lora
from distill_cli.models.lineage import Lineage
from distill_cli.models.lora import adapted
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler
from distill_cli.models.sources.catalog import HUB
from tests.contracts.families import FAMILIES, Made

PROMPTS = ["a red circle", "a small blue square"]
LCM = tuple(float(20 * k - 1) for k in range(50, 0, -1))
"""The times of LCMScheduler with 50 original steps."""


@pytest.fixture(scope="module")
def models():
    """The models of this page, each made once, by name."""
    return {name: load(name).with_prompts(PROMPTS) for name in ("tiny-sd", "shapes", "tiny-sd3")}


def student(model, sampler, **lineage):
    own = Lineage(**{"name": "s", "kind": "student", "method": "lcm", "teacher": model.lineage.name, **lineage})
    return replace(model, sampler=sampler, lineage=own)


def lines(text):
    return yaml.safe_load(header.header_of(text))


# the header


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC BY-NC-SA 4.0 (NVIDIA)", {"license": "cc-by-nc-sa-4.0"}),
        ("MIT (OpenAI)", {"license": "mit"}),
        ("openrail++", {"license": "openrail++"}),
        ("Apache-2.0; data CC BY 4.0 (UCI)", {"license": "other", "license_name": "apache-2.0-data-cc-by-4.0"}),
        ("My: own --- licence\\", {"license": "other", "license_name": "my-own-licence"}),
        ("", {}),
        *(
            (HUB[name].licence, wanted)
            for name, wanted in {
                "sd15": {"license": "creativeml-openrail-m"},
                "sd21": {"license": "openrail++"},
                "sd3-medium": {"license": "other", "license_name": "stabilityai-ai-community"},
                "sd35-medium": {"license": "other", "license_name": "stabilityai-ai-community"},
            }.items()
        ),
    ],
)
def test_a_licence_is_the_hubs_and_is_read_again(words, wanted):
    """What is written, read and written again is the same."""
    assert header.licence(words) == wanted
    text = header.written({**wanted, "tags": ["a"]})
    assert lines(text) == {**wanted, "tags": ["a"]}
    again = header.licence_of(f"{text}\n# a model\nlicense: gpl\n---\n")
    assert again == wanted.get("license_name", wanted.get("license", ""))
    assert header.licence(again) == wanted


def test_the_header_says_what_the_model_is_made_from(models):
    made = student(models["tiny-sd"], Sampler.one_step(models["tiny-sd"].denoiser.schedule), licence=HUB["sd15"].licence)
    there = format_of(made).in_diffusers(made)
    assert lines(card(made, there)) == {
        "license": "creativeml-openrail-m", "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "tags": ["distill", "few-step", "lcm"],
    }  # fmt: skip
    of = {"base_model": HUB["sd15"].id, "base_model_relation": "finetune"}
    for teacher in ("sd15", HUB["sd15"].id):
        assert of.items() <= lines(card(student(made, made.sampler, teacher=teacher), there)).items()
    for local in ("/home/me/sd", "a/b/c", "--- x/y"):
        assert "base_model" not in lines(card(student(made, made.sampler, teacher=local), there))
    lora = lines(card(made, with_lora(there, "sd15", "LCMScheduler")))
    assert (lora["base_model"], lora["base_model_relation"], lora["tags"][-1]) == (HUB["sd15"].id, "adapter", "lora")


def test_a_folder_that_was_written_keeps_its_licence_without_distill_json(models, tmp_path):
    for name, words in {"tiny-sd": "creativeml-openrail-m", "tiny-sd3": "stabilityai-ai-community"}.items():
        made = models[name]
        formats.save(replace(made, lineage=made.lineage.model_copy(update={"licence": words})), tmp_path / name)
        assert load(str(tmp_path / name)).lineage.licence == words
        (tmp_path / name / "distill.json").unlink()
        assert load(str(tmp_path / name)).lineage.licence == words


# ComfyUI


def of_comfyui(model, text, draws, labels):
    """Latents as ComfyUI makes them under these settings, by the published rules of its samplers and noise levels.

    Of the model only the network is used, and its condition: tables, times, scalings and steps are reckoned here.
    """
    flow = "ModelSamplingSD3" in text or model.denoiser.parameterisation == "flow"
    shift = float(found[1]) if (found := re.search(r"\(shift (\S+)\)", text)) else 1.0
    lcm, zero = "(lcm)" in text, "zsnr" in text
    if flow:
        ts = torch.arange(1, 1001).double() / 1000
        sigmas = shift * ts / (1 + (shift - 1) * ts)
    else:
        bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)
        if zero:
            root = bar.sqrt()
            bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            bar[-1] = 4.8973451890853435e-08
        sigmas = ((1 - bar) / bar).sqrt()[19::20] if lcm else ((1 - bar) / bar).sqrt()

    def timestep(sigma):
        nearest = int((sigma.log() - sigmas.log()).abs().argmin())
        return sigma * 1000 if flow else torch.tensor(nearest * 20 + 19 if lcm else nearest)

    def denoised(x, sigma):
        given = x if flow else x / (1 + sigma**2) ** 0.5
        time = timestep(sigma)
        out = model.backbone(given.float(), time.float().expand(len(x)), model.conditioner(labels)).double()
        if model.denoiser.parameterisation == "v":
            return x / (1 + sigma**2) - out * sigma / (1 + sigma**2) ** 0.5
        x0 = x - out * sigma
        near, far = 0.25 / ((10 * time) ** 2 + 0.25), 10 * time / ((10 * time) ** 2 + 0.25) ** 0.5
        return far * x0 + near * given if lcm else x0

    if steps := re.search(r"scheduler simple, (\d+) step", text):
        count = int(steps[1])
        levels = [float(sigmas[-(1 + int(k * (len(sigmas) / count)))]) for k in range(count)] + [0.0]
    elif steps := re.search(r"scheduler normal, (\d+) step", text):
        ts = torch.linspace(1, float(sigmas[0]), int(steps[1])).double()
        levels = [*(shift * ts / (1 + (shift - 1) * ts)).tolist(), 0.0]
    else:
        levels = [float(word) for word in re.search(r"ManualSigmas (.*?) \(", text)[1].split(", ")]
    assert levels[-1] == 0
    levels, noise = torch.tensor(levels).double(), draws.normal("prior", model.shape).double()
    x = noise * levels[0] if flow else noise * (1 + levels[0] ** 2).sqrt()
    assert torch.isclose(levels[0], sigmas[-1], rtol=1e-5)  # else the noise would be scaled otherwise
    for k, (sigma, after) in enumerate(zip(levels, levels[1:], strict=False), 1):
        x0 = denoised(x, sigma)
        if "sampler euler" in text:
            x = x + (x - x0) / sigma * (after - sigma)
        elif after > 0:
            new = draws.normal("solver", model.shape, turn=k).double()
            x = after * new + (1 - after) * x0 if flow else x0 + after * new
        else:
            x = x0
    return x


def walking(model, steps):
    return Sampler.walking("euler", model.denoiser.schedule.times(steps).tolist())


def one(model):
    return Sampler.one_step(model.denoiser.schedule)


SETTINGS = [
    ("tiny-sd", one, "KSampler: sampler lcm, scheduler simple, 1 step, denoise 1, CFG 1"),
    ("tiny-sd", lambda _: Sampler.renoising(LCM, 2), "KSampler: sampler lcm, scheduler simple, 2 steps, denoise 1, CFG 1"),
    ("tiny-sd", lambda _: Sampler.renoising(LCM, 4), "KSampler: sampler lcm, scheduler simple, 4 steps, denoise 1, CFG 1; "
     "the model through ModelSamplingDiscrete (lcm)"),
    ("tiny-sd", lambda _: Sampler.renoising(LCM, 7), "KSampler: sampler lcm, scheduler simple, 7 steps, denoise 1, CFG 1; "
     "the model through ModelSamplingDiscrete (lcm)"),
    ("tiny-sd", lambda _: Sampler.renoising([999, 749, 499, 249], 4), "KSampler: sampler lcm, scheduler simple, 4 steps, denoise 1, CFG 1"),
    ("tiny-sd", lambda _: Sampler.renoising([999, 700, 30], 3), "SamplerCustom: sampler lcm, ManualSigmas 14.61464, ..."),
    ("tiny-sd", lambda model: walking(model, 4), "KSampler: sampler euler, scheduler simple, 4 steps, denoise 1, CFG 1"),
    ("tiny-sd", lambda model: walking(model, 3), "SamplerCustom: sampler euler, ManualSigmas 14.61464, ..."),
    ("shapes", one, "KSampler: sampler lcm, scheduler simple, 1 step, denoise 1, CFG 1; "
     "the model through ModelSamplingDiscrete (v_prediction, zsnr)"),
    ("shapes", lambda _: Sampler.renoising(LCM, 4), "SamplerCustom: sampler lcm, ManualSigmas 4518.764, ..."),
    ("shapes", lambda model: walking(model, 4), "KSampler: sampler euler, scheduler simple, 4 steps, denoise 1, CFG 1; "
     "the model through ModelSamplingDiscrete (v_prediction, zsnr)"),
    ("tiny-sd3", one, "KSampler: sampler lcm, scheduler simple, 1 step, denoise 1, CFG 1; the model through ModelSamplingSD3 (shift 1)"),
    ("tiny-sd3", lambda _: Sampler.renoising([1.0, 0.9, 0.75, 0.5], 4), "KSampler: sampler lcm, scheduler simple, 4 steps, denoise 1, "
     "CFG 1; the model through ModelSamplingSD3 (shift 3)"),
    ("tiny-sd3", lambda model: walking(model, 3), "KSampler: sampler euler, scheduler normal, 3 steps, denoise 1, CFG 1; "
     "the model through ModelSamplingSD3 (shift 3)"),
    ("tiny-sd3", lambda _: Sampler.renoising([1.0, 0.8, 0.3], 3), "SamplerCustom: sampler lcm, ManualSigmas 1, 0.8, 0.3, 0 (no scheduler "
     "has these times), CFG 1; the model through ModelSamplingSD3 (shift 1)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sampler", "wanted"), SETTINGS)
def test_comfyui_under_these_settings_makes_the_same_picture(name, sampler, wanted, models):
    made = student(models[name], sampler(models[name]))
    said = comfyui.settings(made)
    assert said == wanted or (wanted.endswith("...") and said.startswith(wanted.removesuffix("...")))
    assert f"| in ComfyUI | {said} |" in card(made, InDiffusers())
    draws, labels = Draws(0, range(2)), torch.tensor([0, 1])
    ours = made.generate(draws, labels)
    apart = (of_comfyui(made, said, draws, labels) - ours).abs().max() / ours.std()
    assert apart < (1e-2 if "zsnr" in said else 1e-4)  # ComfyUI's alpha at the last time is 2e-4, and not 0


def test_comfyui_has_no_setting_for_other_students(models):
    """One that starts at an earlier time gets noise of that time from ComfyUI, and here whole noise."""
    tiny, flow = models["tiny-sd"], models["tiny-sd3"]
    said = {
        "starts below the largest noise level": student(tiny, Sampler.renoising([399.0], 1)),
        " starts below the largest noise level": student(flow, Sampler.renoising([0.9, 0.5], 2)),
        "tells the network no guidance scale": told(tiny),
        "reads no such network, or not at such noise levels": student(load("tiny"), one(load("tiny"))),
        " reads no such network, or not at such noise levels": other_table(tiny),
    }
    for words, made in said.items():
        assert comfyui.settings(made).startswith(f"no: it {words.strip()}")
    assert comfyui.settings(tiny) == ""


def other_table(model):
    made = one_step(model.copy())
    made.denoiser.schedule = TableSchedule.from_config({"beta_schedule": "linear"})
    return made


# programs


class Torchs:
    """Noise as a pipeline draws it, one picture at a time, after torch.manual_seed(0)."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, purpose, shape, turn=0):
        return torch.randn(1, *shape, generator=self.generator)


def ran(snippet, folder, here, monkeypatch):
    """The picture that a card's program leaves, run as it stands."""
    monkeypatch.chdir(here)
    torch.manual_seed(0)
    exec(snippet.replace("FOLDER", str(folder)), {})
    return torch.from_numpy(np.array(Image.open("picture.png").convert("RGB"))).permute(2, 0, 1).float()


def looks(model):
    """(3, H, W) in 0..255: our own picture of the first class, or of PROMPT, from the same noise."""
    if model.text is not None:
        model = model.with_prompts(["PROMPT"])
    return ((model.sample(Torchs(), torch.tensor([0]))[0] + 1) * 127.5).round().expand(3, -1, -1)


def told(model):
    network = model.copy().denoiser
    network.network = network.network.told()
    return replace(model, denoiser=network, sampler=Sampler.renoising(LCM, 4).with_told(3.0, None))


def latent_flow(model):
    network = model.copy().denoiser
    network.schedule, network.parameterisation, network.time_input = FlowSchedule(), "flow", "1000 t"
    return replace(model, denoiser=network, sampler=Sampler.one_step(FlowSchedule()))


def one_step(model):
    return replace(model, sampler=one(model))


def on_lora(model):
    """Of another size than the base's, which its folder cannot say."""
    denoiser = copy.copy(model.denoiser)
    denoiser._modules = {"network": adapted(model.backbone, 2, None, ["to_q", "to_v"], 0)}
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    return replace(model, denoiser=denoiser, sampler=one(model)).with_size((16, 16))


PROGRAMS = {
    formats.lora: ("tiny-sd-lora", on_lora),
    formats.sdxl: ("tiny-sdxl", one_step),
    formats.consistency: ("tiny", one_step),
    formats.ddpm: ("tiny-eps", one_step),
    formats.flow: ("tiny-flow", one_step),
    formats.stable_diffusion: ("tiny-sd", lambda model: replace(model, sampler=Sampler.renoising(LCM, 4))),
    formats.latent_consistency: ("tiny-sd", told),
    formats.sd3: ("tiny-sd3", lambda model: replace(model, sampler=Sampler.renoising([1.0, 0.8, 0.3], 3))),
    formats.latent_flow: ("tiny-sd", latent_flow),
    formats.plane: ("moons", one_step),
    formats.edm: ("nvlabs", one_step),
}
"""A student of each format; the last three have no pipeline."""
RENOISING = ("SanaPipeline", "tiny-sana"), ("Lumina2Pipeline", "tiny-lumina2"), ("ZImagePipeline", "tiny-z-image")
TRANSFORMERS = {known.PIPELINES[0]: known for known in formats.transformer.TRANSFORMERS}
PROGRAMS |= {TRANSFORMERS[name]: (tiny, PROGRAMS[formats.sd3][1]) for name, tiny in RENOISING}
PROGRAMS[TRANSFORMERS["Flux2KleinPipeline"]] = ("tiny-klein", one_step)  # its scheduler draws noise for packed tokens, in another order


def called(known):
    """A format's name: that of its module, or of its pipeline."""
    return known.__name__.rpartition(".")[2] if hasattr(known, "__name__") else known.PIPELINES[0]


def teacher(name, models, folder):
    if name == "nvlabs":
        network = EDMUNet(sample_size=16, in_channels=1, model_channels=16, channel_mult=(1,), num_blocks=1, attention_resolutions=())
        schedule = EDMSchedule()
        denoiser = NetworkDenoiser(backbone_of(network.eval()), schedule, "edm", Scales(), "ln sigma / 4")
        return Model(denoiser, ClassConditioner(()), Lineage(name=name))
    made = models.get(name) or FAMILIES[name].options["teacher"]
    if isinstance(made, Made):
        made.make(folder)
    return load(str(folder)) if isinstance(made, Made) else load(made) if isinstance(made, str) else made


@pytest.mark.parametrize("known", formats.FORMATS, ids=called)
def test_the_program_of_a_card_runs_as_it_stands(known, models, tmp_path, monkeypatch):
    """And leaves the picture that we make from the same noise. A card without one says why."""
    name, change = PROGRAMS[known]
    made = change(teacher(name, models, tmp_path / "teacher"))
    made = student(made, made.sampler)
    if known is formats.lora:
        made.backbone.source = str(tmp_path / "teacher")
    assert format_of(made) is known
    formats.save(made, tmp_path / "s")
    text = (tmp_path / "s/README.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    if found is None:
        assert "| in diffusers | not as distill samples it: " in text
        assert "library_name" not in header.header_of(text)
        return
    picture = ran(found[1], tmp_path / "s", tmp_path, monkeypatch)
    assert (picture - looks(made)).abs().max() <= 1
    assert picture.std() > 3

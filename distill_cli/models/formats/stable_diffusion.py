"""Stable Diffusion 1 and 2 as StableDiffusionPipeline: a UNet on latents that reads text, an autoencoder, a CLIP text encoder.

A one-step student has LCMScheduler, so plain diffusers makes the same picture with `num_inference_steps=1, guidance_scale=1`. A
foreign folder with LCMScheduler (Luo et al. 2310.04378) is a student of up to `original_inference_steps` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from distill_cli.diffusion.denoiser import LCM, NetworkDenoiser, Scales, boundary
from distill_cli.diffusion.schedule import TableSchedule
from distill_cli.errors import DistillError
from distill_cli.models import header, lcm, schedulers
from distill_cli.models.backbones import Backbone, backbone_of
from distill_cli.models.checks import check_latents, check_vae
from distill_cli.models.codec import Codec, VAECodec
from distill_cli.models.conditioners import Conditioner, PromptConditioner
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.formats.extra import Extra, read_extra
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.parts import check_named, load_network, quiet, read_json
from distill_cli.models.sampler import Sampler
from distill_cli.models.schedulers import table_of
from distill_cli.models.sources.hub import PARTS as WEIGHTS
from distill_cli.models.text import load_tokenizer

PIPELINES = ("StableDiffusionPipeline",)
SOLVER_OF = {kind: solver for solver, kind in schedulers.SOLVERS.items()}
DEFAULT_SIZE = 64
"""Width of latents in diffusers' pipeline for a network without sample_size."""
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
SEEN = 1e-5
"""The share of x_t in an estimate from which a picture is another one."""
SNIPPET = """from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("FOLDER"{options})
pipeline("PROMPT", {size}{steps}, guidance_scale={scale:g}).images[0].save("picture.png")
"""


def reads(index: dict[str, Any]) -> bool:
    """Whether model_index.json names this pipeline."""
    return index.get("_class_name") in PIPELINES


def fits(model: Model) -> bool:
    """Whether a model has this pipeline's parts."""
    return set(model.parts()) == set(PARTS)


def save(model: Model, folder: Path, dtype: torch.dtype, pipeline: str = PIPELINES[0]) -> None:
    """Write the folder, for a pipeline with these parts."""
    write(model, folder, dtype, scheduler_of(model), in_diffusers(model, pipeline), pipeline)


def write(model: Model, folder: Path, dtype: torch.dtype, scheduler: Any, there: InDiffusers, pipeline: str = PIPELINES[0]) -> None:
    """Write a folder with a scheduler; `there`: how plain diffusers samples it."""
    quiet()
    if model.size is not None:  # a student may have another resolution than its teacher
        height, width = model.size
        model.net.register_to_config(sample_size=height if height == width else [height, width])
    index = {
        "_class_name": pipeline,
        **{name: ["transformers" if name == "text_encoder" else "diffusers", kind] for name, kind in PARTS.items()},
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }

    def parts(temporary: Path) -> None:
        shared.write_parts(model, temporary, PARTS, dtype)

    shared.write(model, folder, index, scheduler, parts, there)


def scheduler_of(model: Model) -> Any:
    """The scheduler that the folder gets."""
    config = model.scheduler
    assert config is not None
    kind = lcm.SCHEDULER if model.sampler.answers == "endpoint" else config["_class_name"]
    made = schedulers.own(config) if kind == config["_class_name"] else schedulers.make(config, kind)
    if model.denoiser.boundary is not None:
        made.register_to_config(timestep_scaling=model.denoiser.boundary)
    if model.denoiser.boundary is not None or (model.sampler.answers == "endpoint" and model.sampler.knows == "own times"):
        made.register_to_config(original_inference_steps=len(model.sampler.times))
    return made


def times_of(model: Model) -> list[float]:
    """The times at which a student is sampled."""
    sampler = model.sampler
    times: list[float] = sampler.times_for(model.denoiser.schedule, sampler.solver, sampler.steps).tolist()
    return times


def taken(model: Model, **asked: Any) -> list[float]:
    """The times that the folder's scheduler takes if it is `asked` for a number of steps, or for times; [] where it refuses."""
    scheduler = scheduler_of(model)
    try:
        scheduler.set_timesteps(**asked)
    except ValueError:  # fewer times than LCMScheduler reckons with
        return []
    times: list[float] = scheduler.timesteps.tolist()
    return times


def paced(model: Model) -> dict[str, Any]:
    """What the pipeline is told of steps: their number, or a student's times where the scheduler by itself takes others."""
    steps = {"num_inference_steps": model.sampler.steps}
    if model.sampler.answers == "mean" or taken(model, **steps) == times_of(model):
        return steps
    return {"timesteps": [round(time) for time in times_of(model)]}


def differs(model: Model) -> str:
    """Why the scheduler of the folder does not sample the model as it is sampled here; '' where it does."""
    sampler, scheduler = model.sampler, scheduler_of(model)
    named = type(scheduler).__name__
    if sampler.answers == "endpoint":
        if taken(model, **paced(model)) != times_of(model):
            return f"the folder's scheduler is {named}, which takes other times"
        kept, _ = boundary(torch.tensor(times_of(model)), LCM)
        keeps = model.denoiser.boundary is None and kept.max() > SEEN
        return f"the folder's scheduler is {named}, which keeps a share of the noise at times so near to 0" if keeps else ""
    if SOLVER_OF.get(named) != sampler.solver:
        return f"the folder's scheduler is {named}, and here it is sampled by {sampler.solver}"
    ours = schedulers.make(model.scheduler or {}, named).config
    other = next((key for key, value in ours.items() if not key.startswith("_") and scheduler.config.get(key) != value), None)
    return f"the folder's scheduler has {other} {scheduler.config.get(other)}, and here it is {ours[other]}" if other else ""


def in_diffusers(model: Model, pipeline: str = PIPELINES[0], options: str = "") -> InDiffusers:
    """The pipeline, opened with `options`, uses the folder's scheduler."""
    sampler = model.sampler
    size = shared.asked_size(model)
    ((key, value),) = paced(model).items()
    called = {"steps": f"{key}={value}", "scale": sampler.guidance_scale, "size": size}
    return InDiffusers(SNIPPET.format(pipeline=pipeline, options=options, **called), differs(model))


class Levels(NamedTuple):
    """What a folder's scheduler says of a model: its configuration, the noise levels, what the network predicts."""

    config: dict[str, Any]
    schedule: TableSchedule
    prediction: str
    source: str

    @property
    def few(self) -> bool:
        """Whether the scheduler is that of a student of few steps."""
        return self.config["_class_name"] == lcm.SCHEDULER


def levels_of(folder: Path, index: dict[str, Any], changes: Mapping[str, Any]) -> Levels:
    """The levels of a folder; `changes` override its scheduler's configuration."""
    path = folder / "scheduler" / "scheduler_config.json"
    stored = read_json(path)
    config = {**stored, **changes}
    schedule, prediction = table_of(config, str(path), schedulers.LATENT_SCHEDULERS)
    check_named(index, "scheduler", stored["_class_name"], path)
    return Levels(config, schedule, prediction, str(path))


def check_parts(folder: Path, index: dict[str, Any], parts: Mapping[str, str], hint: str) -> None:
    """Raise DistillError if model_index.json names other networks than `parts`, or other tokenizers than CLIP's."""
    for part, kind in parts.items():
        named = index.get(part)
        found = str(named[1] or "missing") if isinstance(named, list) and len(named) == 2 else "missing"
        if found != kind:
            raise DistillError(f"{folder}: its {part} is {found}, not {kind}", hint)
    for part in (name.replace("text_encoder", "tokenizer") for name in parts if name.startswith("text_encoder")):
        if index.get(part) != ["transformers", "CLIPTokenizerFast"]:
            check_named(index, part, "CLIPTokenizer", folder / part)


def load(
    folder: Path, name: str, given: Callable[[Any, str], Any] | None = None, changes: Mapping[str, Any] = MappingProxyType({})
) -> Model:
    """The model in a StableDiffusionPipeline folder, in float32, evaluation mode, on the CPU.

    Without distill.json its sampling is the default of diffusers' pipeline: guidance 7.5, 50 steps of its scheduler, or else of DDIM. With
    LCMScheduler it is a one-step student. For a single file (models/sources/single_file.py) `given(class, part)` makes the networks, and
    `changes` override the configuration of the scheduler, which comes from another folder.
    """
    import diffusers
    import transformers

    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, "text_encoder": transformers.CLIPTextModel}
    index = read_json(folder / "model_index.json")
    check_parts(folder, index, PARTS, "Stable Diffusion 1 and 2 are read")
    levels = levels_of(folder, index, {**changes, "clip_sample": False, "steps_offset": 1})  # as diffusers' pipeline does
    tokenizer = load_tokenizer(folder / "tokenizer")
    made = given or (lambda kind, part: load_network(kind, folder / part, WEIGHTS[part]))
    encoder, vae, unet = (made(kinds[part], part) for part in reversed(PARTS))  # the largest last, to keep the peak of memory low
    check_vae(vae, str(folder / "vae"))
    notes = sized(unet, DEFAULT_SIZE, folder)
    parts = backbone_of(unet), PromptConditioner(tokenizer, encoder), VAECodec(vae)
    model = assembled(folder, name, levels, *parts, Sampler(steps=50, guidance_scale=7.5), given is None)
    model.notes += notes
    check_latents(model, folder)
    return model


def sized(unet: Any, size: int, folder: Path) -> tuple[str, ...]:
    """Give a network without sample_size the pipeline's default `size` of latents; a note on that, or ()."""
    if unet.config.sample_size is not None:
        return ()
    unet.register_to_config(sample_size=size)
    return (f"{folder / 'unet'} does not say its sample_size: latents of {size}x{size}, as diffusers takes them",)


def assembled(
    folder: Path, name: str, levels: Levels, backbone: Backbone, conditioner: Conditioner, codec: Codec, usual: Sampler, own: bool
) -> Model:
    """The model of these parts, with what distill.json says if the folder is its `own`.

    `usual`: how a teacher without distill.json is sampled, by the solver of its scheduler, or else by DDIM.
    """
    config, schedule, prediction, source = levels
    told = bool(backbone.net.config.time_cond_proj_dim)
    extra = read_extra(folder, schedule, (prediction,), ("t",)) if own else None
    if told and not levels.few and extra is None:
        wants = f"time_cond_proj_dim is {backbone.net.config.time_cond_proj_dim}: the network wants a guidance scale as a condition"
        raise DistillError(f"{folder / 'unet'}: {wants}", f"such models are read with {lcm.SCHEDULER}")
    solver = SOLVER_OF.get(config["_class_name"], "ddim")
    extra = extra or Extra(
        parameterisation=prediction,
        time_input="t",
        sampler=lcm.sampler_of(config, told) if levels.few else usual.model_copy(update={"solver": solver}),
        lineage=Lineage(name=name, kind="student" if levels.few else "teacher", licence=licence_of(folder)),
    )
    foreign = levels.few and not extra.lineage.method  # our students have no boundary
    if foreign:  # its scheduler says its times, also where an earlier version has written distill.json
        extra.sampler = lcm.sampler_of(config, told).model_copy(update={"steps": extra.sampler.steps})
    scaling = lcm.scaling_of(config) if foreign else extra.boundary
    notes = schedulers.assumed(config, source)
    if foreign and told:
        notes += (f"{folder} does not say which guidance scales it has learned: any from 1 on is taken",)
    denoiser = NetworkDenoiser(backbone, schedule, prediction, Scales(), "t", scaling).eval().requires_grad_(False)
    return Model(denoiser, conditioner, extra.lineage, extra.sampler, codec, config, extra.recipe, extra.size, notes)


def licence_of(folder: Path) -> str:
    """The licence in the header of a model's README.md; '' if there is none."""
    try:
        text = (folder / "README.md").read_text()
    except (OSError, UnicodeDecodeError):
        return ""
    return header.licence_of(text)

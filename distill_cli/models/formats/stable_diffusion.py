"""Stable Diffusion 1 and 2 as StableDiffusionPipeline: a UNet on latents that reads text, an autoencoder, a CLIP text encoder.

A one-step student has LCMScheduler, so plain diffusers makes the same picture with `num_inference_steps=1, guidance_scale=1`. A
foreign folder with LCMScheduler (Luo et al. 2310.04378) is a student of up to `original_inference_steps` steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.errors import DistillError
from distill_cli.models import header, lcm, schedulers
from distill_cli.models.backbones import backbone_of
from distill_cli.models.checks import check_latents, check_vae
from distill_cli.models.codec import VAECodec
from distill_cli.models.conditioners import PromptConditioner
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.formats.extra import Extra, read_extra
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.parts import check_named, load_network, own_names, quiet, read_json, save_network
from distill_cli.models.sampler import Sampler
from distill_cli.models.schedulers import table_of
from distill_cli.models.sources.hub import PARTS as WEIGHTS
from distill_cli.models.text import load_tokenizer, save_encoder, save_tokenizer

PIPELINES = ("StableDiffusionPipeline",)
SOLVER_OF = {kind: solver for solver, kind in schedulers.SOLVERS.items()}
DEFAULT_SIZE = 64
"""Width of latents in diffusers' pipeline for a network without sample_size."""
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
SNIPPET = """from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("FOLDER")
pipeline("PROMPT", {size}num_inference_steps={steps}, guidance_scale={guidance_scale:g}).images[0].save("picture.png")
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
    conditioner: Any = model.conditioner
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
        for name, network in model.parts().items():
            if name == "text_encoder":
                own_names(network, (PARTS[name],))
                save_encoder(network if dtype == torch.float32 else copy.deepcopy(network).to(dtype), temporary / name)
            else:
                save_network(network, temporary / name, (PARTS[name],), dtype)
        for name, tokenizer in conditioner.tokenizers().items():
            save_tokenizer(tokenizer, temporary / name)

    shared.write(model, folder, index, scheduler, parts, there)


def scheduler_of(model: Model) -> Any:
    """The scheduler that the folder gets."""
    config = model.scheduler
    assert config is not None
    kind = lcm.SCHEDULER if model.sampler.answers == "endpoint" else config["_class_name"]
    made = schedulers.own(config) if kind == config["_class_name"] else schedulers.make(config, kind)
    if model.denoiser.boundary is not None:
        made.register_to_config(original_inference_steps=len(model.sampler.times), timestep_scaling=model.denoiser.boundary)
    return made


def differs(model: Model) -> str:
    """Why the scheduler of the folder does not sample the model as it is sampled here; '' where it does."""
    sampler, scheduler = model.sampler, scheduler_of(model)
    named = type(scheduler).__name__
    if sampler.answers == "endpoint":
        here = sampler.times_for(model.denoiser.schedule, sampler.solver, sampler.steps).tolist()
        try:
            scheduler.set_timesteps(sampler.steps)
            there = scheduler.timesteps.tolist()
        except ValueError:  # fewer times than LCMScheduler reckons with
            there = []
        return "" if there == here else f"the folder's scheduler is {named}, which takes other times"
    if SOLVER_OF.get(named) != sampler.solver:
        return f"the folder's scheduler is {named}, and here it is sampled by {sampler.solver}"
    ours = schedulers.make(model.scheduler or {}, named).config
    other = next((key for key, value in ours.items() if not key.startswith("_") and scheduler.config.get(key) != value), None)
    return f"the folder's scheduler has {other} {scheduler.config.get(other)}, and here it is {ours[other]}" if other else ""


def in_diffusers(model: Model, pipeline: str = PIPELINES[0]) -> InDiffusers:
    """The pipeline uses the folder's scheduler."""
    sampler = model.sampler
    height, width = (side * model.pixels // model.shape[2] for side in model.shape[1:])
    size = "" if height == width else f"height={height}, width={width}, "
    snippet = SNIPPET.format(pipeline=pipeline, size=size, steps=sampler.steps, guidance_scale=sampler.guidance_scale)
    return InDiffusers(snippet, differs(model))


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
    for part, kind in PARTS.items():
        named = index.get(part)
        found = str(named[1] or "missing") if isinstance(named, list) and len(named) == 2 else "missing"
        if found != kind:
            raise DistillError(f"{folder}: its {part} is {found}, not {kind}", "Stable Diffusion 1 and 2 are read")
    path = folder / "scheduler" / "scheduler_config.json"
    stored = read_json(path)
    config = {**stored, **changes, "clip_sample": False, "steps_offset": 1}  # as diffusers' pipeline does
    schedule, prediction = table_of(config, str(path), schedulers.LATENT_SCHEDULERS)
    check_named(index, "scheduler", stored["_class_name"], path)
    if index.get("tokenizer") != ["transformers", "CLIPTokenizerFast"]:
        check_named(index, "tokenizer", "CLIPTokenizer", folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    made = given or (lambda kind, part: load_network(kind, folder / part, WEIGHTS[part]))
    encoder, vae, unet = (made(kinds[part], part) for part in reversed(PARTS))  # the largest last, to keep the peak of memory low
    check_vae(vae, str(folder / "vae"))
    few, told = config["_class_name"] == lcm.SCHEDULER, bool(unet.config.time_cond_proj_dim)
    if told and not few:
        wants = f"time_cond_proj_dim is {unet.config.time_cond_proj_dim}: the network wants a guidance scale as a condition"
        raise DistillError(f"{folder / 'unet'}: {wants}", f"such models are read with {lcm.SCHEDULER}")
    solver = SOLVER_OF.get(config["_class_name"], "ddim")
    extra = (read_extra(folder, schedule, (prediction,), ("t",)) if given is None else None) or Extra(
        parameterisation=prediction,
        time_input="t",
        sampler=lcm.sampler_of(config, told) if few else Sampler(solver=solver, steps=50, guidance_scale=7.5),
        lineage=Lineage(name=name, kind="student" if few else "teacher", licence=licence_of(folder)),
    )
    foreign = few and not extra.lineage.method  # our students have no boundary
    if foreign:  # its scheduler says its times, also where an earlier version has written distill.json
        extra.sampler = lcm.sampler_of(config, told).model_copy(update={"steps": extra.sampler.steps})
    boundary = lcm.scaling_of(config) if foreign else extra.boundary
    denoiser = NetworkDenoiser(backbone_of(unet), schedule, prediction, Scales(), "t", boundary)
    notes = schedulers.assumed(config, str(path))
    if foreign and told:
        notes += (f"{folder} does not say which guidance scales it has learned: any from 1 on is taken",)
    if unet.config.sample_size is None:
        unet.register_to_config(sample_size=DEFAULT_SIZE)
        notes += (f"{folder / 'unet'} does not say its sample_size: latents of {DEFAULT_SIZE}x{DEFAULT_SIZE}, as diffusers takes them",)
    denoiser.eval().requires_grad_(False)
    model = Model(denoiser, PromptConditioner(tokenizer, encoder), extra.lineage, extra.sampler, VAECodec(vae), config, extra.recipe)
    model.notes = notes
    check_latents(model, folder)
    return model


def licence_of(folder: Path) -> str:
    """The licence in the header of a model's README.md; '' if there is none."""
    try:
        text = (folder / "README.md").read_text()
    except (OSError, UnicodeDecodeError):
        return ""
    return header.licence_of(text)

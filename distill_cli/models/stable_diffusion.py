"""Stable Diffusion's pipelines: a UNet on latents that reads text, an autoencoder, a CLIP text encoder (Rombach et al. 2112.10752).

A folder is a plain diffusers StableDiffusionPipeline, a one-step student one with LCMScheduler, so that
`num_inference_steps=1, guidance_scale=1` gives there the picture that it gives here.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from distill_cli.config import NetworkConfig, TextConfig, VAENetworkConfig
from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.schedule import TableSchedule
from distill_cli.errors import DistillError, printable
from distill_cli.files import folder_atomic
from distill_cli.models import schedulers
from distill_cli.models.autoencoder import VAECodec
from distill_cli.models.checks import check_latents, check_vae
from distill_cli.models.conditioners import PromptConditioner
from distill_cli.models.model import Lineage, Model, Sampling
from distill_cli.models.parts import check_named, load_network, own_names, quiet, read_json, save_network
from distill_cli.models.pixel import EXTRA, Extra, card, extra_of, read_extra
from distill_cli.models.schedulers import PREDICTION_TYPES, table_of
from distill_cli.models.sources.hub import PARTS as WEIGHTS
from distill_cli.models.text import create_encoder, load_tokenizer, make_tokenizer, save_encoder, save_tokenizer
from distill_cli.models.unet import UNet

PIPELINE = "StableDiffusionPipeline"
SOLVER_OF = {"PNDMScheduler": "pndm", "DPMSolverMultistepScheduler": "dpm++"}
DEFAULT_SIZE = 64
"""What diffusers' pipeline makes of a network that does not say its sample_size."""
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


def create(
    *,
    vae: Any,
    tokenizer: Any,
    pixels: int,
    network: NetworkConfig,
    text: TextConfig,
    scheduler: dict[str, Any],
    parameterisation: str,
    lineage: Lineage,
    guidance_scale: float,
    solver: str = "ddim",
    seed: int = 0,
) -> Model:
    """A latent text-to-image model with random weights of `seed` on this autoencoder; `scheduler` is diffusers' configuration."""
    import diffusers

    codec = VAECodec(vae)
    channels = tuple(network.channels)
    latents = codec.vae.config.latent_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(
            sample_size=pixels // codec.factor,
            in_channels=latents,
            out_channels=latents,
            block_out_channels=channels,
            layers_per_block=network.layers,
            down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in network.attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(network.attention)),
            norm_num_groups=network.groups,
            attention_head_dim=tuple(max(1, width // network.head) for width in channels),  # which diffusers reads as their number
            cross_attention_dim=text.width,
            dropout=network.dropout,
        )
    config = {**scheduler, "prediction_type": PREDICTION_TYPES[parameterisation]}
    return Model(
        denoiser=NetworkDenoiser(UNet(unet), TableSchedule.from_config(config), parameterisation, Scales(), "t"),
        conditioner=PromptConditioner(tokenizer, create_encoder(text, tokenizer, seed)),
        lineage=lineage,
        sampling=Sampling(solver=solver, steps=50, guidance_scale=guidance_scale),
        codec=codec,
        scheduler=config,
    )


def load_vae(folder: Path) -> Any:
    """The AutoencoderKL in a folder, or in a run of `distill vae`, float32, on the CPU."""
    import diffusers

    folder = Path(folder)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    vae = load_network(diffusers.AutoencoderKL, folder)
    check_vae(vae, str(folder))
    return vae


def save(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `model` to `folder`, which is complete or absent; an older one is replaced. Weights are stored as `dtype`."""
    import diffusers

    quiet()
    text, config = model.text, model.scheduler
    assert text is not None
    assert config is not None
    kind = "LCMScheduler" if model.few_step_times is not None else config["_class_name"]
    scheduler = schedulers.own(config) if kind == config["_class_name"] else schedulers.make(config, kind)
    if model.size is not None:  # of a student that has learned another resolution than its teacher
        height, width = model.size
        model.unet.register_to_config(sample_size=height if height == width else [height, width])
    with folder_atomic(folder) as temporary:
        for name, network in model.parts().items():
            if name == "text_encoder":
                own_names(network, (PARTS[name],))
                save_encoder(network if dtype == torch.float32 else copy.deepcopy(network).to(dtype), temporary / name)
            else:
                save_network(network, temporary / name, (PARTS[name],), dtype)
        save_tokenizer(text.tokenizer, temporary / "tokenizer")
        scheduler.save_pretrained(temporary / "scheduler")
        index = {
            "_class_name": PIPELINE,
            "_diffusers_version": diffusers.__version__,
            **{name: ["transformers" if name == "text_encoder" else "diffusers", kind] for name, kind in PARTS.items()},
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", type(scheduler).__name__],
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "requires_safety_checker": False,
        }
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        (temporary / EXTRA).write_text(extra_of(model).model_dump_json(indent=2) + "\n")
        (temporary / "README.md").write_text(card(model))


def load(
    folder: Path, name: str, given: Callable[[Any, str], Any] | None = None, changes: Mapping[str, Any] = MappingProxyType({})
) -> Model:
    """The model in a StableDiffusionPipeline folder, in float32, evaluation mode, on the CPU.

    Of a single file (models/sources/single_file.py) `given` makes the networks, of a class and a part's name, and `changes` go over the
    configuration of the scheduler: the folder is then another's.

    A folder without distill.json gets what diffusers' pipeline does unasked, guidance 7.5 and 50 steps, by PNDM or DPM-Solver++ where its
    scheduler is one, else by DDIM; with LCMScheduler it is a one-step student.
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
    config = {**stored, **changes, "clip_sample": False, "steps_offset": 1}  # as diffusers' pipeline insists
    schedule, prediction = table_of(config, str(path), schedulers.LATENT_SCHEDULERS)
    check_named(index, "scheduler", stored["_class_name"], path)
    if index.get("tokenizer") != ["transformers", "CLIPTokenizerFast"]:
        check_named(index, "tokenizer", "CLIPTokenizer", folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    made = given or (lambda kind, part: load_network(kind, folder / part, WEIGHTS[part]))
    encoder, vae, unet = (made(kinds[part], part) for part in reversed(PARTS))  # the largest last, when nothing else is read
    check_vae(vae, str(folder / "vae"))
    student = config["_class_name"] == "LCMScheduler"
    solver = "few-step" if student else SOLVER_OF.get(config["_class_name"], "ddim")
    extra = (read_extra(folder, schedule, prediction) if given is None else None) or Extra(
        parameterisation=prediction,
        time_input="t",
        sampling=Sampling(solver="few-step", steps=1) if student else Sampling(solver=solver, steps=50, guidance_scale=7.5),
        few_step_times=[schedule.t_max] if student else None,
        lineage=Lineage(name=name, kind="student" if student else "teacher", licence=licence_of(folder)),
    )
    notes = schedulers.assumed(config, str(path))
    if unet.config.sample_size is None:
        unet.register_to_config(sample_size=DEFAULT_SIZE)
        notes += (f"{folder / 'unet'} does not say its sample_size: latents of {DEFAULT_SIZE}x{DEFAULT_SIZE}, as diffusers takes them",)
    model = Model(
        denoiser=NetworkDenoiser(UNet(unet), schedule, prediction, Scales(), "t").eval().requires_grad_(False),
        conditioner=PromptConditioner(tokenizer, encoder),
        lineage=extra.lineage,
        sampling=extra.sampling,
        few_step_times=extra.few_step_times,
        codec=VAECodec(vae),
        scheduler=config,
        recipe=extra.recipe,
        notes=notes,
    )
    check_latents(model, folder)
    return model


def licence_of(folder: Path) -> str:
    """What the header of a model's README.md says, '' where it says nothing."""
    try:
        text = (folder / "README.md").read_text()
    except (OSError, UnicodeDecodeError):
        return ""
    header = text.split("---")[1] if text.startswith("---") else ""
    found = re.search(r"^license: *(\S+)", header, re.MULTILINE)
    return printable(found[1].strip("'\"")) if found else ""


def tiny() -> Model:
    """Stable Diffusion's parts, 64x64 pictures, with random weights, made in memory: for smoke runs."""
    from distill_cli.data.shapes import TRAINED
    from distill_cli.models import autoencoder

    tokenizer = make_tokenizer((thing.caption for thing in TRAINED), 16)
    return create(
        vae=autoencoder.create(64, 3, VAENetworkConfig(channels=[8, 8, 8, 8], groups=4), 0).vae.eval().requires_grad_(False),
        tokenizer=tokenizer,
        pixels=64,
        network=NetworkConfig(channels=[16, 16], attention=[False, True], groups=4, head=8),
        text=TextConfig(width=16, layers=1, heads=2),
        scheduler={
            "_class_name": "PNDMScheduler",
            **schedulers.STABLE_DIFFUSION,
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "clip_sample": False,
        },
        parameterisation="eps",
        lineage=Lineage(name="tiny-sd", licence="Apache-2.0", data="shapes"),
        guidance_scale=7.5,
        solver="pndm",
    )

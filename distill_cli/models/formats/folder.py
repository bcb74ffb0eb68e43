"""Shared by all formats: writing a folder, and reading models without text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.schedule import NoiseSchedule
from distill_cli.errors import DistillError
from distill_cli.files import folder_atomic
from distill_cli.models.backbones import Backbone, backbone_of
from distill_cli.models.checks import check_labelled
from distill_cli.models.codec import Codec
from distill_cli.models.conditioners import ClassConditioner
from distill_cli.models.formats.card import InDiffusers, card
from distill_cli.models.formats.extra import EXTRA, Extra, extra_of, read_extra
from distill_cli.models.lineage import Lineage
from distill_cli.models.lora import Adapter
from distill_cli.models.model import Model
from distill_cli.models.parts import check_named, load_network, own_names, read_json, save_network
from distill_cli.models.sampler import Sampler
from distill_cli.models.sources.hub import part_of
from distill_cli.models.text import save_encoder, save_tokenizer

LIBRARIES = {"UNet2DModel": "diffusers", "EDMUNet": "distill_cli.models.edm"}
"""Network classes of pixel models, and the library of each."""


class Levels(NamedTuple):
    """What a scheduler says of a model: its noise levels, and what the network may predict and take as time, the usual ones first."""

    schedule: NoiseSchedule
    scales: Scales
    predictions: tuple[str, ...]
    time_inputs: tuple[str, ...]
    sampler: Sampler
    """How a model without distill.json is sampled."""
    notes: tuple[str, ...] = ()


def write(model: Model, folder: Path, index: Mapping[str, Any], scheduler: Any, parts: Callable[[Path], None], there: InDiffusers) -> None:
    """Write a folder, complete or absent: model_index.json, scheduler, distill.json, card, and the networks by `parts`."""
    import diffusers

    with folder_atomic(folder) as temporary:
        parts(temporary)
        scheduler.save_pretrained(temporary / "scheduler")
        whole = {"_diffusers_version": diffusers.__version__, **index, "scheduler": ["diffusers", type(scheduler).__name__]}
        (temporary / "model_index.json").write_text(json.dumps(whole, indent=2) + "\n")
        (temporary / EXTRA).write_text(extra_of(model).model_dump_json(indent=2) + "\n")
        (temporary / "README.md").write_text(card(model, there))


def write_parts(model: Model, folder: Path, kinds: Mapping[str, str], dtype: torch.dtype) -> None:
    """Write the networks of a model of text, of the classes `kinds`, as `dtype`, and its tokenizers: each into its own folder."""
    conditioner: Any = model.conditioner
    for name, network in model.parts().items():
        if name.startswith("text_encoder"):
            own_names(network, (kinds[name],))
            save_encoder(network if dtype == torch.float32 else copy.deepcopy(network).to(dtype), folder / name)
        else:
            save_network(network, folder / name, (kinds[name],), dtype)
    for name, tokenizer in conditioner.tokenizers().items():
        save_tokenizer(tokenizer, folder / name)


def write_labelled(
    model: Model,
    folder: Path,
    dtype: torch.dtype,
    pipeline: str,
    scheduler: Any,
    there: InDiffusers,
    libraries: Mapping[str, str] = LIBRARIES,
) -> None:
    """Write the folder of a model without text, its weights stored as `dtype`; its network is of a class of `libraries`."""
    kind, part = type(model.net).__name__, model.backbone.part
    index = {"_class_name": pipeline, part: [libraries.get(kind), kind]}
    write(model, folder, index, scheduler, lambda path: save_network(model.net, path / part, libraries, dtype), there)


def asked_size(model: Model) -> str:
    """What the pipeline is told of the size, in a card's program; '' where it is the network's own, which is a square."""
    height, width = (side * model.codec.factor for side in model.shape[1:])
    kept = isinstance(model.backbone, Adapter) and model.shape != model.backbone.shape  # a LoRA's folder cannot change its base's
    return f"height={height}, width={width}, " if height != width or kept else ""


def scheduler_of(folder: Path, known: tuple[str, ...]) -> tuple[dict[str, Any], Path]:
    """Configuration of the folder's scheduler, and its path. Raises DistillError for a class that is not in `known`."""
    path = part_of(folder, "scheduler") / "scheduler_config.json"
    config, index = read_json(path), read_json(folder / "model_index.json")
    kind = config.get("_class_name")
    if kind not in known:
        pipeline = index.get("_class_name")
        raise DistillError(f"{path}: {kind or 'no scheduler class'} in a {pipeline}", f"a {pipeline} is read with {', '.join(known)}")
    check_named(index, "scheduler", kind, path)
    return config, path


def read_labelled(
    folder: Path,
    name: str,
    levels: Levels,
    part: str = "unet",
    libraries: Mapping[str, str] = LIBRARIES,
    adapter: Callable[[Any], Backbone] = backbone_of,
    codec: Codec = Codec(),
) -> Model:
    """The model without text in a folder: its network, of a class of `libraries`, is called by `adapter`.

    Without distill.json it has the levels' first prediction, first time input, and sampler.
    """
    schedule, scales, predictions, time_inputs, sampler, notes = levels
    named = read_json(folder / "model_index.json").get(part)
    kind = next((kind for kind, library in libraries.items() if named == [library, kind]), None)
    if kind is None:
        raise DistillError(f"{folder}: its {part} is {named}, not one of {', '.join(libraries)}", f"{codec.kind.name} of these are read")
    net = load_network(getattr(import_module(libraries[kind]), kind), part_of(folder, part))
    known = net.config.num_class_embeds
    extra = read_extra(folder, schedule, predictions, time_inputs) or Extra(
        parameterisation=predictions[0],
        time_input=time_inputs[0],
        classes=[str(k) for k in range(known - (kind == "EDMUNet") if known else 0)],  # EDMUNet counts the null label too
        sampler=sampler,
        lineage=Lineage(name=name, kind="teacher" if sampler.guidance == "outside" else "student"),
    )
    null = extra.null_label
    if extra.lineage.kind == "teacher" and extra.time_input == "ln sigma / 4" and not net.config.get("label_dropout"):
        null = None  # NVlabs' networks have no trained null class; folders of earlier versions name one
    denoiser = NetworkDenoiser(adapter(net), schedule, extra.parameterisation, scales, extra.time_input, extra.boundary)
    conditioner = ClassConditioner(tuple(extra.classes), null, extra.learned)
    model = Model(denoiser.eval().requires_grad_(False), conditioner, extra.lineage, extra.sampler, codec, recipe=extra.recipe, notes=notes)
    check_labelled(model, folder)
    return model

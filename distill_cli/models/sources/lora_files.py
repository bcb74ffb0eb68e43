"""LoRAs of others, merged into a model: a style or a fine-tune becomes part of the teacher.

A file has pairs of matrices for layers of the network and of the text encoders: the weight W becomes W + weight alpha / rank B A
(Hu et al. 2106.09685), in float32. A file without alpha has alpha = rank, as in diffusers and in kohya's scripts. Each key is held
against the model's layers (models/lora_keys.py), and nothing is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from distill_cli.errors import DistillError, printable, reason
from distill_cli.files import reading
from distill_cli.models import lora_keys
from distill_cli.models.lora_keys import Half, Layer
from distill_cli.models.model import Model
from distill_cli.models.parts import check_file
from distill_cli.models.sources.catalog import LORA
from distill_cli.models.sources.convert import trimmed
from distill_cli.models.sources.names import LoRA
from distill_cli.tensors import Tensors

OTHERS = (
    (r"dora_scale|lora_magnitude_vector", "a DoRA"),
    (r"\.hada_w", "a LoHa"),
    (r"\.lokr_w", "a LoKr"),
    (r"\.lora_mid\.", "a LoRA of three factors (CP decomposition)"),
    (r"\.oft_|\.boft_|\.(a1|b1|diff|diff_b|w_norm|b_norm)(\.|$)", "a change to weights of another kind than LoRA"),
    (r"\.lora_B\.bias$", "a LoRA with biases"),
)
"""Keys of what is no plain LoRA."""
IS = "a LoRA of diffusers or kohya's scripts for this model's architecture is expected"


def _opened(path: Path) -> Tensors:
    """The file, or that in the folder `path`."""
    inside = (path / LORA, path / "student" / LORA)  # a folder, or a run
    file = next((file for file in inside if file.is_file()), inside[0]) if path.is_dir() else path
    if not file.is_file():
        what = f"no {LORA} in the folder" if path.is_dir() else "no such LoRA file"
        raise DistillError(f"{path}: {what}", "a LoRA on a model is a .safetensors file or a folder: BASE+FILE@WEIGHT")
    if file.suffix.lower() != ".safetensors":
        raise DistillError(f"{file}: not a .safetensors file", "only safetensors are read: other files may run code")
    check_file(file)
    try:
        with reading(file):
            return Tensors(file)
    except (SafetensorError, ValueError) as error:
        raise DistillError(f"{file}: no readable safetensors ({reason(error)})", "is the download complete?") from error


def _sorted(file: Tensors, layers: Mapping[str, Layer]) -> dict[Layer, dict[Half, str]]:
    """The keys of a file by layer and half. Raises DistillError, by the first key, for anything but whole pairs of known layers."""
    out: dict[Layer, dict[Half, str]] = {}
    unknown = []
    for pattern, what in OTHERS:
        if found := next((key for key in sorted(file.shapes) if re.search(pattern, key)), None):
            raise DistillError(f"{file.path}: {what}, by its {printable(found, 100)}, which is not read", "plain LoRA is")
    for key in sorted(file.shapes):
        found_key = lora_keys.split(key)
        layer = layers.get(found_key[0]) if found_key else None
        if found_key is None or layer is None:
            unknown.append(key)
        elif found_key[1] in out.setdefault(layer, {}):
            raise DistillError(
                f"{file.path}: {printable(key, 100)} and {printable(out[layer][found_key[1]], 100)} are of the same layer", IS
            )
        else:
            out[layer][found_key[1]] = key
    if unknown:
        more = f" ({len(unknown)} of {len(file.shapes)} keys)"
        raise DistillError(f"{file.path}: {printable(unknown[0], 100)} is of no layer of the model{more}", IS)
    if not out:
        raise DistillError(f"{file.path}: no tensors", IS)
    for layer, halves in out.items():
        if lacking := next((half for half in ("down", "up") if half not in halves), None):
            there = printable(next(iter(halves.values())), 100)
            raise DistillError(f"{file.path}: {there} has no other half: {layer.module} lacks its {lacking}", "is the file complete?")
    return out


def _adapter_options(file: Tensors, part: str) -> dict[str, Any]:
    """What newer versions of diffusers say of a part's LoRA in the file's header: lora_alpha, alpha_pattern, use_rslora."""
    text = file.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        said = json.loads(text)
        return {key.removeprefix(f"{part}."): value for key, value in said.items() if key.startswith(f"{part}.")}
    except (ValueError, AttributeError, RecursionError) as error:
        raise DistillError(f"{file.path}: lora_adapter_metadata is not readable ({reason(error)})", "is the file complete?") from error


def _alpha(file: Tensors, layer: Layer, key: str | None, rank: int) -> float:
    """alpha, by which the product of the halves is multiplied after division by the rank (rsLoRA: its root, which is turned into alpha)."""
    options = _adapter_options(file, layer.part)
    if key is not None:
        values = file.read(key, whole=True).flatten().tolist()
        alpha = values[0] if len(values) == 1 else math.nan
    else:
        pattern = options.get("alpha_pattern") or {}
        if not isinstance(pattern, dict):
            raise DistillError(f"{file.path}: lora_adapter_metadata is not readable (alpha_pattern)", "is the file complete?")
        own = [value for name, value in pattern.items() if layer.module == name or layer.module.endswith(f".{name}")]
        alpha = own[0] if own else options.get("lora_alpha", rank)
        if options.get("use_rslora"):
            alpha = alpha * math.sqrt(rank) if isinstance(alpha, int | float) else math.nan
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise DistillError(f"{file.path}: the alpha of {layer.module} is {printable(alpha, 60)}, not one number", "is the file complete?")
    return float(alpha)


def _merge(file: Tensors, layer: Layer, halves: Mapping[Half, str], network: Any, weight: float) -> None:
    """Add a layer's LoRA to its weights, unless they are on the meta device. Raises DistillError if the shapes do not fit."""
    module = network.get_submodule(layer.module)
    old, down, up = module.weight, file.shapes[halves["down"]], file.shapes[halves["up"]]
    rank = down[0] if down else 0
    fits = trimmed(down[1:]) == trimmed(old.shape[1:]) and trimmed(up) == trimmed((len(old), rank))
    if not rank or not fits:
        shapes = f"{down} and {up}, which do not fit {tuple(old.shape)}"
        raise DistillError(f"{file.path}: {printable(halves['down'], 100)} and its other half have shapes {shapes}", IS)
    scale = weight * _alpha(file, layer, halves.get("alpha"), rank) / rank
    if old.is_meta:
        return
    change = scale * (file.read(halves["up"]).reshape(len(old), rank) @ file.read(halves["down"]).reshape(rank, -1))
    if not torch.isfinite(change).all():
        raise DistillError(f"{file.path}: the change to {layer.module} is not finite", "is the file damaged?")
    module.weight = torch.nn.Parameter(old.detach() + change.reshape(old.shape).to(old), requires_grad=old.requires_grad)


def on(model: Model, loras: Iterable[LoRA]) -> Model:
    """`model` with LoRAs merged into its weights, which are changed in place; its name and notes say so.

    Raises DistillError for a file that is no plain LoRA of the model's architecture.
    """
    loras = tuple(loras)
    backbone = model.backbone.merged()
    if loras and backbone is not model.backbone:
        model.denoiser.network = backbone
    networks = {backbone.part: backbone.net, **model.conditioner.parts()}
    layers = lora_keys.layers_of(networks)
    for path, weight in loras:
        file = _opened(path)
        changed = _sorted(file, layers)
        for layer, halves in changed.items():
            _merge(file, layer, halves, networks[layer.part], weight)
        parts = " and ".join(
            f"{sum(layer.part == part for layer in changed)} of {part}" for part in dict.fromkeys(at.part for at in changed)
        )
        named = f"{path.name}@{weight:g}"
        model = replace(
            model,
            lineage=model.lineage.model_copy(update={"name": printable(f"{model.lineage.name}+{named}")}),
            notes=(*model.notes, printable(f"LoRA {path} merged at weight {weight:g}: layers {parts}")),
        )
    return model

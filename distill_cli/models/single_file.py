"""Stable Diffusion from a single .safetensors checkpoint, in the layout of its first publishers (CompVis, Stability)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from distill_cli.errors import DistillError, reason
from distill_cli.models.hub import HUB, WANTED, cached, command
from distill_cli.models.model import Model


def configuration(path: Path, second: bool) -> Path:
    """The folder of the configurations and tokenizer that such a file lacks: its own, or the cached one of sd15."""
    if (path.parent / "model_index.json").is_file():
        return path.parent
    if second:  # version 2 was published twice, predicting noise at 512 pixels and v at 768, and the files do not say which
        raise DistillError(
            f"{path}: Stable Diffusion 2 or 2.1, whose files do not say whether they predict noise or v",
            f"put its own configuration and tokenizer beside it, for 2.1: {command(HUB['sd21'].id, WANTED)} --local-dir FOLDER",
        )
    known = HUB["sd15"]
    found = cached(known.id)
    if found is None:
        raise DistillError(
            f"{path}: the file holds weights alone; its configuration and tokenizer, those of {known.id}, are not in the cache",
            f"{command(known.id, WANTED)} --local-dir FOLDER, and put the file into that folder",
        )
    return found


def _is_second(path: Path) -> bool:
    """Whether it is Stable Diffusion 2, whose text has 1024 channels."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as handle:
            names = set(handle.keys())
            name = next(name for name in sorted(names) if name.endswith("attn2.to_k.weight"))
            return handle.get_slice(name).get_shape()[1] == 1024
    except Exception as error:  # safetensors raises its own kind; StopIteration for another model's file
        raise DistillError(f"{path}: no single-file checkpoint of Stable Diffusion in safetensors", "only .safetensors are read") from error


def load(path: Path) -> Model:
    """The model in a single file, in float32, evaluation mode, on the CPU."""
    import diffusers

    from distill_cli.models import stable_diffusion

    if path.suffix != ".safetensors":
        raise DistillError(f"{path}: not a .safetensors file", "only safetensors are read: other checkpoints may run code")
    folder = configuration(path, _is_second(path))
    pipeline: Any = diffusers.StableDiffusionPipeline
    try:
        made = pipeline.from_single_file(
            str(path), config=str(folder), local_files_only=True, safety_checker=None, feature_extractor=None, torch_dtype=torch.float32
        )
    except Exception as error:  # diffusers raises many kinds for a file that is not of the configuration
        raise DistillError(f"{path}: not a checkpoint of {folder} ({reason(error)})") from error
    with tempfile.TemporaryDirectory() as temporary:
        made.save_pretrained(temporary)
        model = stable_diffusion.load(Path(temporary), path.stem)
    licence = stable_diffusion.licence_of(folder) or ("" if folder == path.parent else HUB["sd15"].licence)
    model.lineage = model.lineage.model_copy(update={"licence": licence})
    return model

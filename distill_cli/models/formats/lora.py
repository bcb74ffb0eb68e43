"""Students that are a LoRA: the file that diffusers' pipelines load onto the base, with its scheduler and what diffusers has no place for.

The folder has no model_index.json, since it is no pipeline. The base is read by the name that it had in training.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.errors import DistillError, reason
from distill_cli.files import folder_atomic
from distill_cli.models import flow_matching
from distill_cli.models.formats import latent_flow, sd3, sdxl, stable_diffusion
from distill_cli.models.formats.card import InDiffusers, card, with_lora
from distill_cli.models.formats.extra import EXTRA, extra_of, read_extra
from distill_cli.models.formats.transformer import TRANSFORMERS
from distill_cli.models.lora import Adapter
from distill_cli.models.model import Model
from distill_cli.models.parts import check_file, hold, quiet, read_json
from distill_cli.models.schedulers import LATENT_SCHEDULERS, table_of
from distill_cli.models.sources.catalog import LORA
from distill_cli.tensors import Tensors

PIPELINES: tuple[str, ...] = ()
BASES: tuple[Any, ...] = (stable_diffusion, sdxl, sd3, *TRANSFORMERS)
"""The formats of models whose pipelines load a LoRA."""


def base_of(model: Model) -> Any | None:
    """The format of a model's base whose pipeline loads a LoRA; None if there is none."""
    told = model.sampler.guidance == "told"
    return None if told or latent_flow.fits(model) else next((known for known in BASES if known.fits(model)), None)


def reads(index: dict[str, Any]) -> bool:
    """No model_index.json: the model's source finds the base first, and calls `onto`."""
    return False


def load(folder: Path, name: str) -> Model:
    raise NotImplementedError("a LoRA is read onto its base")


def fits(model: Model) -> bool:
    """Whether the model is a LoRA that is to be saved as one, and a pipeline loads it."""
    return isinstance(model.backbone, Adapter) and not model.backbone.merge and base_of(model) is not None


def save(model: Model, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder: the LoRA by the pipeline's own saver, scheduler, distill.json, card."""
    import diffusers

    quiet()
    adapter, known = model.backbone, base_of(model)
    assert isinstance(adapter, Adapter)
    assert known is not None
    tensors = {name: value.to(dtype) for name, value in adapter.tensors().items()}
    with folder_atomic(folder) as temporary:
        getattr(diffusers, known.PIPELINES[0]).save_lora_weights(temporary, **{f"{adapter.part}_lora_layers": tensors})
        known.scheduler_of(model).save_pretrained(temporary / "scheduler")
        (temporary / EXTRA).write_text(extra_of(model).model_dump_json(indent=2) + "\n")
        shutil.copymode(temporary / EXTRA, temporary / LORA)  # safetensors makes files that the owner alone reads
        (temporary / "README.md").write_text(card(model, in_diffusers(model)))


def in_diffusers(model: Model) -> InDiffusers:
    """The pipeline of the base, with the folder's scheduler and LoRA. The base is a hub id, a folder, or a name that this package knows."""
    adapter, known = model.backbone, base_of(model)
    assert isinstance(adapter, Adapter)
    assert known is not None
    return with_lora(known.in_diffusers(model), adapter.source, type(known.scheduler_of(model)).__name__)


def read(folder: Path, model: Model) -> dict[str, Tensor]:
    """The tensors of a folder's LoRA by peft's names, float32. Raises DistillError if they are not those of the model's LoRA."""
    path = folder / LORA
    check_file(path)
    try:
        file = Tensors(path)
        found = {name: file.read(name) for name in file.shapes}
    except (SafetensorError, ValueError, OSError) as error:
        raise DistillError(f"{path}: no readable safetensors ({reason(error)})", "is the file complete?") from error
    assert isinstance(model.backbone, Adapter)
    wanted = {f"{model.backbone.part}.{name}": value.shape for name, value in model.backbone.adapter.state_dict().items()}
    mismatched = [name for name, shape in wanted.items() if name in found and found[name].shape != shape]
    hold(str(path), wanted.keys() - found.keys(), found.keys() - wanted.keys(), mismatched)
    return {name.partition(".")[2]: value for name, value in found.items()}


def source_of(folder: Path) -> str:
    """The name of the base of the LoRA in a folder."""
    lora = read_json(folder / EXTRA).get("lora") if (folder / EXTRA).is_file() else None
    if not isinstance(lora, dict) or not isinstance(lora.get("base"), str):
        raise DistillError(f"{folder}: a LoRA, and {EXTRA} does not name its base", "a LoRA from elsewhere is added to a model: BASE+FILE")
    return lora["base"]


def check_scheduler(model: Model, config: dict[str, Any], path: Path) -> None:
    """Raise DistillError for a scheduler that is not read, or that says other noise levels or another prediction than the base has."""
    if model.scheduler is None:
        flow_matching.schedule_of(config, str(path))
        return
    schedule, prediction = table_of(config, str(path), LATENT_SCHEDULERS)
    base: Any = model.denoiser.schedule
    if prediction != model.denoiser.parameterisation or not torch.equal(schedule.alphas_cumprod, base.alphas_cumprod):
        raise DistillError(f"{path}: other noise levels, or another prediction, than those of the LoRA's base", "is it of another model?")


def onto(model: Model, folder: Path) -> Model:
    """The student in a folder, on its base. Raises DistillError for another base than the LoRA was trained on."""
    old = model.denoiser
    extra = read_extra(folder, old.schedule, (old.parameterisation,), (old.time_input,))
    source = source_of(folder)
    assert extra is not None
    assert extra.lora is not None
    weights = model.weights_hash()
    if weights and weights != extra.lineage.teacher_hash:
        raise DistillError(
            f"{folder}: its base {source} has other weights than the LoRA was trained on", "give it back the folder that it had"
        )
    adapter = Adapter(model.backbone, extra.lora.rank, extra.lora.rank, extra.lora.targets, 0)
    adapter.source = source
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    check_scheduler(model, config, path)
    if model.scheduler is not None:  # what the pipeline sets in every scheduler
        config |= {key: model.scheduler[key] for key in ("clip_sample", "steps_offset") if key in model.scheduler}
    denoiser = NetworkDenoiser(adapter, old.schedule, extra.parameterisation, old.scales, extra.time_input, extra.boundary)
    scheduler = None if model.scheduler is None else config
    out = replace(model, denoiser=denoiser, lineage=extra.lineage, sampler=extra.sampler, recipe=extra.recipe, scheduler=scheduler)
    out = out.with_size(extra.size or model.size)
    tensors = read(folder, out)
    if weights:  # a trial has no weights
        adapter.adapter.load_state_dict(tensors)
    denoiser.eval().requires_grad_(False)
    return out

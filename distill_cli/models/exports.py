"""Models written for other programs: one file in Stable Diffusion's original layout, LoRA files, or a folder of whole weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distill_cli.errors import DistillError, UsageError, nearest
from distill_cli.files import write_atomic_lines
from distill_cli.models import formats
from distill_cli.models.formats import comfyui
from distill_cli.models.lora import Adapter
from distill_cli.models.lora_keys import Layer, kohya_name
from distill_cli.models.lora_keys import split as split_key
from distill_cli.models.model import Model
from distill_cli.models.original import original, unet_names
from distill_cli.models.schedulers import PREDICTION_TYPES
from distill_cli.models.sources.catalog import LORA
from distill_cli.models.sources.names import base_of
from distill_cli.tensors import content

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Version:
    """A version of Stable Diffusion, by the width of the text that its network reads, and its names in the headers of files."""

    name: str
    architecture: str
    kohya: str


VERSIONS = {
    768: Version("Stable Diffusion 1", "stable-diffusion-v1", "sd_v1"),
    1024: Version("Stable Diffusion 2", "stable-diffusion-v2-512", "sd_v2"),
    2048: Version("Stable Diffusion XL", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
PIPELINES = {"StableDiffusionPipeline", "StableDiffusionXLPipeline"}
"""Pipelines whose networks are Stable Diffusion's, under their scheduler's table of noise."""
READ_BY_KOHYA = (".attentions.", ".resnets.", ".downsamplers.", ".upsamplers.")
"""Where kohya's scripts have LoRA: layers elsewhere (conv_in, time_embedding) they pass over without a word."""


def _refuse(model: Model, what: str, hint: str) -> DistillError:
    return DistillError(f"{model.lineage.name}: {what}", hint)


def _stable_diffusion(model: Model, target: str) -> bool:
    """Whether the model is Stable Diffusion XL. Raises DistillError if it is no Stable Diffusion that other programs know."""
    table, prediction = model.denoiser.schedule.bins is not None, model.denoiser.parameterisation
    if not (model.text and table and prediction in ("eps", "v") and set(formats.pipelines_of(model)) & PIPELINES):
        kind = formats.pipelines_of(model)[0]
        what = f"{target} holds Stable Diffusion 1, 2 and XL with noise or v prediction, not a {prediction} model of a {kind}"
        hint = "folder is the target that holds any model"
        if isinstance(model.backbone, Adapter) and model.backbone.comfyui is not None:
            hint = f"its own folder has the LoRA in diffusers' layout ({LORA}), which ComfyUI reads too"
        raise _refuse(model, what, hint)
    return "text_encoder_2" in model.parts()


def _version(model: Model) -> Version | None:
    """The published version with this architecture; None if there is none."""
    return VERSIONS.get(model.net.config.cross_attention_dim)


def _spec(model: Model, version: Version | None) -> dict[str, str]:
    """What Stability's ModelSpec has of a file in its header; our own reader takes the prediction from it."""
    v = model.denoiser.parameterisation == "v"
    architecture = version.architecture.replace("-512", "-768-v" if v else "-512") if version else ""
    said = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.title": model.lineage.name,
        "modelspec.license": model.lineage.licence,
        "modelspec.prediction_type": "v" if v else PREDICTION_TYPES["eps"],
    }
    return {"format": "pt"} | {key: value for key, value in said.items() if value}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], dtype: torch.dtype) -> None:
    """Write a file, complete or absent. Raises DistillError if numbers are too large for `dtype`."""
    most = torch.finfo(dtype).max
    if wrong := next((name for name, value in tensors.items() if value.numel() and not value.abs().max() <= most), None):
        raise DistillError(f"{path}: {wrong} has numbers that {str(dtype).removeprefix('torch.')} cannot hold", "--dtype bfloat16 can")
    write_atomic_lines(path, content(tensors, metadata, dtype))


def _said(model: Model, version: Version | None) -> tuple[str, ...]:
    """What is to know of a file beside its content."""
    sampler, out = model.sampler, []
    if version is None:
        width = model.net.config.cross_attention_dim
        out.append(f"no published Stable Diffusion reads text of {width} channels: ComfyUI cannot load the file, diffusers and distill can")
    if model.lineage.kind == "student":
        taken = sampler.times_for(model.denoiser.schedule, sampler.solver, sampler.steps).tolist()
        times = f", t {', '.join(f'{time:g}' for time in taken)}" if sampler.times else ""
        steps = f"{sampler.steps} step{'s' * (sampler.steps > 1)}"
        out.append(f"the file has no sampler: sample it with {steps}{times}, CFG {sampler.guidance_scale:g}")
        if version is not None:
            out.append(f"in ComfyUI: {comfyui.settings(model)}")
    return tuple(out)


def single_file(model: Model, path: Path, dtype: torch.dtype) -> tuple[str, ...]:
    """Stable Diffusion 1, 2 or XL as one file in the original layout; empty tensors v_pred and ztsnr say what it predicts."""
    _stable_diffusion(model, "single-file")
    model, notes = whole(model)
    version, tensors = _version(model), original(model.parts())
    if model.denoiser.parameterisation == "v":
        tensors["v_pred"] = torch.zeros(0)
    if (model.scheduler or {}).get("rescale_betas_zero_snr"):
        tensors["ztsnr"] = torch.zeros(0)
    _write(path, tensors, _spec(model, version), dtype)
    return notes + _said(model, version)


def lora(target: str, model: Model, path: Path, dtype: torch.dtype) -> tuple[str, ...]:
    """A student's LoRA under the names that kohya's scripts and ComfyUI read, with alpha = rank; of SD 3 under diffusers', for ComfyUI."""
    tensors, part = model.backbone.tensors(), model.backbone.part
    if not tensors:
        raise _refuse(model, f"{target} is for LoRA students: this model has whole weights", "single-file and folder hold those")
    if target == "lora-comfyui" and "StableDiffusion3Pipeline" in formats.pipelines_of(model):
        _write(path, {f"{part}.{name}": value for name, value in tensors.items()}, {"format": "pt"}, dtype)
        return ()
    names = unet_names(model.net.config) if _stable_diffusion(model, target) else None
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        module, half = split_key(key) or ("", "")
        if target == "lora-kohya" and not any(place in f".{module}" for place in READ_BY_KOHYA):
            raise _refuse(model, f"{target}: kohya's scripts have no LoRA for {module}", "lora-comfyui is read with it")
        name = kohya_name(Layer(part, module), names)
        out[f"{name}.lora_{half}.weight"] = value
        if half == "down":
            out[f"{name}.alpha"] = torch.tensor(float(len(value)))
    version, ranks = _version(model), {len(value) for key, value in tensors.items() if key.endswith(".lora_A.weight")}
    v = model.denoiser.parameterisation == "v"
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(float(max(ranks))),
        "ss_v2": str(version is VERSIONS[1024]),
        **({"ss_base_model_version": f"{version.kohya}{'_768_v' * (v and version is VERSIONS[1024])}"} if version else {}),
        **{key: f"{value}/lora" if key.endswith("architecture") else value for key, value in _spec(model, version).items()},
    }
    _write(path, out, metadata, dtype)
    return _said(model, version)


def folder(model: Model, path: Path, dtype: torch.dtype) -> tuple[str, ...]:
    """A diffusers folder of whole weights."""
    model, notes = whole(model)
    formats.save(model, path, dtype)
    return notes


def whole(model: Model) -> tuple[Model, tuple[str, ...]]:
    """The model with the student's LoRA in its weights, and a line that says so; a model without LoRA unchanged."""
    made = model.whole()
    if made is model:
        return model, ()
    return made, (f"{model.lineage.name}: its LoRA is merged into the weights of its base",)


@dataclass(frozen=True)
class Target:
    """What a model is exported to: the writer, which returns what is to be said, and the end of the name of what it writes."""

    write: Callable[[Model, Path, torch.dtype], tuple[str, ...]]
    ending: str


TARGETS = {
    "single-file": Target(single_file, ".safetensors"),
    "lora-kohya": Target(partial(lora, "lora-kohya"), "-lora-kohya.safetensors"),
    "lora-comfyui": Target(partial(lora, "lora-comfyui"), "-lora-comfyui.safetensors"),
    "folder": Target(folder, "-whole"),
}


def settled(name: str, target: str, out: Path | None, dtype: str) -> Path:
    """Where the model called `name` is written. Raises UsageError for an unknown target or type, or a place that is taken."""
    for flag, value, known in (("--to", target, TARGETS), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise UsageError(f"{flag} {value}: none of {', '.join(known)}", nearest(value, known))
    ending = TARGETS[target].ending
    place = out or Path(f"{Path(base_of(name)).resolve().name.removesuffix('.safetensors')}{ending}")
    if place.exists() or place.is_symlink():
        raise UsageError(f"--out {place}: exists already", "choose another name")
    if ending.endswith(".safetensors") and place.suffix != ".safetensors":
        raise UsageError(f"--out {place}: {target} writes a .safetensors file", f"--out {place}.safetensors")
    return place

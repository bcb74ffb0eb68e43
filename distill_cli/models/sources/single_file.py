"""Stable Diffusion from a single .safetensors checkpoint, in the layout of its first publishers (CompVis, Stability).

The file's content is read from names and shapes of tensors and from metadata; `kind_of` recognises anything but a complete Stable
Diffusion 1, 2 or XL. The networks are filled tensor by tensor, in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from distill_cli.errors import DistillError, printable, reason
from distill_cli.models.model import Model
from distill_cli.models.parts import check_file, empty, plain, quiet, read_json
from distill_cli.models.schedulers import PREDICTION_TYPES
from distill_cli.models.sources.catalog import HUB
from distill_cli.models.sources.convert import trimmed
from distill_cli.models.sources.file_kinds import NETWORK, TEXTS, VAE, kind_of, predicts
from distill_cli.models.sources.hub import WANTED, cached, command
from distill_cli.tensors import Tensors

SUFFIX = ".safetensors"
AVERAGED = "model_ema."
COUNTS = (f"{AVERAGED}decay", f"{AVERAGED}num_updates")
ZERO = {"rescale_betas_zero_snr": True, "_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
"""Scheduler settings for zero terminal SNR: sampling has to begin at the last time."""
KNOWN = re.compile(
    r"model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.embedders\.[01]\.|model_ema\.|"
    r"(betas|alphas_cumprod\w*|sqrt_\w+|log_\w+|posterior_\w+|lvlb_weights|logvar|scale_factor|v_pred|ztsnr)$"
)
"""Prefixes of the parts, and tensors of the training schedule, which the scheduler's configuration repeats."""
HARMLESS = ("position_ids", "logit_scale")
"""Tensors in a text encoder's section that it does not use."""
PROJECTION = ("text_projection", "text_projection.weight")
"""The same, of encoders that make no pooled text."""
VERSIONS = {768: ("Stable Diffusion 1", "sd15"), 1024: ("Stable Diffusion 2", "sd21"), 2048: ("Stable Diffusion XL", "sdxl")}
"""What a network is by the width of the text that it reads, and the hub model whose configuration a file of it lacks."""


def configuration(path: Path, width: int) -> tuple[Path, bool]:
    """The folder with the configurations and tokenizer that the file lacks, and whether it is the one beside the file.

    The other choice is a hub model in the cache, by the `width` of the network's text embeddings.
    """
    if (path.parent / "model_index.json").is_file():
        return path.parent, True
    known = HUB.get(VERSIONS.get(width, ("", ""))[1])
    if known is None:
        what = f"it reads text of {width} channels, neither Stable Diffusion 1's 768 nor 2's 1024 nor XL's 2048"
        hint = "put model_index.json and the folders that it names beside the file, weights left out"
        raise DistillError(f"{path}: {what}, and lacks its configuration and tokenizer", hint)
    found = cached(known.id)
    if found is None:
        what = f"the file holds weights alone; its configuration and tokenizer, those of {known.id}, are not in the cache"
        raise DistillError(f"{path}: {what}", f"{command(known.id, WANTED)} --local-dir FOLDER, and put the file into that folder")
    return found, False


def averaged(file: Tensors) -> dict[str, str]:
    """The tensors to use for the network's weights, by name: the training averages if the file has them, else the weights themselves.

    CompVis names an average like its weight, without dots. Raises DistillError if only some weights have an average.
    """
    own = [name for name in file.shapes if name.startswith(NETWORK)]
    if not any(name.startswith(AVERAGED) and name not in COUNTS for name in file.shapes):
        return {name: name for name in own}
    out = {}
    for name in own:
        flat = name.removeprefix("model.")
        place = next((AVERAGED + form for form in (flat.replace(".", ""), flat) if AVERAGED + form in file.shapes), None)
        if place is None or file.shapes[place] != file.shapes[name]:
            raise DistillError(f"{file.path}: has averaged weights (model_ema), but not of {printable(name)}", "is the file complete?")
        out[name] = place
    return out


def _converted(file: Tensors, part: str, network: Any) -> dict[str, Tensor | str]:
    """The tensors of a part, or their names in the file, by the names of diffusers and transformers."""
    from diffusers.loaders import single_file_utils as theirs

    if part == "unet":
        places: dict[str, Any] = averaged(file)
        return theirs.convert_ldm_unet_checkpoint(places, network.config)
    if part == "vae":
        given = {name: file.read(name) for name in file.shapes if name.startswith(VAE) and not name.startswith(f"{VAE}loss.")}
        out = theirs.convert_ldm_vae_checkpoint(dict(given), network.config)
        taken = {value.untyped_storage().data_ptr() for value in out.values()}
        _refuse_left(file, (name for name, value in given.items() if value.untyped_storage().data_ptr() not in taken))
        return out
    prefix = next(prefix for prefix in TEXTS[part] if any(name.startswith(prefix) for name in file.shapes))
    unused = HARMLESS if hasattr(network, "text_projection") else HARMLESS + PROJECTION
    names: dict[str, Any] = {name: name for name in file.shapes if name.startswith(prefix) and not name.endswith(unused)}
    if prefix.endswith("transformer."):
        return theirs.convert_ldm_clip_checkpoint(names)
    return theirs.convert_open_clip_checkpoint(network, {name: file.read(name) for name in names}, prefix)


def _refuse_left(file: Tensors, names: Iterable[str]) -> None:
    """Raise DistillError if tensors of the file are left over."""
    left = sorted(names)
    if left:
        raise DistillError(f"{file.path}: {printable(left[0])} has no place in the network ({len(left)} in all)", "is it another model's?")


def _held(file: Tensors, model: Model, folder: Path, zero: str) -> None:
    """Raise DistillError if the noise table or the scale of latents in the file differs from the configuration."""
    table = model.denoiser.schedule.alphas_cumprod.float()  # type: ignore[attr-defined]
    scale = torch.tensor(float(model.parts()["vae"].config["scaling_factor"]))
    for name, part, value in (("alphas_cumprod", "scheduler", table), ("scale_factor", "vae", scale)):
        if name not in file.shapes or (zero and part == "scheduler"):  # a file for zero terminal SNR still holds the old table
            continue
        stored = file.read(name).reshape(-1)
        if len(stored) != value.numel() or not torch.allclose(stored, value.reshape(-1), rtol=1e-2, atol=1e-3):
            raise DistillError(f"{file.path}: its {name} differs from that in {folder / part}", "is the configuration another model's?")


def _filled(file: Tensors, part: str, kind: Any, folder: Path) -> Any:
    """A part of the model with its weights from the file; raises DistillError that names the first tensor without a place."""
    try:
        network = empty(kind, folder)
    except Exception as error:  # diffusers and transformers raise many types for a damaged configuration
        raise DistillError(f"{folder}: no readable configuration ({reason(error)})", "is the folder complete?") from error
    try:
        found = {plain(name): value for name, value in _converted(file, part, network).items()}
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise DistillError(f"{file.path}: its {part} does not fit {folder} ({reason(error)})", "is it another model's?") from error
    if part == "unet":
        _refuse_left(file, {*averaged(file).values()} - {*found.values()})
    expected = {plain(name): (name, value.shape) for name, value in network.state_dict().items() if not name.endswith("position_ids")}
    odd = sorted(expected.keys() ^ found.keys())
    if odd:
        what = "missing" if odd[0] in expected else "of no place in the network"
        raise DistillError(f"{file.path}: {part}: {printable(odd[0])} is {what} ({len(odd)} in all), by {folder}", "is it another model's?")
    weights = {}
    for short, value in found.items():
        name, shape = expected[short]
        tensor = file.read(value) if isinstance(value, str) else value
        if trimmed(tensor.shape) != trimmed(shape):
            raise DistillError(f"{file.path}: {part}: {printable(name)} has shape {tuple(tensor.shape)}, not {tuple(shape)} as in {folder}")
        weights[name] = tensor.reshape(shape).contiguous()
        found[short] = ""
    network.load_state_dict(weights, strict=False, assign=True)
    for module in network.modules():
        for name, value in module.named_buffers(recurse=False):
            if value.is_meta:  # position ids of a text encoder, which a file may lack
                setattr(module, name, torch.arange(value.shape[-1]).expand(value.shape))
    return network.eval().requires_grad_(False)


def load(path: Path, prediction: str | None = None) -> Model:
    """Load the model in a single file: float32, evaluation mode, on the CPU. `prediction` (eps or v) overrides the file.

    `Model.notes` reports what was read from the file and what was assumed.
    """
    from distill_cli.models.formats import sdxl, stable_diffusion

    if path.suffix.lower() != SUFFIX:
        raise DistillError(f"{path}: not a {SUFFIX} file", "only safetensors are read: other checkpoints may run code")
    check_file(path)
    quiet()
    try:
        file = Tensors(path)
    except OSError as error:
        raise DistillError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (SafetensorError, ValueError) as error:
        raise DistillError(f"{path}: no readable safetensors ({reason(error)})", "is the download complete?") from error
    other, hint = kind_of(file)
    if other:
        raise DistillError(f"{path}: {other}", hint)
    width = next(shape[1] for name, shape in file.shapes.items() if name.endswith("attn2.to_k.weight"))
    said, zero, why = predicts(file, prediction)
    second = width == 1024
    if second and not said and not (path.parent / "model_index.json").is_file():
        what = "Stable Diffusion 2 exists with noise and with v prediction, and the file does not say which it is"
        hint = f"distill convert {path} --prediction v (768 pixels) or eps (512) --out FOLDER, and give that FOLDER"
        raise DistillError(f"{path}: {what}", hint)
    folder, own = configuration(path, width)
    index = read_json(folder / "model_index.json")
    reader: Any = next((each for each in (stable_diffusion, sdxl) if each.reads(index)), None)
    if reader is None:
        raise DistillError(f"{folder}: the configuration of a {index.get('_class_name')}, and the file beside it is Stable Diffusion")
    version, known = VERSIONS.get(width, (f"text of {width} channels", ""))
    changes: dict[str, Any] = {"prediction_type": PREDICTION_TYPES[said]} if said else {}
    notes = [version]
    assumed = f"taken from {folder / 'scheduler'}" if own else f"assumed eps, as {version} does"
    notes.append(f"predicts {said} by {why}" if said else f"the file does not say what it predicts: {assumed}")
    if zero:
        changes |= ZERO
        notes.append(f"zero terminal SNR by {zero}")
    if any(name.startswith(AVERAGED) and name not in COUNTS for name in file.shapes):
        notes.append("averaged weights (model_ema) taken, not the raw ones beside them")

    def given(kind: Any, part: str) -> Any:
        network = _filled(file, part, kind, folder / part)
        if part == "unet" and second and not own:
            network.register_to_config(sample_size=96 if said == "v" else 64)
            notes.append(f"assumed: pictures of {768 if said == 'v' else 512} pixels")
        return network

    beside = sorted(name for name in file.shapes if not KNOWN.match(name))
    if beside:
        notes.append(f"{len(beside)} tensors of no part left out, such as {printable(beside[0], 100)}")
    model = reader.load(folder, path.stem, given, changes)
    _held(file, model, folder, zero)
    if not own:
        notes.append(f"configuration and tokenizer of {HUB[known].id}")
        model.lineage = model.lineage.model_copy(update={"licence": model.lineage.licence or HUB[known].licence})
    model.notes = (*model.notes, f"{path}: {'; '.join(notes)}")
    return model


def convert_checkpoint(path: Path, folder: Path, prediction: str | None = None) -> dict[str, Any]:
    """Convert a single file to a diffusers folder, in float32."""
    from distill_cli.models.formats import save

    model = load(path, prediction)
    save(model, folder)
    return {
        "format": "single-file checkpoint",
        "kind": model.lineage.kind,
        "parameters": sum(value.numel() for value in model.denoiser.parameters()),
        "pixels": model.pixels,
        "prediction": model.denoiser.parameterisation,
        "licence": model.lineage.licence,
        "assumed": [note.removeprefix(f"{path}: ") for note in model.notes],
        "weights_hash": model.weights_hash(),
    }

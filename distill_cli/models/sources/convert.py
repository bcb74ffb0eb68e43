"""Read published EDM and consistency checkpoints as Models: NVlabs' pickles and OpenAI's state dicts."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.errors import DistillError, UsageError, printable, reason
from distill_cli.files import remove_folder
from distill_cli.models import formats
from distill_cli.models.backbones import backbone_of
from distill_cli.models.checks import rehearse
from distill_cli.models.conditioners import ClassConditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.parts import check_file
from distill_cli.models.sampler import Sampler
from distill_cli.models.sources.openai import blocks, openai_network, settle_openai
from distill_cli.models.sources.unpickle import Record, check_operations, read
from distill_cli.models.times import PUBLISHED, from_indices
from distill_cli.tensors import quantized

SONG = {
    "model_channels": 128, "channel_mult": [1, 2, 2, 2], "channel_mult_emb": 4, "num_blocks": 4, "attn_resolutions": [16],
    "embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard", "decoder_type": "standard",
    "resample_filter": [1, 1],
}  # fmt: skip
DHARIWAL = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "channel_mult_emb": 4, "num_blocks": 3, "attn_resolutions": [32, 16, 8]}
DEFAULTS = {"SongUNet": SONG, "DhariwalUNet": DHARIWAL}
"""Defaults of init arguments that a file leaves out (the published networks' own)."""
NVLABS = {
    "norm0": "resnet.norm1", "conv0": "resnet.conv1", "affine": "resnet.time_emb_proj", "norm1": "resnet.norm2", "conv1": "resnet.conv2",
    "skip": "resnet.conv_shortcut", "norm2": "attention.group_norm", "qkv": "attention.qkv", "proj": "attention.to_out.0",
}  # fmt: skip
DROPPED = re.compile(r"(^|\.)(resample_filter|map_augment)(\.|$)")
"""Tensors that are not loaded: constant filters, and the input of training-time augmentation, which is zero in sampling."""


@dataclass
class Found:
    """The content of a file: a network without weights, the weights, and how the model is sampled."""

    source: str
    architecture: str
    network: Any
    weights: dict[str, Tensor]
    classes: int
    null_class: bool
    time_input: str
    licence: str
    parameterisation: str = "edm"
    sigma_data: float = 0.5
    assumed: tuple[str, ...] = ()
    """What was assumed, because the file does not say it."""


def interleaved(value: Tensor, heads: int) -> list[Tensor]:
    """q, k, v from NVlabs' attention, where they alternate by channel inside each head: q k v q k v."""
    return [v.reshape(-1, *value.shape[1:]) for v in value.reshape(heads, -1, 3, *value.shape[1:]).unbind(2)]


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without trailing ones, since a 1x1 convolution is a linear layer."""
    return trimmed(shape[:-1]) if shape and shape[-1] == 1 else tuple(shape)


def place(
    network: nn.Module, tensors: Mapping[str, Tensor], rename: Callable[[str], str], split: Callable[[Tensor, int], list[Tensor]]
) -> dict[str, Tensor]:
    """The state dict of `network` from a file's tensors; raises DistillError if one is missing, left over, or of another shape."""
    expected = {name: value.shape for name, value in network.state_dict().items()}
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if DROPPED.search(name):
            continue
        if not value.is_floating_point():
            raise quantized("the network", name, value.dtype)
        new = rename(name)
        if ".qkv." in new:
            module, kind = new.split(".qkv.")
            heads = int(cast(Any, network.get_submodule(module)).heads)
            parts = {f"{module}.to_{letter}.{kind}": part for letter, part in zip("qkv", split(value, heads), strict=True)}
        else:
            parts = {new: value}
        for key, part in parts.items():
            shape = expected.get(key)
            if shape is None:
                raise DistillError(f"tensor {name} has no place in the network")
            if key in out:
                raise DistillError(f"tensor {name} occurs twice")
            if trimmed(part.shape) != trimmed(shape):
                raise DistillError(f"tensor {name} has shape {tuple(part.shape)}, not {tuple(shape)}")
            out[key] = part.reshape(shape).to(torch.float32, copy=True)
    missing = sorted(expected.keys() - out.keys())
    if missing:
        raise DistillError(f"{missing[0]} is not in the file ({len(missing)} tensors are missing)")
    return out


def nvlabs_name(name: str) -> str:
    """The name in EDMUNet for a tensor of NVlabs' inner network."""
    section, *rest = name.split(".")
    if section in ("enc", "dec"):
        block, *inner = rest
        if block.endswith("_aux_residual"):
            return f"enc.{block}.Conv2d_0.{inner[-1]}"
        for ending, place in (("_aux_norm", "norm_out"), ("_aux_conv", "conv_out"), ("_conv", "conv_in")):
            if block.endswith(ending):
                return f"{place}.{inner[-1]}"
        return f"{section}.{block}.{NVLABS.get(inner[0], inner[0])}.{inner[-1]}"
    known = {"out_norm": "norm_out", "out_conv": "conv_out"}
    return "frequencies" if section == "map_noise" else ".".join([known.get(section, section), *rest])


def nvlabs_network(arguments: Mapping[str, Any]) -> tuple[str, nn.Module]:
    """The architecture's name, and the network without weights, from EDMPrecond's init arguments."""
    from distill_cli.models.edm import FIR, EDMUNet

    kind = arguments.get("model_type", "DhariwalUNet")
    if kind not in DEFAULTS:
        raise DistillError(f"network {kind} is none of {', '.join(DEFAULTS)}")
    k = {**DEFAULTS[kind], **arguments}
    adm = kind == "DhariwalUNet"
    options: dict[str, Any] = {}
    if not adm:
        if k["encoder_type"] not in ("standard", "residual") or k["decoder_type"] != "standard":
            raise DistillError(f"no published model has a {k['encoder_type']} encoder with a {k['decoder_type']} decoder")
        filters = [float(v) for v in k["resample_filter"]]
        if filters not in ([1.0, 1.0], [float(v) for v in FIR]):
            raise DistillError(f"no published model has resample_filter {filters}")
        options = {"fourier": k["embedding_type"] == "fourier", "residual": k["encoder_type"] == "residual", "fir": len(filters) == 4}
        options["noise_mult"] = int(k["channel_mult_noise"])
    classes, dropped = int(k.get("label_dim", 0)), float(k.get("label_dropout", 0))
    if not 1 <= len(k["channel_mult"]) <= 8 or not 1 <= int(k["num_blocks"]) <= 64:
        raise DistillError(f"no published model has {len(k['channel_mult'])} levels of {k['num_blocks']} blocks")
    with torch.device("meta"):  # allocates nothing, whatever sizes a file claims
        network = EDMUNet(
            sample_size=int(k["img_resolution"]),
            in_channels=int(k["img_channels"]),
            model_channels=int(k["model_channels"]),
            channel_mult=tuple(int(v) for v in k["channel_mult"]),
            num_blocks=int(k["num_blocks"]),
            attention_resolutions=tuple(int(v) for v in k["attn_resolutions"]),
            embedding_mult=int(k["channel_mult_emb"]),
            adm=adm,
            num_class_embeds=classes + 1 if classes else None,
            label_dropout=dropped if classes else 0.0,
            **options,
        )
    return "ADM" if adm else "NCSN++" if options["residual"] else "DDPM++", network


def from_nvlabs(data: Any) -> Found:
    """The averaged network of an NVlabs snapshot, {"ema": EDMPrecond}, as `unpickle.read` returns it."""
    ema = data.get("ema") if isinstance(data, dict) else data
    if not isinstance(ema, Record) or ema.class_name != "EDMPrecond":
        what = ema.class_name if isinstance(ema, Record) else type(ema).__name__
        raise DistillError(f"no EDM network in the file, but {what}")
    names = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data", "model_type")
    arguments = dict(zip(names, ema.state.get("_init_args", ()))) | dict(ema.state.get("_init_kwargs", {}))
    architecture, network = nvlabs_network(arguments)
    tensors = {name.removeprefix("model."): value for name, value in ema.tensors()}
    return Found(
        "NVlabs pickle",
        architecture,
        network,
        place(network, tensors, nvlabs_name, interleaved),
        classes=int(arguments.get("label_dim", 0)),
        null_class=cast(Any, network).config.label_dropout > 0,
        time_input="ln sigma / 4",
        licence="CC BY-NC-SA 4.0 (NVIDIA)",
        sigma_data=float(arguments.get("sigma_data", 0.5)),
    )


def from_openai(tensors: Mapping[str, Tensor], consistency: bool, size: int = 64, head: int = 64) -> Found:
    """A model of OpenAI's consistency_models: a UNet's state dict. Image `size` and channels of an attention `head` are not in the file."""
    if not isinstance(tensors, Mapping) or "input_blocks.0.0.weight" not in tensors:
        raise DistillError("no UNet of OpenAI's in the file")
    given, made = tensors["input_blocks.0.0.weight"].shape[1], len(tensors["out.2.bias"])
    if made != given:
        why = ": its variance is learned too, as in models of guided-diffusion" if made == 2 * given else ""
        raise DistillError(f"{given} channels go in and {made} come out{why}", "EDM and consistency networks estimate the picture alone")
    network, rename = openai_network(tensors, size, head)
    return Found(
        "OpenAI state dict",
        "ADM (ResNet UNet)",
        network,
        place(network, tensors, rename, blocks),
        classes=network.config.num_class_embeds or 0,
        null_class=False,
        time_input="250 ln sigma",
        licence="MIT (OpenAI)",
        parameterisation="consistency" if consistency else "edm",
    )


def model_of(found: Found, name: str, steps: int = 18) -> Model:
    """The Model with its weights loaded; a teacher is sampled by Heun with `steps` steps."""
    found.network.load_state_dict(found.weights, assign=True)
    schedule, backbone, scales = EDMSchedule(), backbone_of(found.network), Scales(sigma_data=found.sigma_data)
    student = found.parameterisation == "consistency"
    return Model(
        NetworkDenoiser(backbone, schedule, found.parameterisation, scales, found.time_input).eval().requires_grad_(False),
        ClassConditioner(tuple(str(i) for i in range(found.classes)), found.classes if found.null_class else None),
        Lineage(name=name, kind="student" if student else "teacher", method="consistency" if student else "edm", licence=found.licence),
        Sampler.consistency(from_indices(schedule, PUBLISHED)) if student else Sampler(steps=steps),
    )


LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""First bytes of a torch.save file in the format before zip."""
SUFFIXES = (".pkl", ".pt", ".pth")
ZIPPED_NAMES = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)")


def _state_dict(path: Path) -> Any:
    """The tensors of a torch.save file, checked against the file's size before and after; only tensors are rebuilt."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
                raise DistillError("its parts are larger than the file")
            for member in members:
                if member.filename.endswith("data.pkl"):
                    check_operations(archive.read(member), 0, ZIPPED_NAMES, size, calls=True)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(tensors, dict) or not all(type(k) is str and isinstance(v, Tensor) for k, v in tensors.items()):
            raise DistillError("it is no state dict")
        if sum(v.numel() * v.element_size() for v in tensors.values()) > size:
            raise DistillError("its tensors are larger than the file")
        return tensors
    except Exception as error:  # zipfile and torch raise many types for a damaged or hostile file
        hint = "only plain state dicts are read; nothing in it was run"
        raise DistillError(f"{path}: not read: {printable(error, 200)}", hint) from error


def open_file(path: Path, size: int | None = None, head: int | None = None, kind: str | None = None) -> Found:
    """Read a published file: an NVlabs pickle, or OpenAI's .pt, which lacks `size`, `head` and `kind` (sources/openai.py).

    Raises UsageError if they are given for a pickle, and DistillError for a file that is damaged, hostile or of an unknown type.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    check_file(path)
    with open(path, "rb") as handle:
        head_bytes = handle.read(len(LEGACY))
    zipped = head_bytes.startswith(b"PK")
    if head_bytes == LEGACY:
        anew = "save it anew where you trust it: torch.save(torch.load(FILE, weights_only=True), FILE)"
        raise DistillError(f"{path}: a file of torch.save from before version 1.6, which is not read", anew)
    if path.suffix.lower() not in SUFFIXES and not zipped and not head_bytes.startswith(b"\x80"):
        raise DistillError(f"{path}: not a .pkl, .pt or .safetensors file")
    content = _state_dict(path) if zipped else read(path)
    given = {"--resolution": size, "--head-channels": head, "--kind": kind}
    if not zipped and any(given.values()):
        flag = next(flag for flag, value in given.items() if value)
        raise UsageError(f"{flag}: for OpenAI's files, and {path} is a pickle that says so itself", f"leave {flag} out")
    try:
        if not zipped:
            return from_nvlabs(content)
        size, head, student, assumed = settle_openai(path.stem, size, head, kind)
        return replace(from_openai(content, student, size, head), assumed=assumed)
    except DistillError as error:
        raise DistillError(f"{path}: {printable(error.message)}", error.hint) from error
    except Exception as error:  # the arguments in a file can be anything
        raise DistillError(f"{path}: not a published checkpoint ({type(error).__name__}: {printable(error, 120)})") from error


def convert_file(
    path: Path, folder: Path, size: int | None = None, head: int | None = None, kind: str | None = None, *, name: str = "", steps: int = 18
) -> dict[str, Any]:
    """Write the model of a published file to `folder`, read it back, and compare every bit."""
    found = open_file(path, size, head, kind)
    model = model_of(found, name or path.stem, steps)
    t, where = torch.tensor([0.02, 2.0]), f"--resolution {size}" if size else str(path)
    rehearse(model, where)
    try:
        with torch.no_grad():
            x = t.view(2, 1, 1, 1) * torch.ones(2, *model.shape)
            images = model.denoiser(x, t, model.conditioner(torch.zeros(2, dtype=torch.long)))
    except (MemoryError, RuntimeError) as error:  # torch raises either if an allocation fails
        raise DistillError(f"{where}: two pictures of {model.shape} cannot be made here ({reason(error)})") from error
    if not torch.isfinite(images).all():
        raise DistillError(f"{path}: the network's images are not finite numbers", "the file is damaged")
    formats.save(model, folder)
    weights_hash = model.weights_hash()
    if formats.load(folder, model.lineage.name).weights_hash() != weights_hash:
        remove_folder(folder)
        raise DistillError(f"{folder}: holds other weights than were written", "is the disk sound?")
    return {
        "format": found.source,
        "architecture": found.architecture,
        "kind": model.lineage.kind,
        "parameters": sum(value.numel() for value in found.weights.values()),
        "tensors": len(found.weights),
        "shape": list(model.shape),
        "classes": found.classes,
        "time_input": found.time_input,
        "licence": found.licence,
        "assumed": list(found.assumed),
        "weights_hash": weights_hash,
    }

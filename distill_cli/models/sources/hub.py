"""Models of the Hugging Face hub: downloaded into its cache on first use, after a line that gives name, size and licence."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from distill_cli.errors import DistillError, printable, reason
from distill_cli.models.parts import best_variant, has_vocabulary, read_json, variants
from distill_cli.models.sources.catalog import HUB, LORA
from distill_cli.processes import say_hidden

PARTS = {
    **dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model"),
    **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), "model"),
}
"""Parts of a pipeline that have weights, and the names of their files."""
ADAPTER = (LORA, "distill.json", "README.md", "scheduler/*.json")
"""Files of a LoRA that this package wrote."""
WANTED = ("model_index.json", "distill.json", "README.md", "scheduler/*.json", "tokenizer*/*", *(f"{part}/config.json" for part in PARTS))
FLAT = ("config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors")
"""Files that unconditional models of 2022, such as google/ddpm-cifar10-32, have beside model_index.json instead of in folders."""


def is_id(name: str) -> bool:
    """Whether a name has the form OWNER/MODEL."""
    return name.count("/") == 1 and not name.startswith((".", "/"))


def part_of(folder: Path, part: str) -> Path:
    """The folder of a part of a pipeline: its own, or that of model_index.json, where diffusers looks too."""
    return folder / part if (folder / part).is_dir() else folder


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def cached(hub_id: str) -> Path | None:
    """The model's folder in the Hugging Face cache, if it is complete."""
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(hub_id, "model_index.json")
    except ValueError:  # not a hub id
        return None
    if not isinstance(index, str):
        lora = try_to_load_from_cache(hub_id, LORA)
        folder = Path(lora).parent if isinstance(lora, str) else Path()
        return folder if isinstance(lora, str) and (folder / "scheduler").is_dir() and (folder / ADAPTER[1]).exists() else None
    folder = Path(index).parent
    named = read_json(Path(index))
    there = [part for part, value in named.items() if isinstance(value, list) and value and value[0]]
    needed = [(part, "config.json") for part in PARTS if part in there] + [("scheduler", "scheduler_config.json")]
    whole = all(has_vocabulary(part_of(folder, part)) for part in there if part.startswith("tokenizer"))
    whole = whole and all((part_of(folder, part) / name).exists() for part, name in needed)
    return folder if whole and all(_has_weights(part_of(folder, part), PARTS[part]) for part in PARTS if part in there) else None


def _has_weights(folder: Path, stem: str) -> bool:
    """Whether a folder has all files of at least one variant of a network's weights."""
    for names in variants((path.name for path in folder.glob("*")), stem).values():
        index = next((name for name in names if name.endswith(".json")), None)
        parts = read_json(folder / index).get("weight_map") if index else dict.fromkeys(names)
        if isinstance(parts, dict) and all((folder / str(name)).exists() for name in (parts.values() if index else parts)):
            return True
    return False


def files_of(siblings: list[Any], half: bool) -> dict[str, int]:
    """The files of a model to fetch, with sizes in bytes: safetensors only, in fp16 if `half` is set and they exist."""
    sizes = {file.rfilename: file.size or 0 for file in siblings}
    out = {name: size for name, size in sizes.items() if any(fnmatch(name, pattern) for pattern in WANTED)}
    flat = not any(name.partition("/")[0] in PARTS for name in sizes)
    if flat:
        out |= {name: sizes[name] for name in FLAT if name in sizes}
    for part, stem in PARTS.items():
        known = variants((name.removeprefix(f"{part}/") for name in sizes if name.startswith(f"{part}/")), stem)
        if known:
            variant = "fp16" if half and "fp16" in known else best_variant(known)
            out |= {f"{part}/{name}": sizes[f"{part}/{name}"] for name in known[variant]}
        elif any(file.startswith(f"{part}/") and file.endswith((".bin", ".ckpt")) for file in sizes):
            raise DistillError(f"{part} has no safetensors on the hub", "files that may run code are not read")
    if flat and FLAT[-1] not in sizes:
        raise DistillError("the model has no safetensors on the hub", "files that may run code are not read")
    return out


def command(hub_id: str, patterns: tuple[str, ...]) -> str:
    """A shell command that fetches files of a hub model on another machine."""
    return " ".join([f"hf download {hub_id}", *(f"--include '{pattern}'" for pattern in patterns)])


def _snapshot(hub_id: str, info: Any, sizes: Mapping[str, int], licence: str = "") -> Path:
    """Download these files of a hub model, after a line that gives name, size and licence."""
    from huggingface_hub import snapshot_download

    licence = licence or (info.card_data.get("license") if info.card_data else None) or "not stated"
    print(f"downloading {hub_id}: {sum(sizes.values()) / 1e6:.0f} MB, licence {printable(licence)}", file=sys.stderr)
    return Path(snapshot_download(hub_id, allow_patterns=list(sizes)))


def download(hub_id: str, pipelines: Collection[str]) -> Path:
    """The folder of a hub model in the Hugging Face cache, downloaded where missing; of one of these classes of pipelines."""
    known = HUB.get(short_name(hub_id))
    found = cached(hub_id)
    if found is not None:
        return found
    weights = tuple(f"{part}/*{known.variant if known else ''}.safetensors" for part in PARTS)
    get = command(hub_id, (*WANTED, *weights, *(() if known else FLAT))) + (f" ({known.megabytes} MB)" if known else "")
    hint = f"where there is a network: {get}; then set HF_HOME, or give the folder's path"
    if offline():
        raise DistillError(f"{hub_id}: not in the Hugging Face cache, no folder of that name, and HF_HUB_OFFLINE is set", hint)
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(hub_id, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        if LORA in sizes and "model_index.json" not in sizes:
            return _snapshot(hub_id, info, {name: size for name, size in sizes.items() if any(fnmatch(name, like) for like in ADAPTER)})
        index = json.loads(Path(hf_hub_download(hub_id, "model_index.json")).read_text())
        kind = index.get("_class_name")
        if kind in pipelines:
            wanted = files_of(info.siblings or [], half="vae" in index)
            return _snapshot(hub_id, info, wanted, known.licence if known else "")
    except DistillError:
        raise
    except Exception as error:  # no network, no such model, gated: the hub's errors share no base class
        missing = f"{hub_id}: not in the Hugging Face cache, no folder of that name, and cannot be downloaded"
        raise DistillError(f"{missing} ({type(error).__name__})", hint) from error
    raise DistillError(f"{hub_id}: a {kind}, which this version does not read", f"it reads {', '.join(pipelines)}")


def find(name: str, patterns: tuple[str, ...], what: str) -> Path:
    """The folder of a single network: `name` itself, or a hub id, whose files are downloaded after a line that says so."""
    if Path(name).is_dir():
        return Path(name)
    if not is_id(name):
        raise DistillError(f"{what}: no such folder", "give a folder, or a hub id")
    from huggingface_hub import HfApi, snapshot_download

    with suppress(Exception):  # not in the cache: huggingface_hub raises several types
        folder = Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=True))
        if all(any(folder.glob(pattern)) for pattern in patterns if pattern.endswith((".json", ".safetensors"))):
            return folder
    try:
        if offline():
            raise OSError("HF_HUB_OFFLINE is set")
        info = HfApi().model_info(name, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        return _snapshot(name, info, {file: size for file, size in sizes.items() if any(fnmatch(file, pattern) for pattern in patterns)})
    except Exception as error:  # no network, no such model
        hint = f"where there is a network: {command(name, patterns)}; then set HF_HOME, or give the folder's path"
        raise DistillError(f"{what}: not in the Hugging Face cache, and cannot be downloaded ({reason(error)})", hint) from error


def to_download(name: str) -> str:
    """The download that loading `name` would start, for plans; '' for none."""
    known = HUB.get(short_name(name))
    if known is None:
        elsewhere = is_id(name) and not Path(name).parent.exists()
        return f"{name} from the Hugging Face hub" if elsewhere and cached(name) is None else ""
    if cached(known.id) is not None or (name == known.id and Path(name).exists()):
        return ""
    if name != known.id:
        say_hidden("model", name, "the built-in one")
    return f"{name}: about {known.megabytes} MB of {known.id} from the Hugging Face hub, licence {known.licence}"


def short_name(name: str) -> str:
    """The registry's name for a hub id, or ''."""
    return next((short for short, known in HUB.items() if name in (short, known.id)), "")

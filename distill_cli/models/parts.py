"""Reading and writing the parts of a model folder: files are checked, and tensors have to be complete."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_cli.errors import DistillError, printable, reason
from distill_cli.files import reading, unreadable

if TYPE_CHECKING:
    import torch

STEM = "diffusion_pytorch_model"
POINTER = b"version https://git-lfs"
"""The first bytes of a pointer that git-lfs leaves in the place of a large file."""
HARMLESS = re.compile(
    r"(^|\.)(position_ids|num_batches_tracked)$|^(vision_model|visual_projection|text_projection|logit_scale|lm_head)(\.|$)"
)
"""Extra tensors that may be ignored: counters, and beside a text encoder the image half of CLIP, or the head of a language model."""
RAW = "non_ema"
"""The variant with weights that are not averaged."""


def check_file(path: Path) -> None:
    """Raise DistillError for an empty file, or a pointer of git-lfs."""
    if not path.is_file():
        return
    if path.stat().st_size == 0:
        what, it = (f"a link to an empty file, {path.resolve()}", "both") if path.is_symlink() else ("an empty file", "it")
        again = f"a full disk or an interrupted download leaves it so: delete {it}, and fetch it again"
        raise DistillError(f"{path}: {what}", again)
    with reading(path), open(path, "rb") as handle:
        if handle.read(len(POINTER)) == POINTER:
            raise DistillError(f"{path}: a pointer of git-lfs, not the file itself", "git lfs pull fetches it")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DistillError with the message of the system or the parser."""
    try:
        check_file(path)
        out = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise DistillError(f"{path}: not readable as JSON ({reason(error)})") from error
    if not isinstance(out, dict):
        raise DistillError(f"{path}: not a JSON object")
    return out


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a tokenizer's vocabulary. Without one transformers silently makes an empty tokenizer."""
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def check_named(index: Mapping[str, Any], part: str, found: Any, where: Path) -> None:
    """Raise DistillError if a pipeline's index names another class for a part than the one `found` in its folder."""
    entry = index.get(part)
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if named is not None and named != found:
        raise DistillError(f"{where}: {json.dumps(found)}, but model_index.json names {json.dumps(named)}", "is it of another model?")


def variants(names: Iterable[str], stem: str) -> dict[str, list[str]]:
    """The safetensors files of a network by their variant ('' for the plain one), as diffusers and transformers name them.

    STEM.safetensors, STEM.fp16.safetensors, and in parts STEM-00001-of-00002.safetensors, STEM.fp16-00001-of-00002.safetensors,
    with STEM.safetensors.index.json or STEM.safetensors.index.fp16.json beside them.
    """
    out: dict[str, list[str]] = {}
    pattern = re.compile(
        rf"{re.escape(stem)}(?:\.(?P<one>[\w-]+?))?(?:-\d+-of-\d+)?(?:\.(?P<two>\w+))?"
        r"\.safetensors(?:\.index(?:\.(?P<three>[\w-]+))?\.json)?"
    )
    for name in sorted(names):
        if found := pattern.fullmatch(name):
            out.setdefault(found["one"] or found["two"] or found["three"] or "", []).append(name)
    return out


def best_variant(known: Iterable[str]) -> str:
    """The variant of the highest precision: the plain one, else float32, bf16, fp16, another one; weights that are not averaged last."""
    order = ("", "fp32", "bf16", "fp16")
    return min(known, key=lambda name: (name == RAW, order.index(name) if name in order else len(order), name))


def _variant(folder: Path, stem: str) -> tuple[str, list[Path]]:
    """The variant of a network's weights that is read, and its files. Raises DistillError if files are missing or quantized."""
    if not folder.is_dir():
        raise DistillError(f"{folder}: no such folder", "is the model complete?")
    names = [path.name for path in folder.iterdir()]
    known = variants(names, stem)
    if not known:
        pickled = sorted(name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")))
        others = sorted(name for name in names if name.endswith(".safetensors"))
        found = f"only {pickled[0]}, which is not read: it may run code" if pickled else "no weights"
        found = f"{others[0]}, and no {stem}.safetensors" if others else found
        raise DistillError(f"{folder}: {found}", "get the .safetensors files, or save the model in diffusers with safe_serialization=True")
    first: DistillError | None = None
    while known:
        variant = best_variant(known)
        try:
            files = _files(folder, known.pop(variant))
        except DistillError as error:
            first = first or error
            continue
        for file in files:
            _refuse_integers(file)
        if first:
            print(printable(f"{first.message}: the {variant or 'plain'} weights are read"), file=sys.stderr)
        return variant, files
    assert first is not None
    raise first


def _files(folder: Path, names: Collection[str]) -> list[Path]:
    """The files of a variant: one whole file, else the parts that an index names. Raises DistillError if parts are missing."""
    whole = [folder / name for name in names if not name.endswith(".json") and not re.search(r"-\d+-of-\d+", name)]
    index = next((folder / name for name in names if name.endswith(".json")), None)
    if whole:
        files = whole
    elif index is None:
        raise DistillError(f"{folder}: {min(names)} is a part, and the index of the parts is missing", "is the folder complete?")
    else:
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
            raise DistillError(f"{index}: names no files (weight_map)", "is the folder complete?")
        files = [folder / name for name in sorted(set(parts.values()))]
    for file in files:
        if not file.is_file():
            raise DistillError(f"{file}: missing{f', {index.name} names it' if index and not whole else ''}", "is the folder complete?")
        check_file(file)
    return files


def _refuse_integers(file: Path) -> None:
    """Raise DistillError if weights are stored as integers (quantized), whose scale is stored elsewhere."""
    from safetensors import SafetensorError

    from distill_cli.tensors import Tensors, quantized

    if file.suffix != ".safetensors":
        return
    try:
        kinds = {name: entry["dtype"] for name, entry in Tensors(file).stored.items()}
    except (SafetensorError, OSError) as error:
        raise DistillError(f"{file}: no readable network ({reason(error)})", "is the file complete?") from error
    for name, kind in sorted(kinds.items()):
        if "F" not in kind and not HARMLESS.search(name):
            raise quantized(file, name, kind)


def load_network(kind: Any, folder: Path, stem: str = STEM, half: bool = False) -> Any:
    """The network of class `kind` in a folder of a pipeline: float32, on the CPU, in evaluation mode, without gradients.

    `half`: weights that are all stored as bf16 stay so (of networks of transformers).

    Only safetensors are read; of several variants the one with the highest precision. diffusers and transformers fill missing tensors with
    random numbers, and only warn. Here the files must have every tensor of the network, in its shape, and no others but `HARMLESS`. Raises
    DistillError, which names the first wrong one. Inside `unfilled` the network stays without weights.
    """
    import torch

    variant, files = _variant(folder, stem)
    read_json(folder / "config.json")
    quiet()
    options: dict[str, Any] = {"variant": variant} if variant else {}
    dtype = torch.bfloat16 if half and _all_bf16(files) else torch.float32
    if not hasattr(kind, "load_config"):
        options["ignore_mismatched_sizes"] = True  # `hold` names them, transformers prints a report
    try:
        network, found = _filled(kind, folder, files) or kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:  # both raise errors of many classes for missing, truncated or foreign files
        raise DistillError(f"{folder}: no readable network ({reason(error)})", "is the folder complete?") from error
    left_over = [name for name in found["unexpected_keys"] if not HARMLESS.search(name)]
    mismatched = [name if isinstance(name, str) else name[0] for name in found.get("mismatched_keys", ())]
    hold(str(folder), found["missing_keys"], left_over, mismatched)
    if found.get("error_msgs"):
        raise DistillError(f"{folder}: no readable network ({reason(ValueError(found['error_msgs'][0]))})", "is the folder complete?")
    return network.eval().requires_grad_(False)


def _all_bf16(files: Iterable[Path]) -> bool:
    """Whether all floating-point numbers in files are bf16."""
    from distill_cli.tensors import Tensors

    return {entry["dtype"] for file in files for entry in Tensors(file).stored.values() if "F" in entry["dtype"]} == {"BF16"}


def empty(kind: Any, folder: Path) -> Any:
    """A network of class `kind`, from the configuration in `folder`, on the meta device."""
    import torch

    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder, local_files_only=True))
        return kind(kind.config_class.from_pretrained(folder, local_files_only=True))


def _filled(kind: Any, folder: Path, files: Iterable[Path]) -> tuple[Any, dict[str, list[str]]] | None:
    """A network of diffusers, filled tensor by tensor (diffusers itself maps the files), and what did not fit; None for other libraries."""
    from distill_cli.tensors import Tensors

    if not hasattr(kind, "load_config"):
        return None
    network = empty(kind, folder)
    wanted = network.state_dict()
    if {name for name, _ in network.named_buffers()} - wanted.keys():
        return None
    places: dict[str, Any] = {name: (file, name) for file in map(Tensors, files) for name in file.shapes}
    if hasattr(network, "_fix_state_dict_keys_on_load"):  # tensors of 2022 have other names
        network._fix_state_dict_keys_on_load(places)
    fits = [name for name in wanted if name in places and places[name][0].shapes[places[name][1]] == wanted[name].shape]
    found = {
        "missing_keys": [name for name in wanted if name not in places],
        "unexpected_keys": [name for name in places if name not in wanted],
        "mismatched_keys": [name for name in wanted if name in places and name not in fits],
    }
    if not found["missing_keys"] and not found["mismatched_keys"] and not UNFILLED.get():
        network.load_state_dict({name: _value(wanted[name], *places[name]) for name in wanted}, assign=True)
    return network, found


def _value(like: Any, file: Any, name: str) -> Any:
    """A tensor of a file for the place of `like`: float32, or the whole numbers of a counter."""
    return file.read(name) if like.is_floating_point() else file.read(name, whole=True).to(like.dtype)


UNFILLED: ContextVar[bool] = ContextVar("unfilled", default=False)


@contextmanager
def unfilled() -> Iterator[None]:
    """Read and check folders without loading the weights of diffusers' networks: a trial that takes no memory."""
    token = UNFILLED.set(True)
    try:
        yield
    finally:
        UNFILLED.reset(token)


def save_network(network: Any, folder: Path, kinds: Collection[str], dtype: torch.dtype) -> None:
    """Write the folder of a network of one of the classes `kinds` as save_pretrained does, a tensor at a time, float32 as `dtype`."""
    import torch

    from distill_cli.tensors import write

    own_names(network, kinds)
    weights = {name: value.to(dtype) if value.dtype == torch.float32 else value for name, value in network.state_dict().items()}
    network.save_config(folder)
    write(folder / f"{STEM}.safetensors", weights, {"format": "pt"})


def hold(where: str, missing: Iterable[str], left_over: Iterable[str], mismatched: Iterable[str] = ()) -> None:
    """Raise DistillError, with the first name of each kind, if tensors are missing, left over or of another shape."""
    kinds = (("{} is missing", missing), ("{} has no place in the network", left_over), ("{} is of another shape", mismatched))
    wrong = [(said.format(names[0]), len(names)) for said, found in kinds if (names := sorted(found))]
    if wrong:
        more = sum(count for _, count in wrong) - len(wrong)
        text = ", ".join(said for said, _ in wrong) + (f" (and {more} more)" if more else "")
        hint = "was it saved compiled, wrapped or in part? Save the plain network, with the names of its class"
        raise DistillError(f"{where}: its tensors are not those of the network: {text}", hint)


def own_names(network: Any, kinds: Collection[str]) -> None:
    """Assert that a network to be written is of one of these classes, and has its tensors under the class's names.

    A compiled or wrapped network has other names; a reader would get random numbers for the right ones.
    """
    import torch

    made: Any = type(network)
    assert made.__name__ in kinds, f"a {made.__name__} is no class of a pipeline"
    with torch.device("meta"):
        plain = made.from_config(network.config) if hasattr(made, "from_config") else made(network.config)
    others = network.state_dict().keys() ^ plain.state_dict().keys()
    assert not others, f"{min(others)} is no tensor of {made.__name__}, or is missing"


def quiet() -> None:
    """Turn off the progress bars and warnings of diffusers and transformers; this package has its own checks."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def plain(name: str) -> str:
    """A weight's name in a CLIPTextModel, without the prefix of some versions of transformers."""
    return name.removeprefix("text_model.")

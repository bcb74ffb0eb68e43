"""safetensors files, read and written one tensor at a time, so that a network is never in memory twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill_cli.errors import DistillError, printable

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64,
}  # fmt: skip
"""dtypes by their names in a header, in safetensors' order: a file begins with tensors of the last dtype."""


def content_of(values: Tensor) -> Any:
    """The bytes of a tensor's values, without a copy if it is contiguous and on the CPU."""
    return memoryview(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def quantized(where: object, name: str, kind: object) -> DistillError:
    """The error for weights that are not floating point: the scale of quantized ones is not in the tensor."""
    hint = "get the weights in fp16 or float32"
    return DistillError(f"{where}: {printable(name)} is kept as {printable(kind)}: quantized weights are not read", hint)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(content_of(value))
    return digest.hexdigest()


class Tensors:
    """The header of a file; tensors are read on request.

    They are read, not memory-mapped: a mapped half-precision file would stay in memory beside its float32 copy, and a later change
    of the file would change the network. Raises OSError, and SafetensorError if the header does not fit the file's size.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb"):  # raises OSError with more detail than safetensors gives
            pass
        with safe_open(path, "pt") as handle:
            self.metadata: dict[str, str] = handle.metadata() or {}
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self.path, self.begin = path, 8 + length
        self.stored: dict[str, dict[str, Any]] = header
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry["shape"]) for name, entry in header.items()}

    def dtype(self, name: str) -> torch.dtype | None:
        """The stored dtype of a tensor; None for one that torch does not have."""
        return DTYPES.get(self.stored[name]["dtype"])

    def read(self, name: str, whole: bool = False) -> Tensor:
        """The tensor `name` in float32; raises DistillError if it is not floating point, unless `whole` numbers are expected too."""
        kind = self.dtype(name)
        if kind is None or not (whole or kind.is_floating_point):
            raise quantized(self.path, name, self.stored[name]["dtype"])
        begin, end = self.stored[name]["data_offsets"]
        content = torch.empty(end - begin, dtype=torch.uint8)
        with open(self.path, "rb") as file:
            file.seek(self.begin + begin)
            if file.readinto(content_of(content)) != end - begin:
                raise OSError(0, "shorter than when it was opened", str(self.path))
        return content.view(kind).view(self.shapes[name]).float()


def content(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None) -> Iterator[Any]:
    """A file of tensors from any device in parts, byte for byte as safetensors writes it; as `dtype`, if it is given.

    The keys of `metadata` keep their order; safetensors writes them in any order.
    """
    names = {kind: name for name, kind in DTYPES.items()}
    ranks = {name: -rank for rank, name in enumerate(DTYPES)}
    kinds = {name: names[dtype or value.dtype] for name, value in tensors.items()}
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    begin, order = 0, sorted(tensors, key=lambda name: (ranks[kinds[name]], name))
    for name in order:
        shape = tensors[name].shape
        end = begin + math.prod(shape) * DTYPES[kinds[name]].itemsize
        header[name] = {"dtype": kinds[name], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield content_of(tensors[name].to(dtype or tensors[name].dtype))


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file of tensors; a full disk raises OSError, which safetensors would hide."""
    with open(path, "wb") as file:
        for part in content(tensors, metadata):
            file.write(part)


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose biases autocast casts with their matrices."""


def store_matrices(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Store the matrices of layers, and their biases, in half precision, once, instead of casting them at each call; None: in float32.

    Autocast casts the same ones, so answers under it stay the same to the bit. Norms, embeddings and adapters stay as they are. So does the
    first weight, by whose type diffusers' networks choose that of what they embed.
    """
    first = next(network.parameters())
    for name, module in network.named_modules():
        weight: Any = getattr(module, "weight", None)
        matrix = isinstance(weight, Tensor) and weight.ndim > 1 and not isinstance(module, nn.Embedding)
        if not matrix or weight is first or ".lora_" in name:
            continue
        weight.data = weight.data.to(dtype or torch.float32)
        if isinstance(module, LAYERS) and module.bias is not None:
            module.bias.data = module.bias.data.to(dtype or torch.float32)

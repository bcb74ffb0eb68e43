"""A reader of NVlabs' pickles that runs nothing of what is in them.

The published EDM files pickle whole networks: opening one with pickle executes Python source that stands inside. Here
only tensors, plain containers and the networks' init arguments are rebuilt; persistent objects become inert `Record`s, their
source is never looked at, and every other name is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_cli.errors import DistillError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first number of a file of torch.save before its zip format, which storages inside pickles still have."""
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


class Record:
    """What stands for an object of a class that is not loaded: its class's name and its attributes."""

    class_name = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("the state of an object is no dictionary")
        self.state = state

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Parameters and persistent buffers by dotted name, in the order of the file, as a module's state dict has them."""
        passing = self.state.get("_non_persistent_buffers_set", ())
        for kind in ("_parameters", "_buffers"):
            for name, value in self.state.get(kind, {}).items():
                if isinstance(value, Tensor) and name not in passing:
                    yield prefix + name, value
        for name, child in self.state.get("_modules", {}).items():
            if isinstance(child, Record):
                yield from child.tensors(f"{prefix}{name}.")


def _container(name: str) -> type[Record]:
    return type(name, (Record,), {"class_name": name})


def _persistent(meta: Any) -> Record:
    """torch_utils.persistence._reconstruct_persistent_obj, without executing meta["module_src"]."""
    record = Record()
    record.class_name = str(meta["class_name"])
    record.__setstate__(meta["state"])
    return record


def _operations(content: bytes, start: int = 0) -> Iterator[tuple[str, Any, int]]:
    """The opcodes of one pickle in `content`, which is read and not run; memory is bounded by the content's size."""
    stream = io.BytesIO(content)
    stream.seek(start)
    try:
        for opcode, argument, place in pickletools.genops(stream):
            yield opcode.name, argument, place or 0
    except (ValueError, UnicodeDecodeError) as error:
        raise pickle.UnpicklingError(f"truncated or no pickle ({error})") from error


def _check_bounds(content: bytes) -> None:
    """Refuse a pickle whose numbers ask for more memory than a file of its size can need."""
    for name, argument, _ in _operations(content):
        if name in PUTS and int(argument) > len(content):
            raise pickle.UnpicklingError("it asks for more memory than its size can need")


def _storage(content: bytes) -> Any:
    """torch.storage._load_from_bytes, whose stock version would run anything: a storage, through weights_only."""
    start, largest, magic = 0, 0, False
    for part in range(5):  # magic number, version, system, the storage, its key
        for name, argument, place in _operations(content, start):
            if isinstance(argument, int) and name not in PUTS:
                magic |= part == 0 and argument == LEGACY_MAGIC
                largest = max(largest, argument) if part == 3 else largest
            last = place
        start = last + 1
    if not magic:
        raise pickle.UnpicklingError("a storage is not in torch's format")
    if largest > len(content):
        raise pickle.UnpicklingError("a storage claims more numbers than it has")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2, within the bounds of its storage."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    flat = torch.empty(0, dtype=storage.dtype)
    count = storage._untyped_storage.nbytes() // flat.itemsize
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset < 0 or min(size, default=1) < 0 or min(stride, default=0) < 0 or (0 not in size and last >= count):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return flat.set_(storage._untyped_storage, 0, (count,), (1,)).as_strided(size, stride, offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


class _DType:
    """A plain numeric numpy type; the real one is made only once its name has been checked."""

    def __init__(self, kind: str, *_: Any) -> None:
        self.kind, self.order = str(kind), "="

    def __setstate__(self, state: Any) -> None:
        self.order = "=" if state[1] == "|" else str(state[1])

    def resolve(self) -> np.dtype[Any]:
        if not re.fullmatch("[biuf][1248]", self.kind) or self.order not in "=<>":
            raise pickle.UnpicklingError(f"numpy type {self.kind[:20]} is not allowed")
        return np.dtype(self.order + self.kind)


def _scalar(dtype: _DType, content: bytes) -> Any:
    """numpy's scalar as a Python number."""
    return np.frombuffer(content, dtype.resolve(), count=1)[0].item()


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("dnnlib.util", "EasyDict"): type("EasyDict", (dict,), {}),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    **{("torch.nn.modules.container", name): _container(name) for name in ("ModuleDict", "ModuleList", "Sequential")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = ALLOWED.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of itself")


def read(path: Path) -> Any:
    """What a pickle holds, as containers, tensors and Records; raises DistillError and runs nothing of it."""
    content = path.read_bytes()
    try:
        _check_bounds(content)
        return _Unpickler(io.BytesIO(content)).load()
    except Exception as error:  # a hostile stream can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DistillError(f"{path}: not read: {reason}", "only files as NVlabs published them are read; nothing in it was run") from error

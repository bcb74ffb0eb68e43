"""A reader of NVlabs' pickles that executes nothing in them.

The published EDM files pickle whole networks: opening one with pickle executes Python source from the file. Here only
tensors, plain containers and the networks' init arguments are rebuilt. Persistent objects become inert `Record`s whose
source is ignored, and every other name is refused. Memory is bounded by the file's size.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_cli.errors import DistillError, printable

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""Magic number of torch.save's format before zip, which storages inside pickles still use."""
SMALL = 4096
"""Numbers up to this size need no check against the file's size."""
STORAGE_NAMES = re.compile(r"torch \w+Storage|collections OrderedDict")
CALLS = ("REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ")


class Dictionary(dict[str, Any]):
    """OrderedDict and EasyDict; filled item by item, never from arguments."""

    def __init__(self) -> None:
        super().__init__()


class Record:
    """A stand-in for an object whose class is not loaded: the class name and the attributes."""

    class_name = ""
    state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("the state of an object is no dictionary")
        self.state = state

    def tensors(self, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Parameters and persistent buffers by dotted name, in the file's order, as in a module's state dict."""
        seen = set() if seen is None else seen
        if id(self) in seen:
            raise DistillError("a module stands in two places")
        seen.add(id(self))
        passing = self.state.get("_non_persistent_buffers_set", ())
        for kind in ("_parameters", "_buffers"):
            for name, value in self.state.get(kind, {}).items():
                if isinstance(value, Tensor) and name not in passing:
                    yield prefix + name, value
        for name, child in self.state.get("_modules", {}).items():
            if isinstance(child, Record):
                yield from child.tensors(f"{prefix}{name}.", seen)


def _container(name: str) -> type[Record]:
    return type(name, (Record,), {"class_name": name})


def _persistent(meta: Any) -> Record:
    """torch_utils.persistence._reconstruct_persistent_obj, without executing meta["module_src"]."""
    record = Record()
    record.class_name = str(meta["class_name"])
    record.__setstate__(meta["state"])
    return record


class _DType:
    """A plain numeric numpy type; the real one is made after its name was checked."""

    def __init__(self, kind: str, *_: Any) -> None:
        self.kind, self.order = str(kind), "="

    def __setstate__(self, state: Any) -> None:
        self.order = "=" if state[1] == "|" else str(state[1])

    def resolve(self) -> np.dtype[Any]:
        if not re.fullmatch("[biuf][1248]", self.kind) or self.order not in "=<>":
            raise pickle.UnpicklingError(f"numpy type {self.kind[:20]} is not allowed")
        return np.dtype(self.order + self.kind)


def _scalar(dtype: _DType, content: bytes) -> Any:
    """A numpy scalar as a Python number."""
    return np.frombuffer(content, dtype.resolve(), count=1)[0].item()


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def operations(content: bytes, start: int = 0) -> Iterator[tuple[str, Any, int]]:
    """The opcodes of a pickle in `content`, which is parsed and not executed."""
    stream = io.BytesIO(content)
    stream.seek(start)
    try:
        for opcode, argument, place in pickletools.genops(stream):
            yield opcode.name, argument, place or 0
    except (ValueError, UnicodeDecodeError) as error:
        raise pickle.UnpicklingError("a pickle is truncated, or is none") from error


def check_operations(content: bytes, start: int, names: re.Pattern[str], most: int, calls: bool = False) -> tuple[int, Any]:
    """Compare a pickle with what torch writes: only `names`, no number above `most`, calls only where allowed.

    Returns the end of the pickle and its last number.
    """
    end, number = start, None
    for name, argument, place in operations(content, start):
        end = place + 1
        if name == "GLOBAL" and not names.fullmatch(argument):
            raise pickle.UnpicklingError(f"it asks for {argument.replace(' ', '.')}, which is not allowed")
        if name in ("STACK_GLOBAL", "BYTEARRAY8", "EXT1", "EXT2", "EXT4") or (name in CALLS and not calls):
            raise pickle.UnpicklingError(f"it has a {name}, which torch does not write")
        if isinstance(argument, int) and not isinstance(argument, bool) and name != "PROTO":
            number = argument
            if argument > max(most, SMALL) and argument != LEGACY_MAGIC:
                raise pickle.UnpicklingError("it claims more numbers than it has")
    return end, number


_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    """Python's unpickler written in Python, with restricted opcodes: keys are text, only Records have attributes."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.left = len(content)
        container = "torch.nn.modules.container"
        self.allowed: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": Dictionary,
            "dnnlib.util.EasyDict": Dictionary,
            "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch.storage._load_from_bytes": self.storage,
            "numpy.dtype": _DType,
            "numpy.core.multiarray.scalar": _scalar,
            "numpy._core.multiarray.scalar": _scalar,
            **{f"{container}.{name}": _container(name) for name in ("ModuleDict", "ModuleList", "Sequential")},
        }

    def find_class(self, module: str, name: str) -> Any:
        found = self.allowed.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of itself")

    def storage(self, content: bytes) -> Any:
        """A storage, read with weights_only; replaces torch.storage._load_from_bytes, which would execute anything."""
        start = 0
        for part in range(5):  # magic number, version, system, the storage, its key
            start, number = check_operations(content, start, STORAGE_NAMES, len(content))
            if part == 0 and number != LEGACY_MAGIC:
                raise pickle.UnpicklingError("a storage is not in torch's format")
        out = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if type(out) is not torch.storage.TypedStorage:
            raise pickle.UnpicklingError("a storage is none")
        return out

    def tensor(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        """A tensor within its storage; replaces torch._utils._rebuild_tensor_v2. All tensors together fit the file's size."""
        flat = torch.empty(0, dtype=storage.dtype)
        count = storage._untyped_storage.nbytes() // flat.itemsize
        size, stride = tuple(map(int, size)), tuple(map(int, stride))
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        numel = math.prod(size)
        self.left -= numel * flat.itemsize
        if min((offset, *size, *stride)) < 0 or numel > count or (numel and last >= count) or self.left < 0:
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        return flat.set_(storage._untyped_storage, 0, (count,), (1,)).as_strided(size, stride, offset)

    def _set(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or any(type(key) is not str for key in items[::2]):
            raise pickle.UnpicklingError("a dictionary has keys that are no text")
        dict.update(target, zip(items[::2], items[1::2], strict=True))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set or any(type(item) is not str for item in items):
            raise pickle.UnpicklingError("a set holds other things than text")
        self.stack[-1].update(items)

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], Record | _DType):
            raise pickle.UnpicklingError("attributes are set on something that has none")
        self.stack[-2].__setstate__(self.stack.pop())

    dispatch = dict(_PythonUnpickler.dispatch)
    for _opcode, _load in (
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.ADDITEMS, load_additems),
        (pickle.BUILD, load_build),
    ):
        dispatch[_opcode[0]] = _load
    for _opcode in (
        pickle.DICT,
        pickle.FROZENSET,
        pickle.BYTEARRAY8,
        pickle.INST,
        pickle.OBJ,
        pickle.NEWOBJ_EX,
        pickle.EXT1,
        pickle.EXT2,
        pickle.EXT4,
    ):
        dispatch.pop(_opcode[0])


def read(path: Path) -> Any:
    """The content of a pickle as containers, tensors and Records; executes nothing. Raises DistillError for anything unexpected."""
    try:
        return _Unpickler(path.read_bytes()).load()
    except Exception as error:  # a hostile stream can raise anything
        if isinstance(error, KeyError) and not isinstance(error.args[0] if error.args else "", str):
            error = pickle.UnpicklingError("it has an opcode that is not allowed, or is no pickle")
        reason = printable(error, 200) or type(error).__name__
        raise DistillError(f"{path}: not read: {reason}", "only files as NVlabs published them are read; nothing in it was run") from error

"""A card that is not there: tensors that say they are on cuda:0 and compute on the CPU, for machines without a driver.

A `Card` tensor has the CPU's values, so what runs on it gives the CPU's numbers. What a GPU would refuse is refused: an operation on
tensors of both devices, numpy of a tensor on the card. What makes a GPU slow is counted (`Counts`). Gradients are not computed, since
torch's engine wants a driver: `backward` leaves zeros in each weight's `grad`.

    with card() as counts:
        model.to("cuda"); model.sample(...)
        print(counts)
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
BETWEEN = {"_to_copy", "copy_", "_local_scalar_dense", "_has_compatible_shallow_copy_type"}
"""Operations that may see tensors of both devices."""
WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_consecutive", "_unique2", "is_nonzero"}
"""Operations whose result the host has to wait for."""


@dataclass
class Counts:
    """What the host and the card did together."""

    to_card: int = 0
    """Copies from the host to the card."""
    blocking: int = 0
    """Those of them for which the host waits: from memory that is not pinned, or not asked to go by themselves."""
    to_host: int = 0
    """Copies from the card to the host, which wait for it."""
    waits: int = 0
    """Other operations for which the host waits: `item`, boolean masks, `nonzero`."""
    casts: int = 0
    """Changes of a tensor's type on the card."""
    cast_values: int = 0
    """How many numbers these were."""
    where: Counter = field(default_factory=Counter)
    """Lines of distill_cli that made the copies and waits."""

    def clear(self):
        self.__init__()

    def numbers(self):
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "where"}


COUNTS = Counts()


class WrongDeviceError(AssertionError):
    """A GPU would have refused this."""


class Card(torch.Tensor):
    """A tensor on the card; `inner` is its CPU tensor."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=CUDA,
            requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    def __repr__(self, **options):
        return f"Card({self.inner})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = out = Card(self.inner.clone(memory_format=torch.preserve_format), self.requires_grad)
            out.__dict__.update({key: value for key, value in self.__dict__.items() if key != "inner"})
        return memo[id(self)]

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner  # else the old values, in their type, would go on

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        note("waits")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def caller():
    """The line of distill_cli that is running."""
    import sys

    frame = sys._getframe(2)
    while frame is not None and "/distill_cli/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "elsewhere" if frame is None else f"{frame.f_code.co_filename.rpartition('/distill_cli/')[2]}:{frame.f_lineno}"


def note(kind):
    setattr(COUNTS, kind, getattr(COUNTS, kind) + 1)
    COUNTS.where[kind, caller()] += 1


def run(func, args, kwargs):
    """One operation in which the card has a part: refuse it, count it, compute it on the CPU."""
    name = func.overloadpacket.__name__
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    cards = [x for x in given if isinstance(x, Card)]
    hosts = [x for x in given if not isinstance(x, Card)]
    to = kwargs.get("device")
    ends_here = torch.device(to).type == "cuda" if to is not None else bool(cards)
    indexed = name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index") and isinstance(given[0], Card)
    if cards and name not in BETWEEN and any(x.ndim for x in hosts) and not indexed:
        shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in given)
        raise WrongDeviceError(f"{name}: tensors of two devices: {shapes}")
    if indexed:
        for x in given[1:]:
            if x.dtype in (torch.bool, torch.uint8):
                note("waits")
            if not isinstance(x, Card) and x.ndim:
                note("to_card")
                note("blocking")
    if name in ("_to_copy", "copy_") and given:
        there = isinstance(given[1 if name == "copy_" else 0], Card)
        here = isinstance(given[0], Card) if name == "copy_" else ends_here
        old, new = given[1 if name == "copy_" else 0].dtype, given[0].dtype if name == "copy_" else kwargs.get("dtype") or given[0].dtype
        if there and not here:
            note("to_host")
        elif here and not there:
            note("to_card")
            alone = args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking")
            if not (alone and getattr(given[1 if name == "copy_" else 0], "pinned", False)):
                note("blocking")
        elif old != new:
            COUNTS.casts, COUNTS.cast_values = COUNTS.casts + 1, COUNTS.cast_values + given[0].numel()
    if name in WAITING and cards:
        note("waits")
    plain = tree_map(lambda x: x.inner if isinstance(x, Card) else x, (args, kwargs))
    options = {key: CPU if key == "device" else value for key, value in plain[1].items() if key not in ("pin_memory", "non_blocking")}
    out = func(*plain[0], **options)
    if not ends_here:
        return out
    out = tree_map(lambda x: Card(x) if isinstance(x, torch.Tensor) and not isinstance(x, Card) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if cards else out


class Host(TorchDispatchMode):
    """Sees what begins on the host and ends on the card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if (to is not None and torch.device(to).type == "cuda") or any(issubclass(t, Card) for t in types):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def backward(loss, *_, **__):
    """Zeros in the `grad` of each weight that the loss depends on."""
    seen, open_ = set(), [loss.grad_fn]
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and node.variable.grad is None:
            with torch.no_grad():
                node.variable.grad = torch.zeros_like(node.variable)
        open_ += [following for following, _ in node.next_functions]


def pinned(tensor, *_):
    """A copy in memory from which a GPU reads by itself; refused, as torch does, for an expanded tensor."""
    out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor)
    out.pinned = True
    return out


@contextmanager
def card():
    """Have torch believe in a card while the body runs."""
    torch._C._ensureCUDADeviceGuardSet()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "a card that is not there",
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "_lazy_init": lambda: None,
    }
    with ExitStack() as stack:
        for name, value in fakes.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch("accelerate.utils.check_cuda_p2p_ib_support", lambda: True))
        stack.enter_context(patch.object(torch.Tensor, "backward", backward))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", pinned))
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # tensors of lists are made on the CPU and copied, where it is seen
        stack.enter_context(Host())
        COUNTS.clear()
        yield COUNTS

"""Memory of a step's tensors on a GPU, counted without one: networks are called on torch's fake tensors.

Fake tensors have a shape, a number type, a device and a storage, and no data. A call on them goes through the same operations as on the
GPU, under the same autocast, so that what it makes, keeps for the backward pass and frees is counted as it happens; nothing is computed.
The backward pass is not run: its gradients of activations, a few of the largest tensors, are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from distill_cli.launch import HALF
from distill_cli.training.placed import able

GPU = torch.device("cuda", 0)
OPTIONS = {"use_reentrant", "context_fn", "determinism_check", "debug"}
"""Options of torch's checkpoint; others are arguments of what it calls."""


class Held(TorchDispatchMode):
    """Bytes of the storages that operations make: those that are `held` now, and the `peak` of these."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def know(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self.know(each, each.untyped_storage().nbytes())
        return out


class _Attention(TorchFunctionMode):
    """Attention by a GPU's memory-efficient kernel, which keeps what its other fast ones keep; which one it is depends on the card."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, mask = _told(*args, **(kwargs or {}))
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        query, key, value = (each.to(dtype) for each in (query, key, value))
        if mask is not None:
            bias = mask.to(dtype) if mask.dtype != torch.bool else torch.zeros_like(mask, dtype=dtype)
            mask = bias.expand(*query.shape[:-1], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True)[0]


def _told(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> tuple[Any, ...]:
    return query, key, value, attn_mask


class Checkpoints:
    """In the place of torch's checkpoint: keeps inputs alone, and counts later what the backward pass computes again."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Callable[[], Any]]] = []
        self.answers: dict[Any, Any] = {}
        """Shapes and number types of what was answered, by what was called."""

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        more = {name: value for name, value in options.items() if name not in OPTIONS}
        key = function, tuple((each.shape, each.dtype) for each in tree_leaves((args, more)) if isinstance(each, Tensor))
        self.calls.append((key, lambda: function(*args, **more)))
        if key not in self.answers:
            with torch.no_grad():
                self.answers[key] = tree_map_only(Tensor, lambda each: (each.shape, each.dtype), function(*args, **more))
        made = [
            pair and torch.empty(pair[0], dtype=pair[1], device=GPU, requires_grad=pair[1].is_floating_point)
            for pair in _pairs(self.answers[key])
        ]
        return made[0] if isinstance(self.answers[key][0], torch.Size) else tuple(made)

    def backward(self) -> Iterator[Callable[[], Any]]:
        """What the backward pass computes again, the last first; inputs are dropped as it goes. The same call is counted once."""
        seen = set()
        while self.calls:
            key, again = self.calls.pop()
            if key not in seen:
                yield again
            seen.add(key)
            del again


def _pairs(answer: Any) -> list[Any]:
    """Shapes and number types of one answer, or of several, some of which may be None."""
    return [answer] if isinstance(answer[0], torch.Size) else list(answer)


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor; of a quantised one those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def tensors_of(networks: Iterable[nn.Module]) -> dict[int, Tensor]:
    """The different weights and buffers of networks: those that networks share stand once."""
    return {id(each): each for network in networks for each in (*network.parameters(), *network.buffers())}


@contextmanager
def _faked(networks: Iterable[nn.Module], trained: set[int], held: Held) -> Iterator[None]:
    """Give networks fake weights on the GPU while the body runs; those whose ids are `trained` want a gradient."""
    parts = {id(part): part for network in networks for part in network.modules()}
    fakes: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    for part in parts.values():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            for name, value in table.items():
                if value is None:
                    continue
                if id(value) not in fakes:
                    fakes[id(value)] = torch.empty(value.shape, dtype=value.dtype, device=GPU, requires_grad=id(value) in trained)
                    held.know(fakes[id(value)], 0)
                before.append((table, name, value))
                table[name] = fakes[id(value)]
    try:
        yield
    finally:
        for table, name, value in before:
            table[name] = value


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    """Autocast of a GPU, which torch.autocast refuses where there is none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", precision in HALF)
    torch.set_autocast_dtype("cuda", HALF.get(precision, torch.bfloat16))
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@contextmanager
def _checkpointing(networks: Iterable[nn.Module], calls: Checkpoints) -> Iterator[None]:
    """Checkpoint the activations of networks while the body runs, and note what is computed again."""
    found = [part for network in networks for part in able(network) if not part.is_gradient_checkpointing]
    torchs = torch.utils.checkpoint.checkpoint
    for part in found:
        part.enable_gradient_checkpointing()
    torch.utils.checkpoint.checkpoint = calls  # type: ignore[assignment]  # where diffusers of every version finds it
    try:
        yield
    finally:
        torch.utils.checkpoint.checkpoint = torchs
        for part in found:
            part.disable_gradient_checkpointing()


def peak(
    call: Callable[[], Any],
    networks: Iterable[nn.Module],
    trained: Iterable[nn.Parameter],
    precision: str,
    checkpointed: Iterable[nn.Module] = (),
) -> int:
    """The largest number of bytes that a call with gradient, and the backward pass after it, holds on a GPU beside the networks' weights.

    `call` makes its inputs on GPU, and returns what the backward pass begins with. `networks` are all that it calls; `trained` are the
    weights that want a gradient; the activations of the networks in `checkpointed` are checkpointed.
    """
    with ExitStack() as stack:
        held, calls = Held(), Checkpoints()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_faked(networks, {id(each) for each in trained}, held))
        stack.enter_context(_checkpointing(checkpointed, calls))
        stack.enter_context(_Attention())
        stack.enter_context(held)
        with torch.enable_grad(), _autocast(precision):
            out = call()
        del out
        for again in calls.backward():
            with torch.enable_grad(), _autocast(precision):
                made = again()
            del made, again
        return held.peak

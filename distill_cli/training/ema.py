"""The exponential moving average of a network's weights, in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill_cli.launch import like, whole
from distill_cli.processes import rank, world_size

RAMP = 0.05


@torch.no_grad()
def follow(average: nn.Module | None, network: nn.Module, weight: float) -> None:
    """Move an average by `weight` towards a network. With None a process only takes part in gathering FSDP's tensors, one at a time."""
    now = [p.detach() for p in network.parameters()]
    before: list[Tensor] = [] if average is None else list(average.parameters())
    if isinstance(now[0], DTensor):
        for k, value in enumerate(now):
            gathered = whole(value)
            if before:
                before[k].lerp_(gathered, weight)
    elif before and before[0].device == now[0].device:
        torch._foreach_lerp_(before, now, weight)
    else:
        for old, new in zip(before, now, strict=False):
            old.lerp_(new.to(old.device), weight)


@torch.no_grad()
def hand_on(average: nn.Module | None, network: nn.Module) -> None:
    """Copy the weights of process 0's average into a network, sharded as the network is. All processes have to call."""
    theirs = {} if average is None else average.state_dict()
    for name, own in network.state_dict().items():
        value = theirs[name].to(own.device).contiguous() if theirs else torch.empty(own.shape, dtype=own.dtype, device=own.device)
        if world_size() > 1:
            torch.distributed.broadcast(value, 0)
        own.copy_(like(value, own))


class EMA:
    """Averages with a half-life in images, shortened at the start to 5% of the images seen (as EDM's training does).

    With a half-life of 0 the average equals the network. Only process 0 keeps it, whole: one copy serves all processes.
    It is on the network's device, or on the CPU.
    """

    def __init__(self, network: nn.Module, halflife: int, device: str = "same") -> None:
        self.halflife = halflife
        self.network = copy.deepcopy(network).eval().requires_grad_(False) if rank() == 0 else None
        if self.network is not None and device == "cpu":
            self.network.cpu()

    @contextmanager
    def at(self, where: torch.device) -> Iterator[nn.Module | None]:
        """The average on another device while the body runs."""
        if self.network is None:
            yield None
            return
        home = next(iter(self.network.parameters())).device
        yield self.network.to(where)
        self.network.to(home)

    def decay(self, seen: int, batch: int) -> float:
        """The factor of the old average after a batch of `batch` images, the last of `seen`."""
        halflife = min(float(self.halflife), seen * RAMP)
        return 0.5 ** (batch / halflife) if halflife > 0 else 0.0

    @torch.no_grad()
    def update(self, network: nn.Module, seen: int, batch: int) -> None:
        """Move towards the network. With FSDP all processes have to call."""
        follow(self.network, network, 1 - self.decay(seen, batch))
        if self.network is None:
            return
        for old, new in zip(self.network.buffers(), network.buffers(), strict=True):
            old.copy_(new)

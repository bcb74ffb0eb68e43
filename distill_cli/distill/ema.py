"""The exponential moving average of a network's weights, in float32."""

from __future__ import annotations

import copy

import torch
from torch import nn

RAMP = 0.05


class EMA:
    """Averages with a half-life in images, shortened at the start to 5% of the images seen (as EDM's training does).

    A half-life of 0 follows the network itself.
    """

    def __init__(self, network: nn.Module, halflife: int) -> None:
        self.halflife = halflife
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def decay(self, seen: int, batch: int) -> float:
        """The factor of the old average after a batch of `batch` images, the last of `seen`."""
        halflife = min(float(self.halflife), seen * RAMP)
        return 0.5 ** (batch / halflife) if halflife > 0 else 0.0

    @torch.no_grad()
    def update(self, network: nn.Module, seen: int, batch: int) -> None:
        weight = 1 - self.decay(seen, batch)
        torch._foreach_lerp_(list(self.network.parameters()), [p.detach() for p in network.parameters()], weight)
        for old, new in zip(self.network.buffers(), network.buffers(), strict=True):
            old.copy_(new)

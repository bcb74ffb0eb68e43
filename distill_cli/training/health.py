"""Losses that are not finite, and spikes, recorded on the device, so that no step waits for a GPU; and what ends a run for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.errors import DistillError
from distill_cli.launch import whole

SKIPPED_AT_MOST = 50
"""After so many steps in a row without a finite gradient the run stops."""
NEVER = 2**62
"""A step that no run reaches."""
MEMORY, SPIKE, SETTLED = 0.98, 6.0, 20
"""Decay of the running statistics; a spike, in standard deviations; steps before spikes are counted."""


class Health:
    """For each loss: the first step at which it was not finite, its running mean and variance, and the number of spikes."""

    def __init__(self) -> None:
        self.bad: dict[str, Tensor] = {}
        self.running: dict[str, Tensor] = {}
        self.spikes: Tensor = torch.zeros(())
        self.skipped: dict[str, Tensor] = {}
        """Skipped updates of each network: in a row until now, and in all."""

    def watch(self, name: str, value: Tensor, step: int) -> None:
        """Record the first step at which `value` (a scalar) is not finite."""
        never = torch.full_like(value, NEVER, dtype=torch.int64, requires_grad=False)
        now = torch.where(value.detach().isfinite(), never, step)
        self.bad[name] = torch.minimum(self.bad.get(name, never), now)

    def first_bad(self) -> tuple[str, int] | None:
        """Name and step of the earliest value that was not finite."""
        first = {name: int(step.item()) for name, step in self.bad.items()}
        name = min(first, key=lambda key: first[key], default="")
        return (name, first[name]) if name and first[name] != NEVER else None

    def count(self, name: str, loss: Tensor) -> None:
        """Count a loss (a scalar) more than `SPIKE` standard deviations above its running mean, into which it enters clipped."""
        loss = loss.detach().float()
        seen, mean, variance = self.running.get(name, torch.zeros(3, device=loss.device))
        highest = mean + SPIKE * variance.sqrt()
        settled, finite = seen >= SETTLED, loss.isfinite()
        self.spikes = self.spikes.to(loss.device) + (settled & ~(loss <= highest)).float()
        value = torch.where(settled, torch.minimum(loss, highest), loss)
        memory = torch.minimum(seen / (seen + 1), torch.full_like(seen, MEMORY))  # a plain mean at first
        step = value - mean
        variance_new = memory * (variance + (1 - memory) * step.square())
        new = torch.stack([seen + 1, mean + (1 - memory) * step, variance_new])
        self.running[name] = torch.where(finite, new, torch.stack([seen, mean, variance]))

    def skip(self, name: str, bad: Tensor) -> None:
        """Count an update of a network, skipped if it is `bad`."""
        row, total = self.skipped[name]
        bad = bad.to(self.skipped[name])
        self.skipped[name] = torch.stack([(row + bad) * bad, total + bad])

    def check_skipped(self, step: int, hint: str) -> None:
        """Raise DistillError if too many updates up to `step` were skipped in a row."""
        for name, (row, _) in self.skipped.items():
            if row >= SKIPPED_AT_MOST:
                raise DistillError(f"{int(row)} steps in a row up to {step} had no finite gradient of {name}", hint)

    def check(self, step: int, networks: Mapping[str, nn.Module], hint: str) -> None:
        """Raise DistillError if a loss or a weight is not finite after `step` steps, so no checkpoint ever has one."""
        if bad := self.first_bad():
            raise DistillError(f"{bad[0]} is not a number at step {bad[1]}", hint)
        for name, network in networks.items():
            if not torch.stack([whole(torch.isfinite(p).all()) for p in network.parameters()]).all():
                raise DistillError(f"the weights of {name} are not numbers at step {step}", hint)

    def state_dict(self) -> dict[str, Any]:
        """The state as exact JSON."""
        return {"spikes": self.spikes.item(), "running": {name: values.tolist() for name, values in self.running.items()}}

    def load_state_dict(self, state: dict[str, Any], where: torch.device) -> None:
        self.spikes = torch.tensor(state["spikes"], device=where)
        self.running = {name: torch.tensor(values, device=where) for name, values in state["running"].items()}

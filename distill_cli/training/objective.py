"""What a training method gives to the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from distill_cli.diffusion.noise import Draws


@dataclass
class Loss:
    """A loss whose gradient steps `network`; `metrics` are scalars to log besides it."""

    network: str
    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """The interface a training method implements."""

    networks: dict[str, nn.Module]
    """Trained networks; the first one's average is the result. The engine puts wrapped ones in their place."""
    frozen: list[nn.Module]
    """Frozen networks: moved to the device, never trained or saved."""
    kept: dict[str, nn.Module]
    """Networks that the objective changes itself: they go into checkpoints."""
    rates: dict[str, float]
    """Learning rate of each trained network."""
    result: str
    """Name of the result's folder in the run."""
    identity: dict[str, Any]
    """Digests of what a resumed run must find again, by the option that gives it: teacher, pairs, ... (identity.begun)."""

    def turns(self, draws: Draws) -> Iterator[Loss]:
        """The losses of one step on the samples of `draws`; after each the engine steps that network, then asks on."""

    def model(self, network: nn.Module) -> Any:
        """The result made of `network` (the average, or its copy): a Model, or another thing with `save(folder)`."""

    def advice(self, metrics: dict[str, float], done: float) -> str:
        """A warning about the run's state as these averages show it at the share `done` of all steps, or ''."""

"""What leads a teacher besides its own condition: a network's gradient, by which Steered moves the estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from distill_cli.diffusion.guidance import Guide


class ModelGuide(Guide, Protocol):
    """A guide of a model: of a sample it is told what is asked for, by the sample's label."""

    name: str
    """Of what kind it is, and whose: `classifier digits-noisy`."""
    part: str
    """The part of the condition that it reads; its name begins with GUIDE."""
    classes: tuple[str, ...]
    """The classes that can be asked for by a label; () for a guide that reads prompts."""

    @property
    def network(self) -> nn.Module:
        """Moved to the device with the model, never trained."""

    def told(self, labels: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, ...) float32: what the samples with these labels (B,) are asked for, on their device. `prompts`: those of the job, or ()."""

    def identity(self) -> dict[str, Any]:
        """The digest of its weights and its settings, by the options that give them: part of a job's settings and of a run's."""

"""Random numbers by index: sample i of a job draws from (seed, purpose, i) alone.

So they are the same for any device, batch size, and number of processes or machines. The generator is numpy's Philox
4x64 (Salmon et al. 2011), which is counter-based; unlike torch.randn, it does not depend on the processor's vector width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

PURPOSES = (
    "prior", "solver", "matching_noise", "matching_time", "score_noise", "score_time", "label",
    "label_dropout", "augment", "order", "noise", "time", "guidance",
    "critic_noise", "critic_time", "nudge",
)  # fmt: skip
"""Purposes of random streams. Append only: the position is part of the key, so moving one changes every run."""


class Draws:
    """The random numbers of the samples `indices` (global positions in the job); each sample has its own streams."""

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        self.seed, self.indices = seed, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def later(self, samples: int) -> Draws:
        """Those of the samples that come so many later in the job: by the batch's size, of the same part of the next step."""
        return Draws(self.seed, [index + samples for index in self.indices])

    def _generators(self, purpose: str, turn: int) -> Iterator[np.random.Generator]:
        """The generator at the beginning of each sample's stream: one that is moved, as a new one takes nine times as long."""
        bits = np.random.Philox(key=np.array([self.seed, PURPOSES.index(purpose)], dtype=np.uint64))
        generator, state = np.random.Generator(bits), bits.state
        for index in self.indices:
            state["state"]["counter"][2:] = turn, index
            bits.state = state
            yield generator

    def normal(self, purpose: str, shape: Sequence[int] = (), turn: int = 0) -> Tensor:
        """Standard-normal float32 (B, *shape) on the CPU; `turn` numbers repeated draws of a sample for one purpose."""
        rows = [generator.standard_normal(shape, dtype=np.float32) for generator in self._generators(purpose, turn)]
        return torch.from_numpy(np.asarray(rows, dtype=np.float32).reshape(len(rows), *shape))

    def uniform(self, purpose: str, turn: int = 0) -> Tensor:
        """Uniform float64 (B,) in [0, 1)."""
        return torch.tensor([generator.random() for generator in self._generators(purpose, turn)], dtype=torch.float64)


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order (count,) in which an epoch visits the items 0 .. count-1."""
    key = np.array([seed, PURPOSES.index("order")], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, epoch])).permutation(count)


class Order:
    """Item positions by global sample index, shuffled anew in each epoch; a resume needs no stored state."""

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, self.count)
        return int(self._order[position])

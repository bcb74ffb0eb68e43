"""Training data: pictures and their conditions, a share of which is replaced by the null condition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill_cli.data import Images
from distill_cli.diffusion.condition import Condition, dropped
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.models.conditioners import Conditioner


class Examples:
    """Pictures in the order of `order` over the positions `seen` (default: all), with class conditions; a share `dropout` is null."""

    def __init__(self, images: Images, order: Order, conditioner: Conditioner, dropout: float, seen: Sequence[int] | None = None) -> None:
        self.images, self.order, self.conditioner, self.dropout = images, order, conditioner, dropout
        self.seen = range(len(images)) if seen is None else seen

    def batch(self, draws: Draws, where: torch.device) -> tuple[Tensor, Condition]:
        """x0 (B, C, H, W) and the condition of the samples of `draws`, on a device."""
        x, labels = self.images.batch([self.seen[self.order[i]] for i in draws.indices], draws)
        conditioner, uniform = self.conditioner, draws.uniform("label_dropout")
        return x.to(where), dropped(conditioner(labels), conditioner.null, uniform, self.dropout).to(where)  # one copy, not three

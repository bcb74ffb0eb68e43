"""What a method learns from: pictures and their conditions, some of them replaced by the null one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill_cli.data import Images
from distill_cli.diffusion.condition import Condition, dropped
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.models.conditioners import Conditioner


class Examples:
    """Pictures in an order, with the conditions of their classes; the share `dropout` of these is the null one, where there is one.

    `seen` are the positions of the set that the order is of; default all.
    """

    def __init__(self, images: Images, order: Order, conditioner: Conditioner, dropout: float, seen: Sequence[int] | None = None) -> None:
        self.images, self.order, self.conditioner, self.dropout = images, order, conditioner, dropout
        self.seen = range(len(images)) if seen is None else seen

    def batch(self, draws: Draws, where: torch.device) -> tuple[Tensor, Condition]:
        """x0 (B, C, H, W) and its condition, on a device, of the samples of `draws`."""
        x, labels = self.images.batch([self.seen[self.order[i]] for i in draws.indices], draws)
        conditioner, uniform = self.conditioner, draws.uniform("label_dropout")
        return x.to(where), dropped(conditioner(labels.to(where)), conditioner.null, uniform, self.dropout)

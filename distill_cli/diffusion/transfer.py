"""Copies of tensors to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, where: str | torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on a device, as `dtype` if one is given.

    The host does not wait for a copy to a GPU: it goes by pinned memory, in the order of the GPU's other work.
    """
    x = x if dtype is None else x.to(dtype)
    if x.device.type != "cpu" or torch.device(where).type != "cuda":
        return x.to(where)
    return x.contiguous().pin_memory().to(where, non_blocking=True)  # an expanded tensor cannot be pinned

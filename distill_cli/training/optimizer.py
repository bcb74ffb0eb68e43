"""Optimizers and their learning rate, the same for every objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from distill_cli.config import TrainingConfig


def learning_rate(config: TrainingConfig, rate: float, step: int, steps: int) -> float:
    """Learning rate of step 0, 1, ... of `steps`: linear warm-up, then constant, or a cosine down to the share lr_end."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "constant":
        return rate * warm
    along = max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return rate * warm * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * along)))


def make_optimizer(config: TrainingConfig, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """The optimizer for parameters, with decoupled weight decay.

    AdamW (Loshchilov & Hutter 1711.05101); RAdam (Liu et al. 1908.03265); or Muon (Jordan et al. 2024, "Muon: an optimizer for hidden
    layers"): matrices, and convolutions as matrices, step by their orthogonalised momentum, as long as AdamW's steps (Liu et al.
    2502.16982), so that `lr` means the same; all else, matrices with a side below 4 too, steps by NAdamW.
    """
    settings: dict[str, Any] = dict(lr=rate, betas=config.betas, weight_decay=config.weight_decay)
    if config.optimizer == "radam":
        return torch.optim.RAdam(parameters, **settings, decoupled_weight_decay=True, foreach=True)
    if config.optimizer == "muon":
        return muon()(parameters, **settings, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    return HostAdamW(parameters, **settings) if config.optimizer_device == "cpu" else torch.optim.AdamW(parameters, **settings, fused=True)


@cache
def muon() -> Callable[..., torch.optim.Optimizer]:
    """timm's Muon, which on a CPU orthogonalises in float32.

    timm always takes bfloat16. On a processor without AVX512-BF16 that takes 10 to 20 times as long; with it, whole steps are not faster.
    """
    timms: Any = import_module("timm.optim.muon")
    original = timms.zeropower_via_newtonschulz

    def orthogonalised(matrix: Tensor, *given: Any, **settings: Any) -> Tensor:
        return original(matrix, *given, **settings | ({"dtype": torch.float32} if matrix.device.type == "cpu" else {}))

    timms.zeropower_via_newtonschulz = orthogonalised  # where it is looked up: no option leads there
    return timms.Muon


class HostAdamW(torch.optim.AdamW):
    """AdamW with its moments in the host's memory: there it steps, one tensor at a time; weights and gradients travel.

    Its state is that of AdamW, and on the CPU its steps are AdamW's to the bit.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                here, state = weight.to("cpu"), self.state[weight]
                if not state:
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(here), "exp_avg_sq": torch.zeros_like(here)}
                settings = {key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
                beta1, beta2 = group["betas"]
                first, second, count = ([state[key]] for key in ("exp_avg", "exp_avg_sq", "step"))
                gradients = [weight.grad.to("cpu")]
                adamw([here], gradients, first, second, [], count, fused=True, beta1=beta1, beta2=beta2, **settings)
                if here is not weight:
                    weight.copy_(here)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # it takes moments to the weights' device
        for state in self.state.values():
            state.update({key: value.cpu() for key, value in state.items()})

"""A run's networks before the first step: on their device, in their memory format, with or without checkpoints, compiled or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distill_cli.config import TrainingConfig
from distill_cli.errors import UsageError
from distill_cli.models import compiled
from distill_cli.processes import say
from distill_cli.training.objective import Objective


def able(network: nn.Module) -> list[Any]:
    """The diffusers networks in a network that can compute activations anew in the backward pass."""
    parts = [*network.modules(), *(backbone.net for backbone in compiled.backbones(network))]
    return [part for part in parts if getattr(part, "_supports_gradient_checkpointing", False)]


def check(config: TrainingConfig, trained: Mapping[str, nn.Module]) -> None:
    """Raise UsageError for options that the trained networks do not have."""
    for name, network in trained.items():
        kind = type(next(iter(compiled.backbones(network)), network)).__name__
        if config.gradient_checkpointing and not able(network):
            raise UsageError(f"gradient_checkpointing: the {name}'s network, {kind}, has none", "leave it out")
        if config.compile != "none" and not compiled.backbones(network):
            raise UsageError(f"compile {config.compile}: for networks that denoise, {name} is {kind}", "leave it out")


def placed(config: TrainingConfig, network: nn.Module, where: torch.device, trained: bool) -> Counter[str]:
    """Move a network to its device in the memory format of the config, and compile it; returns what was compiled."""
    network.to(where)
    compiled.lay_out(config, network)
    if trained and config.gradient_checkpointing:
        for backbone in compiled.backbones(network):
            backbone.checkpointing()
        for part in able(network) if not compiled.backbones(network) else []:
            part.enable_gradient_checkpointing()
    return compiled.compile_network(network, config.compile)


def place(config: TrainingConfig, objective: Objective, accelerator: Any) -> dict[str, Any]:
    """Place all networks of an objective, and say what is compiled. Returns what runs, for env.json."""
    from accelerate.utils import DistributedType

    where = accelerator.device
    modules = {name: each.module for name, each in objective.trained.items()}
    check(config, modules)
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded and config.optimizer_device == "cpu":
        raise UsageError(f"optimizer_device cpu: not with {accelerator.distributed_type.value}, which spreads moments", "leave it out")
    if config.compile != "none":
        if sharded:
            raise UsageError(f"compile {config.compile}: not with {accelerator.distributed_type.value}", "leave it out")
        compiled.check(where)
    counted: Counter[str] = Counter()
    for network in (*objective.frozen.values(), *objective.kept.values()):
        counted += placed(config, network, where, trained=False)
    for network in modules.values():
        counted += placed(config, network, where, trained=True)
    used = compiled.said(counted)
    if used:
        say(f"compile {config.compile}: {used}; the first steps take minutes longer")
    on = [key for key in ("channels_last", "gradient_checkpointing") if getattr(config, key)]
    if on:
        say(f"networks: {', '.join(on)}")
    chosen = {key: getattr(config, key) for key in config.changed("compile", "channels_last", "gradient_checkpointing")}
    return {"deterministic": config.deterministic} | chosen | ({"compiled": used} if used else {})

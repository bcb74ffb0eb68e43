"""DeepSpeed's ZeRO of stages 1 and 2 for a single network, where accelerate's configuration asks for it.

Gradients and moments are spread over the processes (Rajbhandari et al. 1910.02054). The weights stay float32 and whole on each, so
averages, checkpoints and results are those of any other run: a checkpoint resumes with ZeRO or without.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.config import TrainingConfig
from distill_cli.errors import UsageError
from distill_cli.processes import world_size

OURS = ("optimizer", "scheduler")
"""Sections of DeepSpeed's configuration that the recipe has keys for."""


def wanted() -> bool:
    """Whether accelerate's configuration asks for DeepSpeed; one process alone has nothing to spread."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def check(config: TrainingConfig, networks: int) -> None:
    """Raise UsageError where DeepSpeed is wanted and cannot be had for this run; before accelerate starts."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("DeepSpeed is wanted by accelerate's configuration and not installed", "pip install 'distill-cli[deepspeed]'")
    if networks > 1:
        raise UsageError("DeepSpeed trains a single network, here are several", "accelerate's FSDP (fsdp_version 2) shards each of them")
    if config.precision == "fp16":
        raise UsageError("--precision fp16: not with DeepSpeed", "use bf16: weights stay float32")
    if config.on_nan == "skip":
        raise UsageError("on_nan skip: not with DeepSpeed, which looks at gradients only as it steps", "leave it at stop")


def check_settings(settings: dict[str, Any]) -> None:
    """Raise UsageError where DeepSpeed's configuration would change what is trained, or leave no weights whole."""
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        raise UsageError(
            f"DeepSpeed's ZeRO stage {zero.get('stage', 0)} is not supported",
            "stage 1 or 2; FSDP (fsdp_version 2) shards the weights too, and without DeepSpeed nothing is sharded",
        )
    for kind in ("offload_optimizer", "offload_param"):
        if (zero.get(kind) or {}).get("device", "none") != "none":
            raise UsageError(f"DeepSpeed's {kind} is not supported", "leave it out: moments are spread over the processes")
    for section in OURS:
        if section in settings:
            raise UsageError(f"DeepSpeed's configuration has its own {section}", "leave it out: the recipe says what it is")


class Zero:
    """A network and its optimizer under DeepSpeed: to the engine an optimizer, whose state is whole and in torch's form."""

    def __init__(self, accelerator: Any, config: TrainingConfig, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` is of `network`. Raises UsageError for a configuration that changes what is trained."""
        if accelerator.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with redirect_stdout(sys.stderr):  # its messages are no results
            settings = plugin_of(accelerator).deepspeed_config
            logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
            check_settings(settings)
            settings["train_micro_batch_size_per_gpu"] = config.batch_size // config.accumulate // world_size()
            settings["gradient_accumulation_steps"] = 1  # the engine divides the parts' losses itself
            settings["gradient_clipping"] = config.clip_norm
            for half in ("bf16", "fp16"):
                settings[half] = {"enabled": False}
            if config.precision == "bf16":  # float32 weights and sums of gradients, as without DeepSpeed
                settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            self.engine, _ = accelerator.prepare(network, optimizer)
        self.parameters = list(network.parameters())
        self.param_groups: list[dict[str, Any]] = [{"params": self.parameters, "lr": config.lr}]

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a part's gradients; with the last part's processes exchange them."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self) -> Tensor:
        """Clip, step and clear the gradients; returns their norm before it was clipped (NaN: the step was left out)."""
        for group in self._inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.engine.step()
        return torch.as_tensor(math.nan if self.engine.optimizer.overflow else self.engine.get_global_grad_norm())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """DeepSpeed clears them as it steps."""

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The optimizer of the flat share that this process has of the weights."""
        inner: torch.optim.Optimizer = self.engine.optimizer.optimizer
        return inner

    def state_dict(self) -> dict[str, Any]:
        """As of a torch optimizer of the whole network; all processes have to call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        settings = {key: value for key, value in self._inner.param_groups[0].items() if key != "params"}
        state: dict[int, dict[str, Tensor]] = {}
        for share in self._inner.state.values():
            flat = [key for key, value in share.items() if value.ndim]
            state = {
                k: {**{key: safe_get_full_optimizer_state(p, key).cpu() for key in flat}, "step": share["step"].cpu().clone()}
                for k, p in enumerate(self.parameters)
            }
        return {"state": state, "param_groups": [{**settings, "params": list(range(len(self.parameters)))}]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take up the whole state of an optimizer, and the weights that the network has by now."""
        self.engine.optimizer.refresh_fp32_params()
        (share,) = self.engine.optimizer.single_partition_of_fp32_groups
        if not saved["state"]:
            return
        where = share.device if self._inner.param_groups[0].get("fused") else "cpu"  # of the count of steps
        moments: dict[str, Tensor] = {
            key: torch.zeros_like(share) if value.ndim else value.to(where, copy=True) for key, value in saved["state"][0].items()
        }
        for k, parameter in enumerate(self.parameters):
            place: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if place is None:  # in another process's share
                continue
            there, here = place.lp_fragment_address, place.hp_fragment_address
            for key, value in saved["state"][k].items():
                if value.ndim:
                    moments[key][here.start : here.start + here.numel] = value.flatten()[there.start : there.start + there.numel]
        self._inner.state[share] = moments


def plugin_of(accelerator: Any) -> Any:
    """accelerate's DeepSpeed settings; on the CPU, where it leaves DeepSpeed out, put in its place."""
    from accelerate import DeepSpeedPlugin
    from accelerate.utils import DistributedType

    state = accelerator.state
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        plugin = DeepSpeedPlugin()
        state.distributed_type, state.deepspeed_plugins, accelerator.deepspeed_engine_wrapped = DistributedType.DEEPSPEED, plugin, None
        plugin.select(_from_accelerator_state=True)
    return state.deepspeed_plugin

"""What accelerate's configuration may turn on: FSDP, and DeepSpeed's ZeRO of stages 1 and 2 for a single network.

ZeRO shards gradients and moments over the processes (Rajbhandari et al. 1910.02054). The weights stay float32 and whole on each
process, so averages, checkpoints and results are as in any other run, and a checkpoint resumes with ZeRO or without.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.config import TrainingConfig
from distill_cli.errors import UsageError, reason
from distill_cli.launch import PATIENCE
from distill_cli.processes import rank, world_size

WANTED = "ACCELERATE_USE_DEEPSPEED"
RECIPES = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "fp16", "bf16"}
"""Keys of DeepSpeed's configuration that the recipe overrides."""
IDLE = {"zero_optimization", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}
TUNING = ("allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "overlap_comm", "reduce_bucket_size", "reduce_scatter")
"""Keys of zero_optimization that change the speed, not what is trained."""
BUCKET = 500_000_000


def accelerator(config: TrainingConfig, spread: Any | None, where: torch.device) -> Any:
    """accelerate's Accelerator of a run; `spread` is its DeepSpeed plugin."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    out = Accelerator(
        # accelerate brings fp16's gradient scaler alone: given bf16, its FSDP would round the networks' times (999 to 1000) and x_t
        mixed_precision="fp16" if config.precision == "fp16" and spread is None else "no",
        deepspeed_plugin=spread,
        cpu=where.type == "cpu",
        log_with=tracker_of(config),
        project_dir=config.out,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True), InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    honour_fsdp(out)
    return out


def plugin(config: TrainingConfig, networks: Sequence[nn.Module], device: torch.device) -> Any | None:
    """accelerate's DeepSpeed settings for this run; None if not asked for. Raises UsageError for settings that are not supported.

    A single process has nothing to shard: DeepSpeed is turned off.
    """
    if world_size() == 1:
        os.environ.pop(WANTED, None)
    if os.environ.get(WANTED, "").lower() != "true":
        return None
    check(config, len(networks))
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with redirect_stdout(sys.stderr):  # stdout is for results
        try:
            import deepspeed  # noqa: F401
            from accelerate import DeepSpeedPlugin

            made = DeepSpeedPlugin()
        except (ImportError, OSError, ValueError) as error:
            raise UsageError(f"DeepSpeed: {reason(error)}", "accelerate's configuration asks for it") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settings: dict[str, Any] = made.deepspeed_config
    ours = settings_of(settings, config, sum(p.numel() for network in networks for p in network.parameters()))
    settings.clear()
    settings.update(ours)
    return made


def check(config: TrainingConfig, networks: int) -> None:
    """Raise UsageError if this run cannot use DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("DeepSpeed is wanted by accelerate's configuration and not installed", "pip install 'distill-cli[deepspeed]'")
    if networks > 1:
        raise UsageError("DeepSpeed trains a single network, here are several", "accelerate's FSDP (fsdp_version 2) shards each of them")
    if config.optimizer == "muon":
        raise UsageError("optimizer muon: not with DeepSpeed, which lays all weights in one row", "adamw or radam")
    if config.precision == "fp16":
        raise UsageError("--precision fp16: not with DeepSpeed", "use bf16: weights stay float32")
    if config.on_nan == "skip":
        raise UsageError("on_nan skip: not with DeepSpeed, which looks at gradients only as it steps", "leave it at stop")


def settings_of(theirs: dict[str, Any], config: TrainingConfig, parameters: int) -> dict[str, Any]:
    """DeepSpeed's settings for a network of `parameters` weights. Raises UsageError for settings that change what is trained."""
    zero = theirs.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        hint = "stage 1 or 2; FSDP (fsdp_version 2) shards the weights too, and without DeepSpeed nothing is sharded"
        raise UsageError(f"DeepSpeed's ZeRO stage {zero.get('stage', 0)} is not supported", hint)
    for kind in ("offload_optimizer", "offload_param"):
        if (zero.get(kind) or {}).get("device") not in (None, "none"):
            raise UsageError(f"DeepSpeed's {kind} is not supported", "leave it out: moments are spread over the processes")
    known = {"stage", "offload_optimizer", "offload_param", "round_robin_gradients", "sub_group_size", *TUNING}
    others = [key for key in theirs if key not in RECIPES | IDLE]
    others += [f"zero_optimization.{key}" for key in zero if key not in known and not key.startswith("stage3_")]
    if others:
        raise UsageError(f"DeepSpeed's setting {others[0]} is not supported", "leave it out: what is trained stands in the recipe")
    micro = config.batch_size // config.accumulate // world_size()
    out = {
        "train_micro_batch_size_per_gpu": micro,
        "train_batch_size": micro * world_size(),
        "gradient_accumulation_steps": 1,  # the engine accumulates itself
        "gradient_clipping": config.clip_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": math.inf,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU at every call
        "zero_optimization": {
            "reduce_bucket_size": min(BUCKET, parameters),
            **{key: zero[key] for key in TUNING if zero.get(key, "auto") != "auto"},
            "stage": zero["stage"],
            "round_robin_gradients": False,  # state_dict needs the moments in the order of the parameters
        },
    }
    if config.precision == "bf16":  # float32 weights and sums of gradients, as without DeepSpeed
        out["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return out


def tracker_of(config: TrainingConfig) -> str | None:
    """The tracker besides metrics.jsonl, or None. Raises UsageError if its package is not installed."""
    if config.tracker == "none":
        return None
    if importlib.util.find_spec(config.tracker) is None:
        hint = f"pip install {config.tracker}; metrics.jsonl is written without it too"
        raise UsageError(f"tracker: {config.tracker} is not installed", hint)
    return config.tracker


def honour_fsdp(accelerator: Any) -> None:
    """Turn on FSDP on the CPU, if accelerate's configuration asks for it: accelerate ignores it there, although torch can do it.

    The plugin is what GPUs get. Raises UsageError for what FSDP cannot have here.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        made = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            made.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, made
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UsageError("FSDP of version 1 is not supported", "fsdp_version: 2 in accelerate's configuration, or FSDP_VERSION=2")
    if accelerator.mixed_precision == "fp16":
        raise UsageError("--precision fp16: not with FSDP, which would round times and losses too", "use bf16: weights stay float32")


class Zero:
    """A network and its optimizer under DeepSpeed, with an optimizer's interface: its state is whole and in torch's form."""

    def __init__(self, accelerator: Any, made: Any, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """`accelerator` was given the plugin `made`; `optimizer` is of `network`."""
        from accelerate.utils import DistributedType

        if accelerator.distributed_type != DistributedType.DEEPSPEED:  # accelerate ignores DeepSpeed on the CPU
            accelerator.state.distributed_type, accelerator.state.deepspeed_plugins = DistributedType.DEEPSPEED, made
            made.select(_from_accelerator_state=True)
            made.set_mixed_precision("no")
        with redirect_stdout(sys.stderr):
            self.engine, _ = accelerator.prepare(network, optimizer)
        self.inner: torch.optim.Optimizer = self.engine.optimizer.optimizer
        """The optimizer of this process's flat share of the weights."""
        self.parameters = list(network.parameters())
        self.param_groups: list[dict[str, Any]] = [{"params": self.parameters, "lr": optimizer.defaults["lr"]}]

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a part of the batch; after the last part the processes exchange them."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self) -> Tensor:
        """Clip, step and clear the gradients. Returns their norm before clipping; NaN if it was not finite."""
        for group in self.inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(math.nan if self.engine.optimizer.overflow or norm < 0 else norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: DeepSpeed clears gradients in `step`."""

    def state_dict(self) -> dict[str, Any]:
        """The state of a torch optimizer of the whole network, on process 0. All processes have to call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        settings = {key: value for key, value in self.inner.param_groups[0].items() if key != "params"}
        state: dict[int, dict[str, Tensor]] = {}
        for share in self.inner.state.values():  # one share; none before the first step
            for k, parameter in enumerate(self.parameters):
                moments = {key: safe_get_full_optimizer_state(parameter, key) for key, value in share.items() if value.ndim}
                if rank() == 0:
                    state[k] = {key: value.cpu() for key, value in moments.items()} | {"step": share["step"].cpu().clone()}
        return {"state": state, "param_groups": [{**settings, "params": list(range(len(self.parameters)))}]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load the moments of a whole network (settings are the recipe's), and take over the network's present weights."""
        self.engine.optimizer.refresh_fp32_params()
        (share,) = self.engine.optimizer.single_partition_of_fp32_groups
        if not saved["state"]:
            return
        where = share.device if self.inner.param_groups[0].get("fused") else "cpu"  # device of the step count
        first = saved["state"][0].items()
        moments = {key: torch.zeros_like(share) if value.ndim else value.to(where, copy=True) for key, value in first}
        for k, parameter in enumerate(self.parameters):
            place: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if place is None:  # in another process's share
                continue
            there, here = place.lp_fragment_address, place.hp_fragment_address
            for key, value in saved["state"][k].items():
                if value.ndim:
                    moments[key][here.start : here.start + here.numel] = value.flatten()[there.start : there.start + there.numel]
        self.inner.state[share] = moments

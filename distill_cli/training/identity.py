"""What a run began with. A resume, and every process, has to have the same."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill_cli.config import TrainingConfig
from distill_cli.data import Images
from distill_cli.data.images import Folder
from distill_cli.errors import DistillError, UsageError
from distill_cli.files import read_plain, sealed, unsealed, write_atomic
from distill_cli.tensors import hash_of
from distill_cli.training import checkpoint
from distill_cli.training.checkpoint import Networks
from distill_cli.training.objective import Objective

BEGUN = "begun.json"
BACK = "put that back, or begin anew"
SEEN_AFTER = 60.0
"""Seconds after which every machine sees what another has written to a file system that they share."""
FREE = {
    "out", "device", "steps", "lr", "fake_lr", "lr_schedule", "lr_end", "betas", "weight_decay", "warmup_steps", "clip_norm", "precision",
    "batch_size", "accumulate", "ema_halflife", "fake_steps", "matching_weight", "regression_weight", "guidance_calls", "on_nan", "tracker",
    "deterministic", "compile", "channels_last", "gradient_checkpointing", "log_every", "sample_every", "save_every", "keep", "keep_best",
    "teacher", "data", "pairs", "prompts", "vae", "decoder", "lpips_weights", "guidance_scale", "optimizer", "times", "merge",
    "memory", "ema_device", "optimizer_device", "gan_weight", "critic_weight", "r1_weight", "guidance_weight", "student", "init_pairs",
    "health_every", "best_by", "result", "classifier_guidance", "classifier_scale", "clip_guidance", "clip_scale",
    "clip_through", "clip_cutouts", "model", "matching_share", "regression_steps",
}  # fmt: skip
"""Keys of a recipe that may change at a resume: how a run is trained and logged, and inputs that are compared by their content."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types of whole numbers, by their bytes."""


def begun(config: TrainingConfig, objective: Objective) -> dict[str, Any]:
    """What a resume must find unchanged. Moments fit one optimizer only, an order one number of items."""
    images = objective.images
    return {
        "optimizer": config.optimizer,
        "images or pairs": None if objective.order is None else objective.order.count,
        "guidance scale": objective.guidance,
        "classes": None if images is None else list(images.classes),
        "shape of the images": None if images is None else list(images.shape),
        "steps of its phases": [phase.steps for phase, later in pairwise(objective.phases) if later.anew] or None,
        "recipe": config.model_dump(mode="json", exclude=FREE),
        **objective.identity,
    }


def digest(network: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a network's weights."""
    return hash_of(network.state_dict())


def refuse(config: TrainingConfig, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Raise UsageError if a run is resumed with other inputs. A key that `then` lacks (runs of older versions) is not compared."""
    for what, value in now.items():
        old = then.get(what, value)
        if old == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            refuse(config, *({f"{what}.{key}".removeprefix("recipe."): each for key, each in part.items()} for part in (value, old)))
            continue
        if isinstance(value, list) and all(isinstance(name, str) for name in value) and isinstance(old, list):
            new, gone = ([name for name in one if name not in other] for one, other in ((value, old), (old, value)))
            said = f"{new[0]} is new" if new else f"{gone[0]} is gone" if gone else "in another order"
            raise UsageError(f"{what}: {said}; the run has begun with {len(old)}", BACK)
        if isinstance(value, str) and len(value) == 64:  # a SHA-256
            named = f"{what} {getattr(config, what)}" if getattr(config, what, None) else what
            raise UsageError(f"{named}: its content is not what the run has begun with", BACK)
        raise UsageError(f"{what}: {value}; the run has begun with {old}", BACK)


def read(folder: Path) -> dict[str, Any]:
    """Read begun.json; {} for a run of an older version."""
    path = folder / BEGUN
    try:
        return unsealed(read_plain(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DistillError(f"{path}: corrupt", "delete it, and the run is taken up with what is there now") from error


def write(folder: Path, now: Mapping[str, Any]) -> None:
    """Write begun.json into a run's folder, unless it is there."""
    if not (folder / BEGUN).exists():
        write_atomic(folder / BEGUN, sealed(dict(now), indent=2))


def check_shapes(path: Path, networks: Networks) -> None:
    """Raise UsageError if the tensors of a checkpoint do not have the names and shapes of the networks'."""
    for name, network in networks.items():
        with safe_open(path / f"{name}.safetensors", "pt") as stored:
            then = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
        now = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        for key in sorted({*then, *now}):
            if then.get(key) != now.get(key):
                said = f"{key} is {now.get(key, 'missing')}, in {path.name} {then.get(key, 'missing')}"
                raise UsageError(f"{name}: {said}: the run has begun with other classes, or with another network", BACK)


def everyone(mine: Any, talk: Any) -> list[Any]:
    """What each process has here; all have to call."""
    out = [mine] * (1 if talk is None else torch.distributed.get_world_size(talk))
    if talk is not None:
        torch.distributed.all_gather_object(out, mine, group=talk)
    return out


def first_error(error: DistillError | None, talk: Any) -> None:
    """Raise the first process's error on every process. All have to call."""
    for found in everyone(error, talk):
        if found is not None:
            raise found


def newest(folder: Path, talk: Any) -> int | None:
    """The newest step with a checkpoint, as process 0 sees it; the others wait until they see it too. None if there is none."""
    found = checkpoint.steps(folder)
    step = found[-1] if found else -1
    if talk is not None:
        chosen = torch.tensor([step])
        torch.distributed.broadcast(chosen, 0, group=talk)
        step = int(chosen)
        until = time.monotonic() + SEEN_AFTER
        while step >= 0 and not checkpoint.path_of(folder, step).is_dir() and time.monotonic() < until:
            time.sleep(0.2)
    return step if step >= 0 else None


def take_up(
    folder: Path, step: int, networks: Networks, optimizers: Mapping[str, Any], check: Callable[[dict[str, Any]], None], talk: Any
) -> dict[str, Any]:
    """As checkpoint.load, but if one process raises, all do. `check` may refuse what the run began with."""
    agreed = False
    path = checkpoint.path_of(folder, step)

    def checked(state: dict[str, Any]) -> None:
        nonlocal agreed
        check(state.get("begun", {}))
        check_shapes(path, networks)
        agreed = True
        first_error(None, talk)

    try:
        if talk is not None and not path.is_dir():
            shared = "the run's folder has to be on a file system that all machines share"
            raise DistillError(f"{path}: process 0 sees it, and another does not", shared)
        return checkpoint.load(folder, step, networks, optimizers, checked)
    except DistillError as error:
        if not agreed:
            first_error(error, talk)
        raise


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sums of tensors' bits, which are exact and fast on every device. FSDP's sharded tensors are left out."""
    whole = {name: value.detach() for name, value in tensors.items() if not isinstance(value, DTensor)}
    sums = [value.contiguous().view(INTEGERS[value.element_size()]).sum(dtype=torch.int64).cpu() for value in whole.values()]
    said = "".join(f"{name} {value.dtype} {tuple(value.shape)}\n" for name, value in whole.items())
    numbers = torch.stack(sums).numpy().tobytes() if sums else b""
    return hashlib.sha256(said.encode() + numbers).hexdigest()


def shared(begun: Mapping[str, Any], images: Images | None, networks: Networks, optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """What all processes must share before they train: what the run began with, its pictures, weights and moments."""
    out = {**begun, "data": images.digest if isinstance(images, Folder) else ""}
    for name, network in networks.items():
        out[f"weights of {name}"] = fingerprint(network.state_dict())
    for name, optimizer in optimizers.items():
        moments = {f"{k} {key}": value for k, state in enumerate(optimizer.state.values()) for key, value in state.items()}
        out[f"moments of {name}"] = fingerprint({key: value for key, value in moments.items() if isinstance(value, Tensor)})
    return out


def check_same(mine: Mapping[str, Any], talk: Any) -> None:
    """Raise DistillError on every process if one differs from process 0. All have to call."""
    theirs = everyone(dict(mine), talk)
    for number, other in enumerate(theirs):
        if differs := [what for what, value in other.items() if value != theirs[0].get(what)]:
            said = f"{differs[0]}: process {number} has something else than process 0"
            raise DistillError(said, "models, data and the run's folder have to be the same on all machines")

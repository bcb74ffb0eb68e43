"""Checkpoints: complete or absent, verified before they are used, the newest few kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill_cli.errors import DistillError
from distill_cli.files import folder_atomic, read_plain, remove_folder, sealed, sha256, sha256_plain, unsealed
from distill_cli.launch import like, whole
from distill_cli.processes import rank
from distill_cli.tensors import write

STATE = "state.json"
Networks = Mapping[str, nn.Module]


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []  # glob silently skips a folder without read permission
    numbers = [int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdecimal()]
    return sorted(number for number in numbers if path_of(folder, number).name in names)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def save(
    folder: Path, step: int, networks: Networks, optimizers: Mapping[str, Any], state: Mapping[str, Any], keep: int, best: int = 0,
    since: int = 0,
) -> None:  # fmt: skip
    """Write checkpoint `step`, then delete all but the newest `keep` and the `best` of lowest state["score"]. `state` is JSON.

    All processes have to call. Process 0 writes whole tensors, so any number of processes can resume.
    """
    weights = {name: _kept(network.state_dict()) for name, network in networks.items()}
    moments = {name: _kept(optimizer.state_dict()) for name, optimizer in optimizers.items()}
    if rank() > 0:
        return
    with folder_atomic(path_of(folder, step)) as temporary:
        for name, tensors in weights.items():
            write(temporary / f"{name}.safetensors", tensors)
        with open(temporary / "optimizers.pt", "wb") as handle:
            try:
                torch.save(moments, handle)
            except RuntimeError as error:  # torch tries to finish the archive after an error, and reports that instead
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        sums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / STATE).write_text(sealed({"step": step, "sha256": sums, "state": state}))
    prune(folder, keep, best, since)


def prune(folder: Path, keep: int, best: int, since: int = 0) -> None:
    """Delete all but the newest `keep` and, of the older ones, the `best` of lowest state["score"], those after step `since` first."""
    old = steps(folder)[:-keep]
    for number in sorted(old, key=lambda number: (number <= since, _score(folder, number)))[best:]:
        remove_folder(path_of(folder, number))


def best(folder: Path, since: int = 0) -> tuple[int, float]:
    """The step after `since` whose checkpoint has the lowest state["score"], the newest of equal ones, and that score."""
    scores = {number: _score(folder, number) for number in steps(folder) if number > since}
    step = min(sorted(scores, reverse=True), key=lambda number: scores[number])
    return step, scores[step]


def fill(folder: Path, step: int, name: str, network: nn.Module) -> None:
    """Fill one network from checkpoint `step`. Raises DistillError if its file is damaged."""
    path = path_of(folder, step) / f"{name}.safetensors"
    if sha256_plain(path) != unsealed(read_plain(path.parent / STATE))["sha256"].get(path.name):
        raise DistillError(f"{path}: corrupt: its checksum does not match", f"delete {path.parent}, and the next best is taken")
    network.load_state_dict(load_file(path))


def _kept(state: Any) -> Any:
    """A state with FSDP's tensors gathered, one at a time: whole on process 0 in the CPU's memory, None on the others."""
    if isinstance(state, dict):
        return {key: _kept(value) for key, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    gathered = whole(state)
    return gathered.cpu() if rank() == 0 else None


def _score(folder: Path, step: int) -> float:
    """The loss of a checkpoint; infinite if it is not known."""
    try:
        score = unsealed(read_plain(path_of(folder, step) / STATE))["state"]["score"]
        return score if isinstance(score, float) and math.isfinite(score) else math.inf
    except (OSError, DistillError, ValueError, KeyError, TypeError):
        return math.inf


def load(
    folder: Path, step: int, networks: Networks, optimizers: Mapping[str, Any], check: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Fill networks and optimizers (whose settings stay theirs) from checkpoint `step` and return its state.

    Every file is verified, and `check` may refuse the state, before anything is filled.
    """
    path = path_of(folder, step)
    if not path.is_dir():
        what = "a link that leads nowhere" if path.is_symlink() else "no folder" if path.exists() else "no such folder"
        raise DistillError(f"{path}: {what}", "a checkpoint is a folder: put it back, or move that away")
    others = [number for number in steps(folder) if number < step]
    instead = f"resume from step {others[-1]}" if others else "begin anew: there is no older checkpoint"
    older = f"delete {path} to {instead}"
    try:
        stored = unsealed(read_plain(path / STATE))
        sums, state = dict(stored["sha256"]), dict(stored["state"])
        for name in [*(f"{network}.safetensors" for network in networks), "optimizers.pt"]:
            if sha256_plain(path / name) != sums.get(name):
                raise DistillError(f"{path / name}: corrupt: its checksum does not match", older)
    except FileNotFoundError as error:
        raise DistillError(f"{error.filename}: missing", f"put it back, or move {path} away to {instead}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DistillError(f"{path / STATE}: corrupt", older) from error
    if check is not None:
        check(state)
    for name, network in networks.items():
        there, weights = network.state_dict(), load_file(path / f"{name}.safetensors")
        network.load_state_dict({key: like(value, there[key]) if key in there else value for key, value in weights.items()})
    apart = any(parameter.device.type != "cpu" for network in networks.values() for parameter in network.parameters())
    # mapped for a GPU, so that they need not be in the host's memory at once; on the CPU the tensors that are read are kept
    saved = torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True, mmap=apart)
    for name, optimizer in optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, moments in saved[name]["state"].items():
            moments.update({key: like(value, parameters[index]) for key, value in moments.items() if isinstance(value, Tensor)})
        both = zip(optimizer.param_groups, saved[name]["param_groups"], strict=True)
        groups = [{**own, "params": old["params"]} for own, old in both]
        optimizer.load_state_dict({**saved[name], "param_groups": groups})
    return state

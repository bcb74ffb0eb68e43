"""Checkpoints: complete or absent, verified before they are used, the newest few kept."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from distill_cli.errors import DistillError
from distill_cli.files import folder_atomic, remove_folder, sha256


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.name[5:].isdigit())


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def save(
    folder: Path, step: int, networks: Mapping[str, nn.Module], optimizers: Mapping[str, Any], state: Mapping[str, Any], keep: int
) -> Path:
    """Write checkpoint `step`, then delete all but the newest `keep`. `state` is JSON."""
    path = path_of(folder, step)
    with folder_atomic(path) as temporary:
        for name, network in networks.items():
            # bytes first: a full disk is then an OSError, which safetensors and torch would hide
            weights = {key: value.contiguous() for key, value in network.state_dict().items()}
            (temporary / f"{name}.safetensors").write_bytes(to_bytes(weights))
        buffer = io.BytesIO()
        torch.save({name: optimizer.state_dict() for name, optimizer in optimizers.items()}, buffer)
        (temporary / "optimizers.pt").write_bytes(buffer.getbuffer())
        sums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / "state.json").write_text(json.dumps({"step": step, "sha256": sums, "state": state}))
    for old in steps(folder)[:-keep]:
        remove_folder(path_of(folder, old))
    return path


def load(folder: Path, step: int, networks: Mapping[str, nn.Module], optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """Fill networks and optimizers from checkpoint `step` and return its state; every file is verified first."""
    path = path_of(folder, step)
    try:
        stored = json.loads((path / "state.json").read_text())
        sums, state = dict(stored["sha256"]), dict(stored["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistillError(f"{path / 'state.json'}: corrupt", f"delete {path} to resume from an older checkpoint") from error
    for name in [*(f"{network}.safetensors" for network in networks), "optimizers.pt"]:
        if not (path / name).is_file() or sha256(path / name) != sums.get(name):
            raise DistillError(f"{path / name}: corrupt or missing", f"delete {path} to resume from an older checkpoint")
    for name, network in networks.items():
        network.load_state_dict(load_file(path / f"{name}.safetensors"))
    saved = torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True)
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(saved[name])
    return state

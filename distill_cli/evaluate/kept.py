"""What a network sees of many pictures: computed in shards that are kept, shared by processes, and continued after a kill."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill_cli import launch, processes, shards
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import DistillError
from distill_cli.evaluate.networks import Network
from distill_cli.evaluate.sources import Source
from distill_cli.files import is_empty, remove_temporaries
from distill_cli.tensors import Tensors

SHARD = 500
"""Pictures whose features are one file, which is the unit of work."""


@dataclass
class Seen:
    """Features (N, D) float32 of pictures; logits (N, K) of networks that classify; labels (N,) of pictures that have any."""

    features: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, which: Tensor) -> Seen:
        return Seen(self.features[which], *(None if each is None else each[which] for each in (self.logits, self.labels)))


def _folder(source: Source, network: Network, job: Path) -> Path:
    """Where the features are kept: beside the pictures, or in the folder of the evaluation, also where a path is no UTF-8."""
    place = source.place
    named = place is not None and os.fsencode(place).decode(errors="replace") == str(place)
    if place is None or not named or not os.access(place if place.exists() else place.parent, os.W_OK):
        place = job / "features" / source.digest(range(len(source)))[:16]
    return place / f"{network.name}-{network.digest[:16]}"


def seen(network: Network, source: Source, job: Path, where: torch.device) -> Seen:
    """What `network` sees of all pictures of a source. Processes share the work, and all return the whole.

    A shard's file has its own checksum, the digest of the network, and the digest of the pictures: names, sizes and times of files. A shard
    that is damaged, or whose pictures or network have changed, is computed anew. `job`: the folder of the evaluation.
    """
    folder = _folder(source, network, job)
    parts = [range(first, min(len(source), first + SHARD)) for first in range(0, len(source), SHARD)]
    files = [folder / f"{part.start:06d}.safetensors" for part in parts]
    if not is_empty(folder):
        remove_temporaries(folder)
    mine = [k for k in processes.mine(len(parts)) if not _known(files[k], network, source, parts[k])]
    progress = launch.Progress(sum(len(parts[k]) for k in mine), f"features by {network.name}", "images")
    with launch.stoppable() as stop:
        for k in mine:
            if stop.requested:
                break
            shards.write(
                files[k], compute(network, source, parts[k], where), {"network": network.digest, "pictures": source.digest(parts[k])}
            )
            progress.add(len(parts[k]))
    progress.close()
    if number := max(launch.all_of([stop.requested], where)):  # waits for all processes
        raise stop.interrupted(number, "stopped while features were computed", "the same command computes what is missing")
    stored = [Tensors(file) for file in files]
    whole = {name: torch.empty(len(source), *shape[1:]) for name, shape in stored[0].shapes.items()}
    for part, each in zip(parts, stored, strict=True):
        for name, values in whole.items():
            values[part.start : part.stop] = each.read(name)
    return Seen(whole["features"], whole.get("logits"), source.labels)


def _known(path: Path, network: Network, source: Source, part: range) -> bool:
    """Whether a shard is there, whole, and of these pictures and this network."""
    if not path.exists():
        return False
    try:
        metadata, shapes = shards.check(path, "")
    except DistillError:
        return False
    same = metadata.get("network") == network.digest and metadata.get("pictures") == source.digest(part)
    return same and shapes.get("features") == (len(part), network.width)


def compute(network: Network, source: Source, part: range, where: torch.device) -> dict[str, Tensor]:
    """What a network gives for pictures `part`, float32 on the CPU. Raises DistillError for what is not finite."""
    batches = [part[first : first + network.batch] for first in range(0, len(part), network.batch)]
    found = [{name: values.float().cpu() for name, values in network(sent(source.batch(each), where)).items()} for each in batches]
    tensors = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    if not all(values.isfinite().all() for values in tensors.values()):
        raise DistillError(f"features {network.name}: not finite numbers for {source.about}", "are these the weights of the network?")
    return tensors

"""Embeddings of prompts on disk: shards are computed when they are first needed, equal prompts once.

    FOLDER/text-KEY/shard-000000.safetensors      text (N, L, D) of the next N prompts that differ, and other parts of their condition

KEY is a hash of the text encoders, the prompts and the negative prompt. The process that first needs a shard makes all of it, so
its bytes do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from distill_cli import processes, shards
from distill_cli.data.prompts import digest_of
from distill_cli.diffusion.condition import Condition
from distill_cli.errors import DistillError
from distill_cli.launch import Stop
from distill_cli.models.parts import plain
from distill_cli.tensors import content_of
from distill_cli.verified import Check, Verified

SHARD, AT_A_TIME = 512, 64
AGAIN = "delete it and run the same command again: only missing embeddings are made"
NAMES = {"encoder_hidden_states": "text"}
"""Parts of a condition that have another name in a shard."""


def unique(prompts: Any) -> tuple[np.ndarray, np.ndarray]:
    """For each prompt the number of its text among the unique ones (N,), and the first position of each unique text (U,)."""
    halves = np.empty((len(prompts), 2), dtype=np.uint64)
    for k, text in enumerate(prompts):
        halves[k] = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype=np.uint64)
    _, first, row = np.unique(halves, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[row.reshape(-1)].astype(np.int32), first[order]


class Encoder(Protocol):
    """The interface of a text encoder: PromptConditioner has it."""

    prompts: Sequence[str]
    negative: str | None
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of each part of a prompt's condition."""
    asks: str
    """How the encoders are asked about a prompt; '' where that is in their weights."""

    def parts(self) -> dict[str, Any]:
        """The text encoders, by their names in a pipeline."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of prompts (B), float32."""

    def without(self) -> Condition:
        """The condition of the negative prompt, float32."""


class Embeddings:
    """Conditions of a conditioner's prompts, by their position, stored in `folder` as `dtype`. `null`: that of the negative prompt."""

    def __init__(self, conditioner: Encoder, folder: Path, dtype: str) -> None:
        self.conditioner, self.dtype = conditioner, shards.DTYPES[dtype]
        self.rows, self.firsts = unique(conditioner.prompts)
        self.names = {part: NAMES.get(part, part) for part in conditioner.shapes}
        lengths = [shape[0] for shape in conditioner.shapes.values() if len(shape) > 1]
        encoders = map(encoder_hash, conditioner.parts().values())
        settings = [*encoders, digest_of(conditioner.prompts), conditioner.negative, *lengths, dtype]
        settings += [conditioner.asks] if conditioner.asks else []
        self.key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        self.folder = Path(folder) / f"text-{self.key[:12]}"
        self.verified = Verified(folder)
        if self.null_path.exists():  # the same bits with any number of threads
            shards.check(self.null_path, AGAIN)
            with safe_open(self.null_path, "pt") as stored:
                self.null = Condition({part: stored.get_tensor(name).float() for part, name in self.names.items()})
        else:
            self.null = conditioner.without().map(lambda part: part.to(self.dtype).float().cpu())
        self._open: dict[int, dict[str, Any]] = {}

    @property
    def shards(self) -> int:
        return -(-len(self.firsts) // SHARD)

    @property
    def null_path(self) -> Path:
        """The null prompt's embedding, as the process has it that made the first shard."""
        return self.folder / "null.safetensors"

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.safetensors"

    def _check(self, path: Path) -> Check:
        return Check(path, "", partial(shards.check, path, AGAIN))

    def make(self, shard: int) -> None:
        """Write a shard that is missing."""
        if self.path(shard).exists():
            return
        texts = [self.conditioner.prompts[int(k)] for k in self.firsts[shard * SHARD : (shard + 1) * SHARD]]
        parts = [self.conditioner.encode(texts[k : k + AT_A_TIME]).to("cpu") for k in range(0, len(texts), AT_A_TIME)]
        self._write(self.path(shard), Condition.cat(parts))  # in float32: autocast joins no float16
        if shard == 0:
            self._write(self.null_path, self.null)

    def _write(self, path: Path, condition: Condition) -> None:
        parts = condition.parts.items()
        shards.write(path, {self.names[part]: value.to(self.dtype) for part, value in parts}, {"key": self.key})

    def complete(self, device: torch.device, stop: Stop | None = None) -> None:
        """Make missing shards on `device` until a signal comes; processes share the work. Afterwards the encoders are on the CPU."""
        mine = processes.mine(self.shards)
        paths = [self.path(shard) for shard in mine if self.path(shard).exists()]
        for error in self.verified.verify(map(self._check, paths)):
            raise error
        encoders = self.conditioner.parts().values()
        for encoder in encoders:
            encoder.to(device)
        for shard in mine:
            if stop is not None and stop.requested:
                break
            self.make(shard)
        for encoder in encoders:
            encoder.to("cpu")

    def _shard(self, shard: int) -> dict[str, Any]:
        if shard not in self._open:
            self.make(shard)
            known = self.verified.knows(self._check(self.path(shard)))
            metadata, shapes = shards.check(self.path(shard), AGAIN, whole=not known)
            count = min(SHARD, len(self.firsts) - shard * SHARD)
            wanted = {self.names[part]: (count, *shape) for part, shape in self.conditioner.shapes.items()}
            if metadata.get("key") != self.key or shapes != wanted:
                raise DistillError(f"{self.path(shard)}: of other prompts or another text encoder", AGAIN)
            stored = safe_open(self.path(shard), "pt")
            self._open[shard] = {part: stored.get_slice(name) for part, name in self.names.items()}
        return self._open[shard]

    def __call__(self, labels: Tensor) -> Condition:
        """The conditions of labels (B,), float32, on their device."""
        rows = self.rows[labels.cpu().numpy()].tolist()
        if not rows:
            return self.null[:0].to(labels.device)
        files = {row: self._shard(row // SHARD) for row in dict.fromkeys(rows)}

        def read(part: str) -> Tensor:
            found = {row: file[part][row % SHARD].float() for row, file in files.items()}
            return torch.stack([found[row] for row in rows])

        return Condition({part: read(part) for part in self.names}).to(labels.device)


def encoder_hash(encoder: Any) -> str:
    """SHA-256 of a text encoder's weights."""
    digest = hashlib.sha256()
    for name, value in sorted((plain(name), value) for name, value in encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(content_of(value))
    return digest.hexdigest()

"""Embeddings of prompts on disk: shards are computed when they are first needed, equal prompts once.

    FOLDER/text-KEY/shard-000000.safetensors      text (N, L, D) of the next N prompts that differ

KEY is a hash of the text encoder, the prompts and the negative prompt. The process that first needs a shard makes all of it, so
its bytes do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from distill_cli import processes, shards
from distill_cli.data.prompts import digest_of
from distill_cli.errors import DistillError
from distill_cli.launch import Stop
from distill_cli.models.parts import plain
from distill_cli.tensors import content_of
from distill_cli.verified import Check, Verified

SHARD, AT_A_TIME = 512, 64
AGAIN = "delete it and run the same command again: only missing embeddings are made"


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
    negative: str
    length: int
    encoder: Any

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D), float32."""


class Embeddings:
    """Embeddings (L, D) of a conditioner's prompts, by their position, stored in `folder` as `dtype`."""

    def __init__(self, conditioner: Encoder, folder: Path, dtype: str) -> None:
        self.conditioner, self.dtype = conditioner, shards.DTYPES[dtype]
        self.rows, self.firsts = unique(conditioner.prompts)
        settings = [encoder_hash(conditioner), digest_of(conditioner.prompts), conditioner.negative, conditioner.length, dtype]
        self.key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        self.folder = Path(folder) / f"text-{self.key[:12]}"
        self.verified = Verified(folder)
        if self.null_path.exists():  # the same bits with any number of threads
            shards.check(self.null_path, AGAIN)
            with safe_open(self.null_path, "pt") as stored:
                self.null = stored.get_tensor("text")[0].float()
        else:
            self.null = conditioner.encode([conditioner.negative])[0].to(self.dtype).float().cpu()
        self._open: dict[int, Any] = {}

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
        parts = [self.conditioner.encode(texts[k : k + AT_A_TIME]).cpu() for k in range(0, len(texts), AT_A_TIME)]
        shards.write(self.path(shard), {"text": torch.cat(parts).to(self.dtype)}, {"key": self.key})  # autocast joins no float16
        if shard == 0:
            shards.write(self.null_path, {"text": self.null[None].to(self.dtype)}, {"key": self.key})

    def complete(self, device: torch.device, stop: Stop | None = None) -> None:
        """Make missing shards on `device` until a signal comes; processes share the work. Afterwards the encoder is on the CPU."""
        mine = processes.mine(self.shards)
        paths = [self.path(shard) for shard in mine if self.path(shard).exists()]
        for error in self.verified.verify(map(self._check, paths)):
            raise error
        self.conditioner.encoder.to(device)
        for shard in mine:
            if stop is not None and stop.requested:
                break
            self.make(shard)
        self.conditioner.encoder.to("cpu")

    def _shard(self, shard: int) -> Any:
        if shard not in self._open:
            self.make(shard)
            known = self.verified.knows(self._check(self.path(shard)))
            metadata, shapes = shards.check(self.path(shard), AGAIN, whole=not known)
            count = min(SHARD, len(self.firsts) - shard * SHARD)
            if metadata.get("key") != self.key or shapes != {"text": (count, *self.null.shape)}:
                raise DistillError(f"{self.path(shard)}: of other prompts or another text encoder", AGAIN)
            self._open[shard] = safe_open(self.path(shard), "pt").get_slice("text")
        return self._open[shard]

    def __call__(self, labels: Tensor) -> Tensor:
        """(B, L, D) float32 on the device of the labels (B,)."""
        rows = self.rows[labels.cpu().numpy()].tolist()
        if not rows:
            return self.null.new_empty((0, *self.null.shape)).to(labels.device)
        found = {row: self._shard(row // SHARD)[row % SHARD].float() for row in dict.fromkeys(rows)}
        return torch.stack([found[row] for row in rows]).to(labels.device)


def encoder_hash(conditioner: Encoder) -> str:
    """SHA-256 of the text encoder's weights."""
    digest = hashlib.sha256()
    for name, value in sorted((plain(name), value) for name, value in conditioner.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(content_of(value))
    return digest.hexdigest()

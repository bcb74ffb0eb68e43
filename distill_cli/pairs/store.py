"""A folder of noise-image pairs in shards of fixed size.

    manifest.json                settings of the job: the teacher's weights hash, solver, steps, guidance, seed, shapes, dtype
    shard-000000.safetensors     x0 (N, C, H, W), label (N,); the header holds the pairs' range and two checksums
    prompts.jsonl                text-to-image: the prompts; a label is the position of a prompt
    text-KEY/                    text-to-image: embeddings of the prompts (models/embeddings.py)
    verified-0.json              shards that were verified, with size and modification time (verified.py)

Noise is not stored: pair i has the noise of (seed, i), see diffusion/noise.py. A shard's header holds the SHA-256 of
the whole file (computed with that field zeroed, so that every flipped bit shows) and the SHA-256 of its float32 noise.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor

from distill_cli import processes, shards
from distill_cli.data.prompts import PromptFile
from distill_cli.diffusion.guidance import scales
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.files import open_plain, read_plain, remove_temporaries, unsealed, write_atomic, write_atomic_lines
from distill_cli.models.model import Sampling
from distill_cli.runs import differences, settle
from distill_cli.verified import Check, Verified

LATER = ("guidance_calls", "prompts", "negative_prompt", "guidance_range", "guides", "compile", "channels_last")
"""Settings that older stores lack. They are left out at their default values, so that the hash of such a store stays the same."""
MANIFEST, PROMPTS = "manifest.json", "prompts.jsonl"
OURS = r"shard-\d+\.safetensors|prompts\.jsonl|text-\w+|verified-\d+\.json"
"""Names of files in a store beside its manifest; each shard carries the hash of its manifest."""


class Manifest(BaseModel):
    """The settings that determine the pairs of a store: stores with equal manifests hold equal pairs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    teacher: str
    teacher_hash: str
    solver: str
    steps: int
    guidance_scale: float
    precision: str
    seed: int
    num: int
    classes: list[int]
    shape: tuple[int, int, int]
    dtype: Literal["float32", "float16"]
    shard_size: int
    batch_size: int
    guidance_calls: Literal[0, 1, 2] = 1
    prompts: str = ""
    """SHA-256 of the prompts in prompts.jsonl; labels are positions in it."""
    negative_prompt: str | None = ""
    guidance_range: tuple[float, float] | None = None
    """Each pair has a guidance scale of its own, from this range; `guidance_scale` is then the one that students take by default."""
    guides: dict[str, str | float] = {}
    """What led the teacher besides its condition: digests and scales, by the options that gave them."""
    compile: str = "none"
    channels_last: bool = False

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.num // self.shard_size)

    def range(self, shard: int) -> range:
        """The pairs of a shard."""
        return range(shard * self.shard_size, min(self.num, (shard + 1) * self.shard_size))

    @property
    def sampling(self) -> Sampling:
        """How the teacher was sampled."""
        scale, calls = self.guidance_scale, self.guidance_calls
        return Sampling(solver=self.solver, steps=self.steps, guidance_scale=scale, guidance_calls=calls)

    @property
    def settings_hash(self) -> str:
        """The hash of the settings, which every shard carries."""
        return hashlib.sha256(self.model_dump_json(exclude=self._unsaid()).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """The content of manifest.json."""
        return self.model_dump(mode="json", exclude=self._unsaid())

    def _unsaid(self) -> set[str]:
        return {name for name in LATER if getattr(self, name) == type(self).model_fields[name].default}


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{shard:06d}.safetensors"


def noise_of(manifest: Manifest, indices: Sequence[int]) -> Tensor:
    """The noise (B, C, H, W), float32, of the pairs `indices`."""
    return Draws(manifest.seed, indices).normal("prior", manifest.shape)


def noise_checksum(noise: Tensor) -> str:
    """SHA-256 of noise (B, C, H, W) in float32."""
    return hashlib.sha256(noise.contiguous().numpy().tobytes()).hexdigest()


def scales_of(manifest: Manifest, indices: Sequence[int]) -> Tensor:
    """(B,) float32 guidance scales of the pairs `indices`."""
    if manifest.guidance_range is None:
        return torch.full((len(indices),), manifest.guidance_scale)
    return scales(manifest.guidance_range, Draws(manifest.seed, indices))


def keep_prompts(folder: Path, prompts: Sequence[str]) -> None:
    """Write the prompts of a job into its store, unless they are there."""
    path = folder / PROMPTS
    if not path.exists():
        write_atomic_lines(path, (json.dumps({"prompt": text}) + "\n" for text in prompts))


def write_shard(folder: Path, manifest: Manifest, shard: int, x0: Tensor, label: Tensor) -> None:
    """Write one shard, complete or absent: x0 (N, C, H, W) and label (N,) of all pairs in `manifest.range(shard)`."""
    indices = manifest.range(shard)
    if len(x0) != len(indices) or not torch.isfinite(x0).all():
        raise DistillError(f"{shard_path(folder, shard).name}: the teacher's images are not finite, or too few", "try --precision no")
    pairs, checksum = f"{indices.start}-{indices.stop - 1}", noise_checksum(noise_of(manifest, indices))
    metadata = {"pairs": pairs, "settings": manifest.settings_hash, "noise_sha256": checksum}
    tensors = {"x0": x0.to(shards.DTYPES[manifest.dtype]).contiguous(), "label": label.to(torch.int32)}
    if manifest.guidance_range:
        tensors["guidance"] = scales_of(manifest, indices)
    shards.write(shard_path(folder, shard), tensors, metadata)


def check_shard(folder: Path, manifest: Manifest, shard: int, noise: bool = True, whole: bool = True) -> None:
    """Raise DistillError if a shard is missing, corrupt (tested if `whole`), from another job, or made from other noise."""
    path = shard_path(folder, shard)
    again = "delete it and run distill pairs again: only missing shards are made"
    metadata, shapes = shards.check(path, again, whole)
    indices = manifest.range(shard)
    if metadata["settings"] != manifest.settings_hash or metadata["pairs"] != f"{indices.start}-{indices.stop - 1}":
        raise DistillError(f"{path}: belongs to another store than {folder / MANIFEST}", again)
    told = {"guidance": (len(indices),)} if manifest.guidance_range else {}
    if shapes != {"x0": (len(indices), *manifest.shape), "label": (len(indices),), **told}:
        raise DistillError(f"{path}: wrong shapes", again)
    if noise and noise_checksum(noise_of(manifest, indices)) != metadata["noise_sha256"]:
        other = f"{path}: (seed, i) gives other noise here than when the pairs were made"
        raise DistillError(other, "numpy's generator has changed: make the pairs again")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store; raises UsageError for a folder without one, DistillError for a damaged one."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate(unsealed(read_plain(path)))
    except FileNotFoundError as error:
        raise UsageError(f"--pairs {folder}: no pairs: it has no {MANIFEST}", "distill pairs --out FOLDER makes some") from error
    except ValidationError as error:  # undamaged: written by a later version, or by something else
        wrong = error.errors()[0]
        raise DistillError(f"{path}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg'].lower()}", "is it of another version?") from error
    except ValueError as error:
        hint = "delete it and run the same distill pairs command: shards that are complete are kept"
        raise DistillError(f"{path}: corrupt: {error}", hint) from error


class PairStore:
    """A map-style dataset: pair i is {noise, x0, label}. Shards are memory-mapped, and verified on first use unless they were before.

    `run` is the folder that keeps the record of verified shards if the store is read-only.
    """

    def __init__(self, folder: Path, run: Path | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.verified = Verified(self.folder, run)
        self._open: dict[int, Any] = {}
        there = {entry.name for entry in os.scandir(self.folder)}
        missing = [s for s in range(self.manifest.shards) if shard_path(self.folder, s).name not in there]
        if missing:
            gone = f"{shard_path(self.folder, missing[0])}: missing ({len(missing)} of {self.manifest.shards} shards are)"
            raise DistillError(gone, "run distill pairs again: only missing shards are made")

    @property
    def about(self) -> str:
        """A short description of the store, for a job's first line."""
        count = self.manifest.shards
        return f"{len(self)} pairs of {self.manifest.teacher} in {count} shard{'s' * (count > 1)}"

    def __len__(self) -> int:
        return self.manifest.num

    def prompts(self) -> Sequence[str]:
        """The prompts of a text-to-image store, in which labels are positions; () for other stores."""
        return self.prompts_in(self.folder, self.manifest) if self.manifest.prompts else ()

    @staticmethod
    def prompts_in(folder: Path, manifest: Manifest) -> PromptFile:
        """The prompts beside shards, verified."""
        again = "run distill pairs again after deleting it"
        try:
            with open_plain(folder / PROMPTS):
                found = PromptFile(folder / PROMPTS, own=True)
        except FileNotFoundError as error:
            raise DistillError(f"{folder / PROMPTS}: missing", "run distill pairs again") from error
        except DistillError as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise DistillError(f"{folder / PROMPTS}: corrupt", again) from error
        if found.digest != manifest.prompts:
            raise DistillError(f"{folder / PROMPTS}: corrupt: not the prompts of these pairs", again)
        return found

    def verify(self) -> None:
        """Verify this process's share of what is not yet verified: shards, the first shard's noise, and embeddings."""
        every = checks(self.folder, self.manifest, range(self.manifest.shards)) + text_checks(self.folder)
        for error in self.verified.verify(every[k] for k in processes.mine(len(every))):
            raise error

    def _shard(self, shard: int) -> Any:
        if shard not in self._open:
            check = checks(self.folder, self.manifest, [shard])[0]
            if self.verified.knows(check):
                check_shard(self.folder, self.manifest, shard, noise=False, whole=False)
            else:
                check.run()
            handle = safe_open(shard_path(self.folder, shard), "pt")
            span = self.manifest.range(shard)
            told = handle.get_tensor("guidance") if self.manifest.guidance_range else scales_of(self.manifest, span)
            self._open[shard] = (handle.get_slice("x0"), handle.get_tensor("label"), told)
        return self._open[shard]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {key: value[0] for key, value in self.batch([index]).items()}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """noise, x0 (B, C, H, W) float32, label (B,) int64 and guidance scale (B,) float32 of the pairs `indices`."""
        x0, labels, told = [], [], []
        for index in indices:
            images, label, guidance = self._shard(index // self.manifest.shard_size)
            row = index % self.manifest.shard_size
            x0.append(images[row : row + 1].float())  # before joining: autocast cannot join float16 on the CPU
            labels.append(label[row])
            told.append(guidance[row])
        made = {"noise": noise_of(self.manifest, indices), "x0": torch.cat(x0)}
        return {**made, "label": torch.stack(labels).long(), "guidance": torch.stack(told)}


def merge(folders: Sequence[Path], out: Path) -> dict[str, int]:
    """Copy the shards of stores with equal manifests (parts of one job) into `out`, verifying each; existing shards are kept.

    Returns the number of `shards` in `out`, the total number (`of`), and the number `copied`.
    """
    manifests = {folder: read_manifest(folder) for folder in folders}
    manifest = manifests[folders[0]]
    for folder, other in manifests.items():
        if other != manifest:
            apart = "; ".join(differences(manifest.model_dump(mode="json"), other.model_dump(mode="json"), ""))
            raise UsageError(f"--merge {folder}: pairs of another job than {folders[0]}, whose {apart}", "merge parts of one job")
    settle(out / MANIFEST, manifest.settings(), "pairs", OURS)
    remove_temporaries(out)
    copied = 0
    for folder in folders:
        for shard in range(manifest.shards):
            if shard_path(folder, shard).exists() and not shard_path(out, shard).exists():
                check_shard(folder, manifest, shard)
                write_atomic(shard_path(out, shard), shard_path(folder, shard).read_bytes())
                copied += 1
        if manifest.prompts and not (out / PROMPTS).exists():
            keep_prompts(out, PairStore.prompts_in(folder, manifest))
        for path in sorted(folder.glob("text-*/*.safetensors")):  # missing ones are made when needed
            target = out / path.relative_to(folder)
            if not target.exists():
                shards.check(path, "delete it: it is made again when it is asked for")
                write_atomic(target, path.read_bytes())
    there = sum(shard_path(out, shard).exists() for shard in range(manifest.shards))
    return {"shards": there, "of": manifest.shards, "copied": copied}


def checks(folder: Path, manifest: Manifest, which: Iterable[int], noise: bool = False) -> list[Check]:
    """A check for each shard. Without `noise` only the first shard's noise is compared: it depends on numpy, not on the disk."""

    def of(shard: int) -> Check:
        what = manifest.settings_hash[:16] + f" numpy {np.__version__}" * (shard == 0)
        return Check(shard_path(folder, shard), what, partial(check_shard, folder, manifest, shard, noise=noise or shard == 0))

    return [of(shard) for shard in which]


def text_checks(folder: Path) -> list[Check]:
    """A check for each file of embeddings in a store."""
    again = "delete it: it is made again when it is asked for"
    return [Check(path, "", partial(shards.check, path, again)) for path in sorted(folder.glob("text-*/*.safetensors"))]


def check_all(folder: Path, manifest: Manifest) -> list[DistillError]:
    """Verify every shard with its noise, the prompts and embeddings, even if verified before, and record it; returns all errors."""
    every = checks(folder, manifest, range(manifest.shards), noise=True) + text_checks(folder)
    wrong = Verified(folder).verify(every, anew=True)
    try:
        if manifest.prompts:
            PairStore.prompts_in(folder, manifest)
    except DistillError as error:
        wrong.append(error)
    return wrong

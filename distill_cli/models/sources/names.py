"""Names of models with LoRAs: BASE+FILE[@WEIGHT], and further +FILE[@WEIGHT]."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from distill_cli.errors import UsageError


class LoRA(NamedTuple):
    """A LoRA in a model's name: a file, or a folder with pytorch_lora_weights.safetensors, and its weight."""

    path: Path
    weight: float


def _pieces(name: str) -> list[str]:
    """The name, cut at each +, except inside a path that exists."""
    cut, out = name.split("+"), list[str]()
    while cut:
        take = next((k for k in range(len(cut), 1, -1) if Path(_read("+".join(cut[:k]))[0]).exists()), 1)
        out.append("+".join(cut[:take]))
        cut = cut[take:]
    return out


def _read(piece: str) -> tuple[str, str]:
    """The path in FILE[@WEIGHT], and the weight's text, '' without one. A path with @ that exists is a path."""
    path, at, weight = piece.rpartition("@")
    return (piece, "") if not at or "/" in weight or Path(piece).exists() else (path, weight)


def split(name: str) -> tuple[str, tuple[LoRA, ...]]:
    """The base of a model's name, and the LoRAs on it. Raises UsageError for a weight that is no number, or 0."""
    base, *files = _pieces(name)
    loras = []
    if files and not base:
        raise UsageError(f"{name}: a + without a base before it", "a model with LoRAs is named BASE+FILE@WEIGHT")
    for piece in files:
        path, text = _read(piece)
        try:
            weight = float(text or 1)
        except ValueError:
            weight = math.nan
        if not path or not math.isfinite(weight) or weight == 0:
            what = f"@{text} is no weight other than 0" if path else "a + without a file behind it"
            raise UsageError(f"{name}: {what}", "a model with LoRAs is named BASE+FILE@WEIGHT, such as sd15+style.safetensors@0.8")
        loras.append(LoRA(Path(path).expanduser(), weight))
    return base, tuple(loras)


def base_of(name: str) -> str:
    """The base of a model's name."""
    return split(name)[0]


def absolute(name: str, known: Collection[str]) -> str:
    """The name with absolute paths, where there are files and folders: for another working directory. `known` names are no paths."""
    base, loras = split(name)
    place = str(Path(base).resolve()) if base not in known and Path(base).exists() else base
    return "+".join([place, *(f"{path.resolve()}{'' if weight == 1 else f'@{weight!r}'}" for path, weight in loras)])

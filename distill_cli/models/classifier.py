"""A small image classifier, in whose features `distill evaluate` measures: a folder with config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from distill_cli.errors import DistillError, UsageError, nearest, printable
from distill_cli.files import folder_atomic, unreadable
from distill_cli.models.parts import check_file
from distill_cli.processes import say_hidden
from distill_cli.tensors import Tensors

BUILTIN = Path(__file__).parent / "builtin"
SUFFIX = "-classifier"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
ClassifierT = TypeVar("ClassifierT", bound="Classifier")


@dataclass(frozen=True)
class ClassifierInfo:
    """What config.json says: image shape (C, H, W), class names, width, training set, accuracy on held-out images."""

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    width: int
    data: str
    accuracy: float | None = None


class Classifier(nn.Module):
    """Convolutions down to at most 4 pixels a side; the features are the mean over these pixels."""

    def __init__(self, info: ClassifierInfo) -> None:
        super().__init__()
        self.info = info
        width = info.width
        layers: list[nn.Module] = [nn.Conv2d(info.shape[0], width, 3, padding=1), nn.SiLU()]
        size = min(info.shape[1:])
        while True:
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            if size <= 4:
                break
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            size //= 2
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, len(info.classes))

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, width)."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> logits (B, classes)."""
        return self.head(self.features(images))

    @torch.no_grad()
    def measure(self, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Features (N, width) float64 and predicted labels (N,) of images on the CPU, a part at a time."""
        where = next(self.parameters()).device
        features = torch.cat([self.features(part.to(where)) for part in images.split(batch_size)])
        return features.double().cpu(), self.head(features).argmax(1).cpu()

    def with_accuracy(self, accuracy: float) -> Classifier:
        self.info = replace(self.info, accuracy=accuracy)
        return self

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the folder, complete or absent."""
        with folder_atomic(Path(folder)) as temporary:
            weights = {name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}
            (temporary / WEIGHTS).write_bytes(to_bytes(weights))
            (temporary / CONFIG).write_text(json.dumps(asdict(self.info), indent=2) + "\n")


def folders() -> list[str]:
    """The built-in classifiers of every kind."""
    return sorted(path.name.removesuffix(SUFFIX) for path in BUILTIN.glob(f"*{SUFFIX}"))


def names() -> list[str]:
    """The built-in classifiers of clean pictures."""
    return [name for name in folders() if not name.endswith("-noisy")]


def load(name: str) -> Classifier:
    """A built-in classifier, by the name of its set, or the one in a folder or run. Float32, frozen, on the CPU."""

    def made(stored: dict[str, Any]) -> Classifier:
        if "schedule" in stored:
            raise UsageError(
                f"--classifier {name}: a classifier of noised pictures, for --classifier-guidance", nearest(name, names(), "built in")
            )
        return Classifier(ClassifierInfo(**stored))

    return read(place(name, "--classifier", names(), names()), made)


def place(name: str, flag: str, known: Sequence[str], offered: Sequence[str]) -> Path:
    """The folder of a classifier: one of the `known` built-in ones, a folder, or a run. Raises UsageError, with names `offered`."""
    folder = BUILTIN / f"{name}{SUFFIX}" if name in known else Path(name)
    if name in known:
        say_hidden(flag[2:].replace("-", " "), name, "the built-in one")
    if (folder / "classifier" / CONFIG).is_file():
        folder = folder / "classifier"
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{flag} {name}: no classifier", nearest(name, offered, "built in"))
    return folder


def read(folder: Path, make: Callable[[dict[str, Any]], ClassifierT]) -> ClassifierT:
    """The classifier in a folder, which `make` makes of the content of its config.json. Float32, frozen, on the CPU."""
    for name in (CONFIG, WEIGHTS):
        check_file(folder / name)
    try:
        stored = json.loads((folder / CONFIG).read_text())
        shown = {"classes": tuple(map(printable, stored["classes"])), "data": printable(stored["data"])}
        network = make({**stored, **shown, "shape": tuple(stored["shape"])})
        file = Tensors(folder / WEIGHTS)
        weights = {name: file.read(name) for name in file.shapes}
        for key, value in weights.items():
            if not value.isfinite().all():
                raise DistillError(f"{folder / WEIGHTS}: {printable(key)} holds what is no number", "is the file sound?")
        network.load_state_dict(weights)
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from error
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DistillError(f"{folder}: no readable classifier ({' '.join(str(error).split())[:200]})", "is the folder complete?") from error
    return network.eval().requires_grad_(False)

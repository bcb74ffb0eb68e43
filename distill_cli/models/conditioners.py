"""Conditioners: between the labels of a job's images and what the denoiser is told."""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill_cli.data.prompts import chosen, digest_of, in_turn
from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.errors import UsageError
from distill_cli.launch import Stop
from distill_cli.models.embeddings import Embeddings


class Conditioner(ABC):
    """What a model is told of an image, by the image's label: a class, or the position of a prompt.

    What a kind of condition does not know has an answer here that changes nothing, so that nobody asks which kind it is.
    """

    takes: Literal["nothing", "classes", "prompts"]
    classes: tuple[str, ...] = ()
    null_label: int | None = None
    learned: tuple[int, ...] | None = None
    """The labels a student was distilled on, if not all of them."""
    prompts: Sequence[str] = ()
    negative: str = ""
    embedding: int = 0
    """How many numbers the embedding of a prompt has."""

    @property
    @abstractmethod
    def null(self) -> Condition | None:
        """The null condition of one sample; None where the model knows none."""

    @property
    def has_null(self) -> bool:
        """Whether there is a null condition; computes nothing."""
        return self.null is not None

    @property
    @abstractmethod
    def summary(self) -> str:
        """What it takes, in words."""

    @abstractmethod
    def labels(self, count: int, classes: list[int] | None = None, start: int = 0) -> Tensor:
        """(count,) labels in turn, from position `start` of the job. Raises UsageError for classes that the model does not know."""

    @abstractmethod
    def every(self, classes: list[int] | None = None) -> Tensor:
        """(N,) the labels that training draws from, each once."""

    def drawn(self, classes: list[int] | None = None) -> list[int]:
        """The classes that a job has in turn; none of prompts."""
        return []

    def spread(self, count: int, classes: list[int] | None = None) -> Tensor:
        """(count,) labels that differ, of pictures to look at."""
        return self.labels(count, classes)

    @abstractmethod
    def __call__(self, labels: Tensor) -> Condition:
        """What the denoiser is told for labels (B,), on their device."""

    @abstractmethod
    def example(self, count: int, device: str | torch.device) -> Condition:
        """A condition of `count` samples of the right shapes, for trials and timings."""

    def chosen(self, name: str | None, data: str) -> Sequence[str]:
        """The prompts that an option names, by default those of `data`, the set that the model has learned; () for a model without text."""
        return ()

    def given(self, prompts: Sequence[str], negative: str = "", repeat: int = 1, name: str = "the model") -> Conditioner:
        """The conditioner for these prompts, each `repeat` times in turn. Raises UsageError where the model has no text."""
        asked = f"images_per_prompt {repeat}" if repeat > 1 else "--negative-prompt" if negative else "--prompts"
        raise UsageError(f"{asked}: {name} has no text", f"it has {len(self.classes) or 'no'} classes")

    def stored(self, folder: Path | None, dtype: str, count: int | None = None) -> Conditioner:
        """The conditioner with its embeddings on disk, those of the first `count` images' prompts alone; as it is where there are none."""
        return self

    def complete(self, device: torch.device, stop: Stop | None = None) -> None:  # noqa: B027
        """Make the stored embeddings that are missing, of several processes each its share, until a signal comes."""

    def taught(self, learned: Sequence[int] | None = None, null: bool = True) -> Conditioner:
        """That of a student distilled on the labels `learned` alone, with or without the null condition."""
        return self

    def alike(self, labels: Tensor) -> Tensor:
        """(B,) numbers, the same of images that are of one kind."""
        return labels

    def parts(self) -> dict[str, Any]:
        """Its networks, by their names in a pipeline."""
        return {}

    def working(self) -> list[nn.Module]:
        """The networks that it calls while a job runs."""
        return []

    def digests(self) -> dict[str, str]:
        """SHA-256 of what the labels are positions of, by the option that gives it: part of a job's settings."""
        return {}

    def say_cut(self, positions: Iterable[int]) -> None:  # noqa: B027
        """Say how many of the prompts at these positions of a job are longer than the model reads."""

    def named(self, label: int) -> dict[str, Any]:
        """What a list of samples says of an image with this label."""
        return {}

    def captions(self, labels: Sequence[int]) -> list[str] | None:
        """Texts to write below pictures with these labels."""
        return None

    def shown(self) -> dict[str, Any]:
        """What `distill models show` says of it."""
        learned = "all" if self.learned is None else list(self.learned)
        return {"classes": list(self.classes), "null_label": self.null_label, "learned": learned, "text": "none"}


@dataclass(frozen=True)
class ClassConditioner(Conditioner):
    """Labels 0 .. len(classes)-1, and the null label after them where the model knows one; without classes it tells nothing."""

    classes: tuple[str, ...] = ()
    null_label: int | None = None
    learned: tuple[int, ...] | None = None

    @property
    def takes(self) -> Literal["nothing", "classes"]:  # type: ignore[override]
        return "classes" if self.classes else "nothing"

    @property
    def null(self) -> Condition | None:
        return None if self.null_label is None else self(torch.tensor([self.null_label]))

    @property
    def summary(self) -> str:
        return f"{len(self.classes) or 'no'} classes"

    def labels(self, count: int, classes: list[int] | None = None, start: int = 0) -> Tensor:
        """(count,) labels in turn, from position `start` of the job; zeros for a model without classes."""
        known = self.drawn()
        wanted = known if classes is None else classes
        beyond = sorted(set(wanted) - set(known))
        if beyond:
            has = f"has classes 0 to {len(self.classes) - 1}" if self.classes else "has no classes"
            has = has if self.learned is None else f"has learned {', '.join(map(str, self.learned))}"
            raise UsageError(f"--classes: no class {beyond[0]}", f"the model {has}")
        return torch.tensor([wanted[i % len(wanted)] for i in range(start, start + count)])

    def every(self, classes: list[int] | None = None) -> Tensor:
        return self.labels(len(self.drawn(classes)), classes)

    def drawn(self, classes: list[int] | None = None) -> list[int]:
        return list(classes or self.learned or range(max(1, len(self.classes))))

    def __call__(self, labels: Tensor) -> Condition:
        return Condition({"class_labels": labels}) if self.classes else NOTHING

    def example(self, count: int, device: str | torch.device) -> Condition:
        return self(torch.zeros(count, dtype=torch.long, device=device))

    def taught(self, learned: Sequence[int] | None = None, null: bool = True) -> ClassConditioner:
        return replace(self, learned=None if learned is None else tuple(learned), null_label=self.null_label if null else None)

    def named(self, label: int) -> dict[str, Any]:
        return {"label": label, "class": self.classes[label]} if self.classes else {}


class PromptConditioner(Conditioner):
    """Prompts by their position in `prompts`, which is the label of an image; `negative` is the null condition.

    Position i of a job has prompt i // repeat, in turn. Embeddings are computed when asked for, or come from `table`.
    """

    takes: Literal["prompts"] = "prompts"
    has_null = True
    part = "encoder_hidden_states"

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self.length = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
        self.width = int(encoder.config.hidden_size)
        self.embedding = self.length * self.width
        self.repeat = 1
        self.table: Embeddings | None = None
        self._null: Tensor | None = None

    @property
    def summary(self) -> str:
        return "prompts"

    def given(self, prompts: Sequence[str], negative: str = "", repeat: int = 1, name: str = "the model") -> PromptConditioner:
        """The same tokenizer and encoder for these prompts."""
        out = copy.copy(self)
        out.prompts, out.negative, out.repeat, out.table, out._null = prompts, negative, repeat, None, None
        return out

    def chosen(self, name: str | None, data: str) -> Sequence[str]:
        return chosen(name, data)

    def labels(self, count: int, classes: list[int] | None = None, start: int = 0) -> Tensor:
        """(count,) positions of prompts in turn, from position `start` of the job."""
        if classes is not None:
            raise UsageError(f"--classes {classes[0]}: the model has no classes", "it has prompts: --prompts FILE")
        if not self.prompts:
            raise UsageError(
                "the model makes pictures of prompts", "--prompts FILE: a line a prompt, or .jsonl or .csv with a column prompt"
            )
        return torch.arange(start, start + count) // self.repeat % len(self.prompts)

    def every(self, classes: list[int] | None = None) -> Tensor:
        return self.labels(len(self.prompts) or 1, classes)

    def spread(self, count: int, classes: list[int] | None = None) -> Tensor:
        """Prompts that follow one another may be alike: these are taken from the whole list."""
        return self.labels(count, classes) * max(1, len(self.prompts) // count) % len(self.prompts)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) tokens, cut or filled to the encoder's length."""
        made = self.tokenizer(list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        return made.input_ids

    def cut(self, prompts: Iterable[str]) -> int:
        """How many of the prompts are longer than the encoder reads."""
        made = self.tokenizer(list(prompts), truncation=True, max_length=self.length + 1).input_ids
        return sum(len(tokens) > self.length for tokens in made)

    def say_cut(self, positions: Iterable[int]) -> None:
        labels = sorted({position // self.repeat % len(self.prompts) for position in positions})
        parts = (labels[first : first + 1000] for first in range(0, len(labels), 1000))
        cut = sum(self.cut(self.prompts[label] for label in part) for part in parts)
        if cut:
            read = f"the {self.length} tokens that the text encoder reads"
            print(f"{cut} of {len(labels)} prompts are longer than {read}: cut there", file=sys.stderr)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, L, D), float32, on the encoder's device."""
        place = next(self.encoder.parameters()).device
        with torch.autocast(place.type, enabled=False):
            return self.encoder(self.tokens(prompts).to(place))[0].float()

    @property
    def null(self) -> Condition:
        """The embedding of the negative prompt."""
        if self._null is None:
            self._null = self.table.null[None] if self.table is not None else self.encode([self.negative])
        return Condition({self.part: self._null})

    def __call__(self, labels: Tensor) -> Condition:
        """Embeddings (B, L, D) of the prompts at positions (B,), on the device of these; equal prompts are encoded once."""
        if self.table is not None:
            return Condition({self.part: self.table(labels)})
        texts = [self.prompts[position] for position in labels.tolist()]
        unique = list(dict.fromkeys(texts))
        return Condition({self.part: self.encode(unique).to(labels.device)[[unique.index(text) for text in texts]]})

    def example(self, count: int, device: str | torch.device) -> Condition:
        return Condition({self.part: torch.randn(count, self.length, self.width, device=device)})

    def stored(self, folder: Path | None, dtype: str, count: int | None = None) -> PromptConditioner:
        if folder is None:
            return self
        out = copy.copy(self)
        used = self if count is None else self.given(in_turn(self.prompts, count), self.negative)
        out.table, out._null = Embeddings(used, folder, dtype), None
        return out

    def complete(self, device: torch.device, stop: Stop | None = None) -> None:
        """Once they are made the encoder is on the CPU."""
        if self.table is not None:
            self.table.complete(device, stop)

    def alike(self, labels: Tensor) -> Tensor:
        """One prompt hardly comes twice in a batch: all images are of one kind."""
        return torch.zeros_like(labels)

    def parts(self) -> dict[str, Any]:
        return {"text_encoder": self.encoder}

    def working(self) -> list[nn.Module]:
        return [self.encoder] if self.table is None else []

    def digests(self) -> dict[str, str]:
        return {"prompts": digest_of(self.prompts)}

    def named(self, label: int) -> dict[str, Any]:
        return {"prompt": self.prompts[label]}

    def captions(self, labels: Sequence[int]) -> list[str]:
        return [self.prompts[label] for label in labels]

    def shown(self) -> dict[str, Any]:
        return super().shown() | {"text": f"prompts of at most {self.length} tokens"}

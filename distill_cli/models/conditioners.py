"""Conditioners: from the labels of a job's images to the conditions of the denoiser."""

from __future__ import annotations

import copy
import math
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill_cli.data.prompts import chosen, digest_of, in_turn
from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.launch import Stop
from distill_cli.models.embeddings import Embeddings
from distill_cli.models.guides import ModelGuide
from distill_cli.models.live import Live
from distill_cli.models.text import Reader, clip_reader

CUT = 100_000
"""Prompts at most whose tokens are counted, to say how many are truncated: others are passed over evenly."""


class Conditioner(ABC):
    """The condition of an image, by its label. A label is a class, or the position of a prompt.

    Methods that make no sense for a kind of condition change nothing, so callers need not know the kind.
    """

    takes: Literal["nothing", "classes", "prompts"]
    classes: tuple[str, ...] = ()
    null_label: int | None = None
    learned: tuple[int, ...] | None = None
    """The labels a student was distilled on, if not all of them."""
    prompts: Sequence[str] = ()
    negative: str | None = ""
    """The negative prompt; None for zeros in its place."""
    usual: str | None = ""
    """The negative prompt where none is given."""
    embedding: int = 0
    """Numbers in the embedding of a prompt; 0 without text."""
    guides: tuple[ModelGuide, ...] = ()
    """What leads a teacher besides its condition (models/guides.py)."""

    @property
    def null(self) -> Condition | None:
        """The null condition of one sample; None if the model has none."""
        return None if self.null_label is None else self.of(torch.tensor([self.null_label]))

    @property
    def has_null(self) -> bool:
        """Whether there is a null condition, without computing it."""
        return self.null_label is not None

    @property
    def summary(self) -> str:
        """The kind of condition, in words."""
        return f"{len(self.classes) or 'no'} classes"

    @abstractmethod
    def labels(self, count: int, classes: list[int] | None = None, start: int = 0) -> Tensor:
        """(count,) labels in turn, from position `start` of the job. Raises UsageError for classes that the model does not know."""

    def every(self, classes: list[int] | None = None) -> Tensor:
        """(N,) all labels that training draws from, each once."""
        return self.labels(len(self.prompts or self.drawn(classes)) or 1, classes)

    def at_random(self, uniform: Tensor, classes: list[int] | None = None) -> Tensor:
        """(B,) labels that training draws, by uniform numbers (B,) in [0, 1)."""
        labels = self.every(classes)
        return labels[(uniform * len(labels)).long()]

    def drawn(self, classes: list[int] | None = None) -> list[int]:
        """The classes that a job goes through in turn; [] for prompts."""
        return []

    def spread(self, count: int, classes: list[int] | None = None) -> Tensor:
        """(count,) labels for pictures to look at, as different as possible."""
        return self.labels(count, classes)

    def __call__(self, labels: Tensor) -> Condition:
        """The condition of labels (B,), on their device (of live prompts on the text encoders'), with what the guides are told."""
        condition = self.of(labels)
        for guide in self.guides:
            condition = condition.plus(guide.part, guide.told(labels, self.prompts))
        return condition

    @abstractmethod
    def of(self, labels: Tensor) -> Condition:
        """The condition of labels (B,) that the network takes."""

    def example(self, count: int, device: str | torch.device) -> Condition:
        """A condition of `count` samples with the right shapes, for trial calls and timings."""
        return self.of(torch.zeros(count, dtype=torch.long, device=device))

    def chosen(self, name: str | None, data: str) -> Sequence[str]:
        """The prompts that an option names; default: those of the training set `data`. () for a model without text."""
        return ()

    def given(self, prompts: Sequence[str], negative: str | None = None, repeat: int = 1, name: str = "the model") -> Conditioner:
        """The conditioner for these prompts, each `repeat` times in turn. Raises UsageError if the model has no text."""
        asked = f"images_per_prompt {repeat}" if repeat > 1 else "--negative-prompt" if negative is not None else "--prompts"
        raise UsageError(f"{asked}: {name} has no text", f"it has {len(self.classes) or 'no'} classes")

    def sized(self, height: int, width: int) -> Conditioner:
        """The conditioner for pictures of this size in pixels; unchanged if conditions do not say it."""
        return self

    def stored(self, folder: Path | None, dtype: str, count: int | None = None) -> Conditioner:
        """The conditioner with its embeddings on disk, for the first `count` images only; unchanged if it has no embeddings."""
        return self

    def live(self, dtype: str, name: str = "the model") -> Conditioner:
        """The conditioner that encodes prompts while a run trains, rounded to `dtype`. Raises UsageError if the model has no text."""
        raise UsageError(f"text live: {name} has no text", "leave it out")

    def ahead(self, labels: Tensor) -> None:  # noqa: B027
        """Begin to encode the prompts of labels (B,), which are asked for together later; nothing to do unless they are encoded live."""

    def complete(self, device: torch.device, stop: Stop | None = None) -> None:  # noqa: B027
        """Make missing embeddings, until a signal comes; several processes share the work. Text encoders go where they are used next."""

    @abstractmethod
    def guided(self, guides: tuple[ModelGuide, ...]) -> Conditioner:
        """The same conditioner with these guides."""

    def taught(self, learned: Sequence[int] | None = None, null: bool = True) -> Conditioner:
        """The conditioner of a student that was distilled on the labels `learned`, with or without the null condition. It has no guides."""
        return self.guided(()) if self.guides else self

    def parts(self) -> dict[str, Any]:
        """Its networks, by their names in a pipeline."""
        return {}

    def working(self) -> list[nn.Module]:
        """The networks that it calls while a job runs."""
        return []

    def digests(self) -> dict[str, str]:
        """SHA-256 of the list of prompts, by the option that names it: part of a job's settings."""
        return {"prompts": digest_of(self.prompts)} if self.prompts else {}

    def say_cut(self, positions: Iterable[int]) -> None:  # noqa: B027
        """Print how many prompts at these positions of a job are truncated by the model."""

    def named(self, label: int) -> dict[str, Any]:
        """Class or prompt of a label, for samples.jsonl."""
        return {}

    def captions(self, labels: Sequence[int]) -> list[str] | None:
        """Captions of pictures with these labels; None without prompts."""
        return [self.prompts[label] for label in labels] if self.prompts else None

    def shown(self) -> dict[str, Any]:
        """What `distill models show` says of it."""
        learned = "all" if self.learned is None else list(self.learned)
        return {"classes": list(self.classes), "null_label": self.null_label, "learned": learned, "text": "none"}


@dataclass(frozen=True)
class ClassConditioner(Conditioner):
    """Labels 0 .. len(classes)-1, then the null label if the model has one. Without classes the condition is empty."""

    classes: tuple[str, ...] = ()
    null_label: int | None = None
    learned: tuple[int, ...] | None = None
    guides: tuple[ModelGuide, ...] = ()

    @property
    def asked(self) -> tuple[str, ...]:
        """The classes that labels count: its own, or those of a guide where it has none."""
        return self.classes or next((guide.classes for guide in self.guides if guide.classes), ())

    @property
    def takes(self) -> Literal["nothing", "classes"]:  # type: ignore[override]
        return "classes" if self.classes else "nothing"

    def labels(self, count: int, classes: list[int] | None = None, start: int = 0) -> Tensor:
        """(count,) labels in turn, from position `start` of the job; zeros for a model without classes."""
        known = self.drawn()
        wanted = known if classes is None else classes
        beyond = sorted(set(wanted) - set(known))
        if beyond:
            has = f"has classes 0 to {len(self.asked) - 1}" if self.asked else "has no classes"
            has = has if self.learned is None else f"has learned {', '.join(map(str, self.learned))}"
            raise UsageError(f"--classes: no class {beyond[0]}", f"the model {has}")
        return torch.tensor([wanted[i % len(wanted)] for i in range(start, start + count)])

    def drawn(self, classes: list[int] | None = None) -> list[int]:
        return list(classes or self.learned or range(max(1, len(self.asked))))

    def of(self, labels: Tensor) -> Condition:
        return Condition({"class_labels": labels}) if self.classes else NOTHING

    def taught(self, learned: Sequence[int] | None = None, null: bool = True) -> ClassConditioner:
        learned = tuple(learned) if learned is not None and self.classes else None
        return replace(self, learned=learned, null_label=self.null_label if null else None, guides=())

    def guided(self, guides: tuple[ModelGuide, ...]) -> ClassConditioner:
        return replace(self, guides=guides)

    def named(self, label: int) -> dict[str, Any]:
        return {"label": label, "class": self.asked[label]} if self.asked else {}


class PromptConditioner(Conditioner):
    """Prompts by their position in `prompts`, which is the label of an image; `negative` is the null condition.

    Image i of a job has prompt i // repeat, in turn. Embeddings are computed on demand, or come from `table`: from disk, or live.
    """

    takes: Literal["prompts"] = "prompts"
    has_null = True
    summary = "prompts"
    part = "encoder_hidden_states"
    asks = ""
    """How the encoders are asked about a prompt, where that is not in their weights: part of what stored embeddings are of."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        reader = clip_reader(tokenizer, encoder)
        self._reads({"text_encoder": reader}, {self.part: (reader.length, int(encoder.config.hidden_size))})

    def _reads(self, readers: Mapping[str, Reader], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take text encoders, by their names in a pipeline, and the shape of each part of a prompt's condition."""
        self.readers, self.shapes = readers, shapes
        self.embedding = sum(math.prod(shape) for shape in shapes.values())
        self.repeat = 1
        self.table: Embeddings | Live | None = None
        self._null: Condition | None = None

    def given(self, prompts: Sequence[str], negative: str | None = None, repeat: int = 1, name: str = "the model") -> PromptConditioner:
        """The same tokenizer and encoder for these prompts. Without a negative prompt the usual one is taken."""
        out = copy.copy(self)
        out.prompts, out.repeat, out.table, out._null = prompts, repeat, None, None
        out.negative = self.usual if negative is None else negative
        return out

    def chosen(self, name: str | None, data: str) -> Sequence[str]:
        return chosen(name, data)

    def labels(self, count: int, classes: list[int] | None = None, start: int = 0) -> Tensor:
        """(count,) positions of prompts in turn, from position `start` of the job."""
        if classes is not None and not any(guide.classes for guide in self.guides):
            raise UsageError(f"--classes {classes[0]}: the model has no classes", "it has prompts: --prompts FILE")
        if not self.prompts:
            hint = "--prompts FILE: a line a prompt, or .jsonl or .csv with a column prompt"
            raise UsageError("the model makes pictures of prompts", hint)
        return torch.arange(start, start + count) // self.repeat % len(self.prompts)

    def at_random(self, uniform: Tensor, classes: list[int] | None = None) -> Tensor:
        """As for all models, without a list of all labels."""
        return (uniform * len(self.prompts)).long()

    def spread(self, count: int, classes: list[int] | None = None) -> Tensor:
        """Spread over the whole list, because neighbours in a list may be alike."""
        return self.labels(count, classes) * max(1, len(self.prompts) // count) % len(self.prompts)

    @property
    def lengths(self) -> str:
        """The numbers of tokens that its text encoders read, in words."""
        return " and ".join(map(str, sorted({reader.length for reader in self.readers.values()})))

    def cut(self, prompts: Iterable[str]) -> Counter[str]:
        """How many of the prompts are longer than what an encoder reads, by what that is, in words."""
        texts, several = list(prompts), len(self.readers) > 1
        named = {f"the {reader.length} tokens that {name if several else 'the text encoder'} reads": reader.cut(texts)
                 for name, reader in self.readers.items()}  # fmt: skip
        return Counter(named)

    def say_cut(self, positions: Iterable[int]) -> None:
        labels: Sequence[int] = range(len(self.prompts))
        if positions != labels or self.repeat > 1:
            labels = sorted({position // self.repeat % len(self.prompts) for position in positions})
        each = max(1, -(-len(labels) // CUT))
        some = labels[::each]
        cut: Counter[str] = Counter()
        for first in range(0, len(some), 1000):
            cut += self.cut(self.prompts[label] for label in some[first : first + 1000])
        of = f", one in {each} of {len(labels)}," if each > 1 else ""
        for read, count in cut.items():
            print(f"{count} of {len(some)} prompts{of} are longer than {read}: cut there", file=sys.stderr)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of prompts (B), float32, on the encoders' device."""
        place = next(iter(self.readers.values())).place
        with torch.no_grad(), torch.autocast(place.type, enabled=False):
            return self.encoded(prompts).map(Tensor.float)

    def encoded(self, prompts: Sequence[str]) -> Condition:
        """The text encoders' answers: a family of models with others than CLIP's last states has its own."""
        (reader,) = self.readers.values()
        return Condition({self.part: reader.encoder(sent(reader.tokens(prompts), reader.place))[0]})

    def without(self) -> Condition:
        """The condition of the negative prompt, computed anew."""
        if self.negative is None:
            return Condition({part: torch.zeros(1, *shape) for part, shape in self.shapes.items()})
        return self.encode([self.negative])

    @property
    def null(self) -> Condition:
        """The condition of the negative prompt."""
        if self._null is None:
            self._null = self.table.null if self.table is not None else self.without()
        return self._null

    def guided(self, guides: tuple[ModelGuide, ...]) -> PromptConditioner:
        out = copy.copy(self)
        out.guides = guides
        return out

    def of(self, labels: Tensor) -> Condition:
        """The condition of the prompts at positions (B,); equal prompts are encoded once."""
        if self.table is not None:
            return self.table(labels)
        texts = [self.prompts[position] for position in labels.tolist()]
        unique = list(dict.fromkeys(texts))
        return self.encode(unique).to(labels.device)[[unique.index(text) for text in texts]]

    def example(self, count: int, device: str | torch.device) -> Condition:
        return Condition({part: torch.randn(count, *shape, device=device) for part, shape in self.shapes.items()})

    def stored(self, folder: Path | None, dtype: str, count: int | None = None) -> PromptConditioner:
        if folder is None:
            return self
        out = copy.copy(self)
        used = self if count is None else self.given(in_turn(self.prompts, count), self.negative)
        out.table, out._null = Embeddings(used, folder, dtype), None
        return out

    def live(self, dtype: str, name: str = "the model") -> PromptConditioner:
        out = copy.copy(self)
        out.table, out._null = Live(self, dtype), None
        return out

    def ahead(self, labels: Tensor) -> None:
        if isinstance(self.table, Live):
            self.table.ahead(labels)

    def complete(self, device: torch.device, stop: Stop | None = None) -> None:
        if self.table is not None:
            self.table.complete(device, stop)

    def parts(self) -> dict[str, Any]:
        return {name: reader.encoder for name, reader in self.readers.items()}

    def tokenizers(self) -> dict[str, Any]:
        """Its tokenizers, by their names in a pipeline."""
        return {name.replace("text_encoder", "tokenizer"): reader.tokenizer for name, reader in self.readers.items()}

    def working(self) -> list[nn.Module]:
        return list(self.parts().values()) if self.table is None or isinstance(self.table, Live) else []

    def named(self, label: int) -> dict[str, Any]:
        return {"prompt": self.prompts[label]}

    def shown(self) -> dict[str, Any]:
        return super().shown() | {"text": f"prompts of at most {self.lengths} tokens"}

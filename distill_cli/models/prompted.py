"""Prompts for models without text: a guide alone reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from distill_cli.data.prompts import chosen
from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.errors import UsageError
from distill_cli.models.conditioners import Conditioner
from distill_cli.models.guides import ModelGuide


@dataclass(frozen=True)
class Prompted(Conditioner):
    """The conditioner of a model without text that a guide leads by prompts. Labels are positions of prompts, as for models with text.

    A model with classes is called under its null class.
    """

    base: Conditioner
    prompts: Sequence[str] = ()
    repeat: int = 1
    guides: tuple[ModelGuide, ...] = ()
    takes: Literal["prompts"] = "prompts"

    @property
    def null(self) -> Condition | None:
        return self.base.null

    @property
    def has_null(self) -> bool:
        return self.base.has_null

    def labels(self, count: int, classes: list[int] | None = None, start: int = 0) -> Tensor:
        """(count,) positions of prompts in turn, from position `start` of the job."""
        if classes is not None:
            raise UsageError(f"--classes {classes[0]}: not with CLIP guidance, which asks by prompts", "leave it out")
        if not self.prompts:
            raise UsageError("--clip-guidance: leads by prompts, and there are none", "--prompts FILE: a line a prompt")
        return torch.arange(start, start + count) // self.repeat % len(self.prompts)

    def of(self, labels: Tensor) -> Condition:
        null = self.base.null
        return NOTHING if null is None else null.to(labels.device).map(lambda part: part.expand(len(labels), *part.shape[1:]))

    def chosen(self, name: str | None, data: str) -> Sequence[str]:
        return chosen(name, data)

    def given(self, prompts: Sequence[str], negative: str | None = None, repeat: int = 1, name: str = "the model") -> Prompted:
        if negative is not None:
            raise UsageError(f"--negative-prompt: {name} has no text", "leave it out: the guide reads prompts alone")
        return replace(self, prompts=prompts, repeat=repeat)

    def guided(self, guides: tuple[ModelGuide, ...]) -> Prompted:
        return replace(self, guides=guides)

    def taught(self, learned: Sequence[int] | None = None, null: bool = True) -> Conditioner:
        return self.base.taught()

    def named(self, label: int) -> dict[str, Any]:
        return {"prompt": self.prompts[label]}


def prompted(conditioner: Conditioner, name: str) -> Conditioner:
    """The conditioner of a model called `name`, with prompts if it has no text. Raises UsageError for classes without a null class."""
    if conditioner.takes == "prompts":
        return conditioner
    if conditioner.classes and not conditioner.has_null:
        raise UsageError(f"--clip-guidance: {name} has classes and no null class, which prompts need", "use --guidance-scale alone")
    return Prompted(conditioner)

"""Conditions of prompts that are encoded while a run trains, ahead of the step that needs them: nothing is stored.

One thread encodes, in the order in which it is asked. A tokenizer takes one caller at a time, and on a GPU the thread's work stands
in the same stream as the training's, so that no step waits for a copy.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor

from distill_cli import shards
from distill_cli.data.prompts import PromptFile
from distill_cli.diffusion.condition import Condition
from distill_cli.launch import Stop
from distill_cli.models.embeddings import Encoder

AT_A_TIME = 16
"""Prompts in a call of the text encoders: their activations lie beside those of the training step."""


class Live:
    """Conditions of a conditioner's prompts, by their position, rounded to `dtype` as stored ones are. `null`: that of the negative prompt.

    The prompts of one call are encoded together, announced or not, so that a resumed run has the same bits.
    """

    def __init__(self, conditioner: Encoder, dtype: str) -> None:
        self.conditioner, self.dtype = conditioner, shards.DTYPES[dtype]
        self.thread = ThreadPoolExecutor(1, "text encoder")
        self.coming: dict[tuple[int, ...], Future[Condition]] = {}
        """What is announced and not asked for yet, by its labels."""

    @cached_property
    def null(self) -> Condition:
        return self.thread.submit(self.conditioner.without).result().map(lambda part: part.to(self.dtype).float().cpu())

    def complete(self, device: torch.device, stop: Stop | None = None) -> None:
        """Move the text encoders to `device`, where they stay."""
        for encoder in self.conditioner.parts().values():
            encoder.to(device)

    def ahead(self, labels: Tensor) -> None:
        """Begin to encode labels (B,) that are asked for later."""
        asked = tuple(labels.tolist())
        if asked and asked not in self.coming:
            self.coming[asked] = self.thread.submit(self._encoded, asked)

    def _encoded(self, asked: tuple[int, ...]) -> Condition:
        """The conditions of labels, as `dtype`; equal prompts are encoded once."""
        prompts = self.conditioner.prompts
        if isinstance(prompts, PromptFile):
            prompts.check()
        texts = [prompts[label] for label in asked]
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        calls = [list(rows)[first : first + AT_A_TIME] for first in range(0, len(rows), AT_A_TIME)]
        made = Condition.cat([self.conditioner.encode(call).map(lambda part: part.to(self.dtype)) for call in calls])
        return made[[rows[text] for text in texts]]

    def __call__(self, labels: Tensor) -> Condition:
        """The conditions of labels (B,), float32, on the text encoders' device. Raises what the encoding raised."""
        if not len(labels):
            return self.null[:0].to(labels.device)
        self.ahead(labels)
        return self.coming.pop(tuple(labels.tolist())).result().map(Tensor.float)

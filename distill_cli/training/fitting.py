"""The options that bring a run under a GPU's memory, and what each costs; every combination is counted as a plan counts it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from distill_cli.config import TrainingConfig
from distill_cli.config.base import size
from distill_cli.errors import UsageError
from distill_cli.launch import HALF
from distill_cli.models import compiled
from distill_cli.models.cost import amount
from distill_cli.models.lora import Adapter
from distill_cli.processes import say
from distill_cli.training.memory import Memory, memory, worst
from distill_cli.training.objective import Call, Objective
from distill_cli.training.placed import able

FEW = 4
"""Images of a part below which a GPU is taken to wait for launches: fewer take as long as so many (docs/benchmarks.md, an H200)."""


class Option(NamedTuple):
    """A key that saves memory: its value, the estimated factor of a step's time, whether it leaves all numbers alone, what it costs."""

    key: str
    value: Any
    slower: float
    exact: bool
    cost: str


OPTIONS = (
    Option("gradient_checkpointing", True, 1.33, True, "a step takes about a third longer"),
    Option("ema_device", "cpu", 1.05, True, "each step the weights travel to the host, for their average"),
    Option("optimizer_device", "cpu", 1.3, True, "weights and gradients travel each step, and the CPU makes it"),
    Option("precision", "bf16", 0.6, False, "networks compute in bf16, with 8 bits of mantissa; faster"),
)
"""In the order in which they are named."""


class Choice(NamedTuple):
    """Options that fit, the factor of a step's time, and the memory."""

    changes: dict[str, Any]
    slower: float
    needs: Memory

    def __str__(self) -> str:
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.changes.items())


def check_even(config: TrainingConfig, processes: int) -> None:
    """Raise UsageError if some processes cannot share each part of a batch evenly."""
    if not config.splits(config.accumulate * processes):
        said = f"in {config.accumulate} parts cannot" if config.accumulate > 1 else "cannot"
        raise UsageError(f"{config.batch()}: {said} be shared evenly by {processes} processes")


def parts(config: TrainingConfig, processes: int) -> list[int]:
    """The numbers of parts that the batch can be split into, from the config's own on."""
    return [n for n in range(config.accumulate, config.batch_size + 1) if config.splits(n * processes)]


class Fitting:
    """The memory of an objective under other options."""

    def __init__(self, objective: Objective, processes: int = 1) -> None:
        self.objective, self.processes, self.config = objective, processes, objective.config
        assert self.config.memory is not None
        self.limit = size(self.config.memory)
        self.counted: dict[tuple[int, bool, str], tuple[int, Call]] = {}
        """Activations, by the keys on which they depend."""
        self.parts = parts(self.config, processes)

    def needs(self, **changes: Any) -> Memory:
        """The memory under some changes of the config."""
        config = self.objective.config = self.config.model_copy(update=changes)
        key = config.accumulate, config.gradient_checkpointing, config.precision
        self._store(config)
        try:
            if key not in self.counted:
                self.counted[key] = worst(self.objective, self.processes)
            return memory(self.objective, self.processes, self.counted[key])
        finally:
            self.objective.config = self.config
            self._store(self.config)

    def _store(self, config: TrainingConfig) -> None:
        """Give a LoRA's base, or a frozen teacher, the type in which a run of `config` stores it."""
        trained = [backbone for each in self.objective.trained.values() for backbone in compiled.backbones(each.module)]
        adapters = [backbone for backbone in trained if isinstance(backbone, Adapter)]
        frozen = [backbone for each in self.objective.frozen.values() for backbone in compiled.backbones(each)]
        kept = any(backbone.merge for backbone in adapters)
        for backbone in [*frozen, *(adapter.base for adapter in adapters)]:
            backbone.cast(None if kept else HALF.get(config.precision))

    def fewest(self, changes: dict[str, Any]) -> Choice | None:
        """The fewest parts of a batch with which some options fit; None if the most parts do not.

        Activations grow in proportion to the images of a part, nearly: two counts say where to look, and a third says whether it fits.
        """
        counted: dict[int, Memory] = {}

        def at(split: int) -> Memory:
            if split not in counted:
                counted[split] = self.needs(**changes, accumulate=split)
            return counted[split]

        *more, most = self.parts
        if at(most).total > self.limit:
            return None
        for split in self.parts:
            if more and split != most:
                each = (at(more[-1]).activations - at(most).activations) / (self.images(more[-1]) - self.images(most))
                expected = at(most).activations + round(each * (self.images(split) - self.images(most)))
                if replace(at(most), activations=expected, apart=at(most).apart and split > 1).total > self.limit:
                    continue
            if at(split).total <= self.limit:
                break
        parts = {"accumulate": split} if split != self.config.accumulate else {}
        return Choice({**changes, **parts}, self.slower(changes) * max(1.0, FEW / self.images(split)), at(split))

    def images(self, split: int) -> int:
        """The images of a part on each GPU."""
        return self.config.batch_size // split // self.processes

    @staticmethod
    def slower(changes: dict[str, Any]) -> float:
        return math.prod(option.slower for option in OPTIONS if option.key in changes)

    def free(self) -> list[Option]:
        """The options that the config does not have yet, and that the trained networks know."""
        able_to = all(able(each.module) for each in self.objective.trained.values())
        mine = [one for one in OPTIONS if one.key not in self.config.changed(one.key)]
        refused = {"gradient_checkpointing": not able_to, "optimizer_device": self.config.optimizer != "adamw"}
        refused["ema_device"] = bool(getattr(self.config, "lora", 0))
        return [one for one in mine if not refused.get(one.key)]

    def combinations(self, exact: bool) -> Iterator[dict[str, Any]]:
        """The combinations of free options: those that change no number, or the others."""
        for count in range(len(self.free()) + 1):
            for chosen in combinations(self.free(), count):
                if all(one.exact for one in chosen) == exact:
                    yield {one.key: one.value for one in chosen}

    def choice(self) -> Choice:
        """The fastest that fits, of what changes no number if any of it does. Raises UsageError if nothing fits."""
        for exact in (True, False):
            best: Choice | None = None
            for changes in sorted(self.combinations(exact), key=self.slower):
                if best is None or self.slower(changes) < best.slower:
                    found = self.fewest(changes)
                    best = found if best is None or (found is not None and found.slower < best.slower) else best
            if best is not None:
                return best
        smallest = {option.key: option.value for option in self.free()} | {"accumulate": self.parts[-1]}
        least = self.needs(**smallest)
        said = f"memory {self.config.memory}: the smallest plan needs {amount(least.total, 'B')}"
        raise UsageError(said, f"that is {Choice(smallest, 1, least)}")


def line(objective: Objective, processes: int, planned: Memory) -> str:
    """The plan's line about the memory that is asked for: the options that fit, and what they cost."""
    limit, config = objective.config.memory, objective.config
    if limit is None or planned.total <= size(limit):
        return f"fits in {limit} as it stands"
    say(f"counting which options fit in {limit}: this takes a minute or two for large networks")
    choice = Fitting(objective, processes).choice()
    costs = [option.cost for option in OPTIONS if option.key in choice.changes]
    if "accumulate" in choice.changes:
        images = config.batch_size // choice.changes["accumulate"] // processes
        speed = f"take as long as parts of {FEW}" if images < FEW else "cost no time"
        costs.append(f"parts of {images} image{'s' * (images > 1)} {speed}")
    return f"{choice} fits in {limit}: {choice.needs}; {'; '.join(costs)}"


def refuse(objective: Objective, processes: int) -> None:
    """Raise UsageError if the run does not fit in the memory that its config names."""
    needs = memory(objective, processes).total
    limit = objective.config.memory
    if limit is not None and needs > size(limit):
        raise UsageError(f"memory {limit}: the run needs {amount(needs, 'B')} by its plan", "--dry-run says which options fit")

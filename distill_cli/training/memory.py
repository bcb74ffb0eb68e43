"""What a run holds on a GPU: weights, their average, moments, gradients and activations, counted from its objective."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.models.cost import amount
from distill_cli.training.activations import GPU, peak, size_of, tensors_of
from distill_cli.training.objective import Call, Calls, Objective
from distill_cli.training.rehearsal import unmeasured


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, by what takes them."""

    weights: int
    average: int
    moments: int
    gradients: int
    activations: int
    images: str
    """Of what the activations are."""
    apart: bool
    """Whether gradients and activations are held at the same time; else the first come as the others go."""

    @property
    def total(self) -> int:
        both = self.gradients + self.activations if self.apart else max(self.gradients, self.activations)
        return self.weights + self.average + self.moments + both

    def __str__(self) -> str:
        order = "" if self.apart else ", which the gradients replace"
        parts = {"weights": self.weights, "average": self.average, "moments": self.moments, "gradients": self.gradients}
        said = ", ".join(f"{name} {amount(size, 'B')}" for name, size in parts.items() if size)
        return f"about {amount(self.total, 'B')} on a GPU: {said}, activations {amount(self.activations, 'B')} ({self.images}){order}"


def networks_of(objective: Objective) -> dict[str, nn.Module]:
    """The networks that are on the GPU while a run trains, by name; text encoders are there if text is live."""
    return {**{name: each.module for name, each in objective.trained.items()}, **objective.kept, **objective.frozen}


def worst(objective: Objective, processes: int = 1) -> tuple[int, Call]:
    """The most bytes of activations in a turn of any step, on each of `processes` GPUs, and the call with gradient that they are of."""
    made = result(objective)
    ends = [sum(phase.steps for phase in objective.phases[:k]) for k in range(len(objective.phases))]
    each = [*map(objective.calls, ends)]
    different = [calls for k, calls in enumerate(each) if calls not in each[:k]]
    found = [turn for calls in different for turn in _turns(objective, made, networks_of(objective), calls, processes)]
    return max(found, key=lambda turn: turn[0])


def memory(objective: Objective, processes: int = 1, counted: tuple[int, Call] | None = None) -> Memory:
    """What each of `processes` GPUs holds, at most, of a run with the objective's config; `counted` is its `worst` if it is known."""
    config, networks = objective.config, networks_of(objective)
    activations, call = counted or worst(objective, processes)
    trained = {name: list(each.parameters()) for name, each in objective.trained.items()}
    gradients = [4 * sum(each.numel() for each in parameters) for parameters in trained.values()]
    shared = processes > 1  # DistributedDataParallel holds the gradients of all networks, all the time
    return Memory(
        weights=sum(map(size_of, tensors_of(networks.values()).values())),
        average=0
        if config.ema_device == "cpu"
        else sum(map(size_of, tensors_of([next(iter(objective.trained.values())).state()]).values())),
        moments=0 if config.optimizer_device == "cpu" else 2 * sum(gradients),
        gradients=sum(gradients) if shared else max(gradients),
        activations=activations,
        images=", ".join([str(Calls([call])).removeprefix("trains "), *([config.precision] if config.precision != "no" else [])]),
        apart=shared or config.accumulate > 1,
    )


def result(objective: Objective) -> Any:
    """What the method makes of its first network before it trains."""
    main = next(iter(objective.trained.values()))
    return unmeasured(lambda network: objective.model(network, 0), main.merged(main.state()))


def _turns(objective: Objective, made: Any, networks: dict[str, nn.Module], calls: Calls, processes: int) -> list[tuple[int, Call]]:
    """The largest number of bytes of activations in each turn of a step, and the call with gradient that they are of."""
    config = objective.config
    trained = [each for one in objective.trained.values() for each in one.parameters()]
    checkpointed = [each.module for each in objective.trained.values()] if config.gradient_checkpointing else []

    def share(images: int) -> int:
        return -(-images // (config.accumulate * processes))

    def forward(call: Call) -> Tensor:
        answer = objective.trial(networks[call.network], made, share(call.images), GPU)
        return answer[0] if isinstance(answer, tuple) else answer

    @torch.no_grad()
    def between() -> None:
        for call in dict.fromkeys(calls.forwards):
            forward(call)
        torch.clear_autocast_cache()

    def first() -> Any:
        if not calls.between:
            between()
        out = forward(calls.trainings[0])
        if calls.between:
            between()
        answers = [out, *map(forward, calls.through)]
        if calls.decoded:
            x = out[-share(calls.decoded) :].float()
            answers.append(objective.judge(x, torch.empty_like(x, requires_grad=False)))
        return answers

    out = []
    for k, call in enumerate(dict.fromkeys(calls.trainings)):
        found = peak(partial(forward, call) if k else first, networks.values(), trained, config.precision, checkpointed)
        out.append((found, Call(call.network, share(call.images))))
    return out

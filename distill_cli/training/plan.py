"""The cost of a training run, before it begins: counted from its objective, which a dry run builds on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from torch import nn

from distill_cli.models.cost import amount, decoding, evaluation, time_of
from distill_cli.models.model import Model
from distill_cli.models.steering import uncounted
from distill_cli.training import fitting
from distill_cli.training.memory import memory, result
from distill_cli.training.objective import Objective
from distill_cli.training.pictures import scheduled
from distill_cli.training.placed import check

CARRIED = re.compile(r"\.lora_[AB]\.\w+\.")
"""In the name of a parameter in a base: that of an adapter. In the adapter itself peft's name of the adapter is left out."""


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def own(network: nn.Module) -> list[nn.Parameter]:
    """A network's parameters, without those of adapters that lie on it."""
    return [parameter for name, parameter in network.named_parameters() if not CARRIED.search(name)]


def stored(network: nn.Module) -> int:
    """The numbers of a network in a checkpoint: parameters, and buffers such as a table of positions."""
    return sum(value.numel() for value in network.state_dict().values() if value.is_floating_point())


def flop(model: Model, evaluations: int, decoded: int = 0) -> int:
    """FLOP of evaluations of a model's denoiser, and of `decoded` images: decoded with gradient (two), with a reference (one)."""
    return evaluations * evaluation(model) + (3 * decoded * decoding(model) if decoded else 0)


def _networks(objective: Objective) -> dict[str, nn.Module]:
    """The networks of a run."""
    return {name: each.state() for name, each in objective.trained.items()} | objective.kept | objective.frozen


def plan(objective: Objective, processes: int = 1) -> dict[str, Any]:
    """Steps, images, parameters, calls, disk and memory of a run; for a denoiser its arithmetic too."""
    config, phases = objective.config, objective.phases
    check(config, {name: each.module for name, each in objective.trained.items()})
    ends = list(accumulate(phase.steps for phase in phases))
    steps, calls = ends[-1], [objective.usual(end - phase.steps) for end, phase in zip(ends, phases, strict=True)]
    changes = [(end, str(later)) for end, one, later in zip(ends, calls, calls[1:], strict=False) if str(later) != str(one)]
    main, networks = next(iter(objective.trained.values())), _networks(objective)
    parameters = {name: count(own(network)) for name, network in networks.items()}
    trained, average = sum(count(each.parameters()) for each in objective.trained.values()), stored(main.state())
    kept = sum(stored(networks[name]) for name in (*objective.trained, *objective.kept))
    checkpoint = 4 * (kept + 2 * trained + average)  # two moments
    needs = memory(objective, processes)
    out = {
        "steps": steps,
        "images": steps * config.batch_size,
        "parameters": ", ".join(f"{name} {parameters[name]:,}" for name in sorted(parameters, key=lambda name: name != "teacher")),
        "each step": "; ".join([str(calls[0]), *(f"after step {step} {said}" for step, said in changes)]),
        "disk": f"about {amount(checkpoint * config.keep, 'B')} of checkpoints",
        "memory": str(needs),
    }
    if teacher := objective.reference():
        out |= uncounted(teacher[0])
    if (looks := scheduled(objective)) is not None:
        out["health"] = str(looks)
    if config.memory is not None:
        out["to fit"] = fitting.line(objective, processes, needs)
    if config.compile != "none":
        out["compile"] = f"{config.compile}, in the first steps: minutes before the run has its speed"
    model = result(objective)
    if isinstance(model, Model):
        totals = [(phase.steps * each.evaluations(), phase.steps * each.decoded) for phase, each in zip(phases, calls, strict=True)]
        out["arithmetic"] = time_of(flop(model, *map(sum, zip(*totals, strict=True))))
    return out

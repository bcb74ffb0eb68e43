"""The cost of a training run, before it begins: counted from its objective, which a dry run builds on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from torch import nn

from distill_cli.models.cost import amount, decoding, evaluation, time_of
from distill_cli.models.model import Model
from distill_cli.training.objective import Objective
from distill_cli.training.rehearsal import unmeasured


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def stored(network: nn.Module) -> int:
    """The numbers of a network in a checkpoint: parameters, and buffers such as a table of positions."""
    return sum(value.numel() for value in network.state_dict().values() if value.is_floating_point())


def plan(objective: Objective) -> dict[str, Any]:
    """Steps, images, parameters, calls, disk and memory of a run; for a denoiser its arithmetic too."""
    config, phases = objective.config, objective.phases
    ends = list(accumulate(phase.steps for phase in phases))
    steps, calls = ends[-1], [objective.calls(end - phase.steps) for end, phase in zip(ends, phases, strict=True)]
    changes = [(end, str(later)) for end, one, later in zip(ends, calls, calls[1:], strict=False) if later != one]
    main = next(iter(objective.trained.values()))
    networks = {name: each.state() for name, each in objective.trained.items()} | objective.kept | objective.frozen
    parameters = {name: count(network.parameters()) for name, network in networks.items()}
    trained = sum(count(each.parameters()) for each in objective.trained.values())
    weights, average = {name: stored(network) for name, network in networks.items()}, stored(main.state())
    checkpoint = 4 * (sum(weights[name] for name in (*objective.trained, *objective.kept)) + 2 * trained + average)  # two moments
    memory = 4 * (sum(weights.values()) + average) + 12 * trained
    out = {
        "steps": steps,
        "images": steps * config.batch_size,
        "parameters": ", ".join(f"{name} {parameters[name]:,}" for name in sorted(parameters, key=lambda name: name != "teacher")),
        "each step": "; ".join([str(calls[0]), *(f"after step {step} {said}" for step, said in changes)]),
        "disk": f"about {amount(checkpoint * config.keep, 'B')} of checkpoints",
        "memory": f"about {amount(memory, 'B')} of weights, their average, gradients and moments, and the activations",
    }
    model = unmeasured(lambda network: objective.model(network, 0), main.merged(main.state()))
    if isinstance(model, Model):
        one, picture = evaluation(model), decoding(model) if any(each.decoded for each in calls) else 0
        asked = [each.evaluations() * one + 3 * each.decoded * picture for each in calls]
        out["arithmetic"] = time_of(sum(phase.steps * flop for phase, flop in zip(phases, asked, strict=True)))
    return out

"""The cost of a training run, before it begins: counted from its objective, which a dry run builds on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from distill_cli.models.cost import decoding, evaluation, time_of
from distill_cli.models.model import Model
from distill_cli.training.objective import Objective
from distill_cli.training.rehearsal import unmeasured


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def plan(objective: Objective) -> dict[str, Any]:
    """Steps, images, parameters, calls, disk and memory of a run; for a denoiser its arithmetic too."""
    config, calls = objective.config, objective.calls()
    steps = sum(phase.steps for phase in objective.phases)
    main = next(iter(objective.trained.values()))
    networks = {name: each.state() for name, each in objective.trained.items()} | objective.kept | objective.frozen
    parameters = {name: count(network.parameters()) for name, network in networks.items()}
    trained = sum(count(each.parameters()) for each in objective.trained.values())
    average, kept = count(main.state().parameters()), sum(parameters[name] for name in objective.kept)
    checkpoint = 4 * (3 * trained + average + kept)  # weights and two moments
    memory = 4 * (sum(parameters.values()) + average) + 12 * trained
    out = {
        "steps": steps,
        "images": steps * config.batch_size,
        "parameters": ", ".join(f"{name} {parameters[name]:,}" for name in sorted(parameters, key=lambda name: name != "teacher")),
        "each step": str(calls),
        "disk": f"about {checkpoint * config.keep / 1e6:.0f} MB of checkpoints",
        "memory": f"about {memory / 1e6:.0f} MB of weights, their average, gradients and moments, and the activations",
    }
    model = unmeasured(lambda network: objective.model(network, 0), main.merged(main.state()))
    if isinstance(model, Model):
        decoded = 3 * calls.decoded * decoding(model) if calls.decoded else 0
        out["arithmetic"] = time_of(steps * (calls.evaluations() * evaluation(model) + decoded))
    return out

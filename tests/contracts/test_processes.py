"""What holds in processes of their own: every method on one family, every family with one method, the rest by the mark `contracts_all`."""

from __future__ import annotations

import random
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.contracts.running import STEPS, STILL, hashes, lines, resume
from tests.contracts.test_contracts import TAKEN, numbers

FIRST = dict(reversed(TAKEN))
"""The first family that each method takes."""
ONE_METHOD = "dmd"
marked = [
    pytest.param(*pair, id="-".join(pair), marks=() if pair[0] == ONE_METHOD or FIRST[pair[0]] == pair[1] else pytest.mark.contracts_all)
    for pair in TAKEN
]


@pytest.mark.parametrize(("method", "family"), marked)
def test_killed_and_resumed_is_uninterrupted(method, family, runs, workers):
    """SIGKILL at a random moment of a random step: every file of the run is the uninterrupted one's."""
    whole = runs.whole(method, family)
    folder, chance = runs.new(f"{method}-{family}"), random.Random(f"{family} {method}")
    step = chance.randrange(STEPS)

    def due():
        metrics = folder / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") > step

    workers.killed([*runs.command(method, family), "--out", str(folder)], due, chance.uniform(0, 0.05))
    assert resume(method, folder).code == 0
    one, other = hashes(whole.folder), hashes(folder)
    assert [name for name in {**one, **other} if one.get(name) != other.get(name)] == []


@pytest.mark.parametrize(("method", "family"), marked)
def test_two_processes_train_as_one(method, family, runs, workers):
    """The same batch over two processes: losses to 1e-3, and weights that moved the same way to 2%."""
    one = runs.run(method, family, **STILL)
    one.ended.check()
    two = runs.new(f"{method}-{family}")
    workers.finish([*runs.command(method, family, **STILL), "--out", str(two)], 2)
    for ours, theirs in zip(lines(one.folder), lines(two), strict=True):
        assert numbers(theirs, "_loss", "_grad_norm") == pytest.approx(numbers(ours, "_loss", "_grad_norm"), rel=1e-3)
    name = f"checkpoints/step-{STEPS:06d}"
    for file in sorted((one.folder / name).glob("*.safetensors")):
        ours, theirs, start = (load_file(run / name / file.name) for run in (one.folder, two, one.folder))
        start = one.seen.start.get(re.sub(r"^(average|target)$", one.seen.main, file.stem))
        moved = torch.cat([(value - start[key]).flatten() for key, value in ours.items() if value.is_floating_point()])
        apart = torch.cat([(value - theirs[key]).flatten() for key, value in ours.items() if value.is_floating_point()])
        assert apart.norm() < 2e-2 * moved.norm(), file.name
        assert moved.abs().max() > 1e-5

"""What holds in processes of their own: every method on one family, every family with one method, the rest by `contracts_all`."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

from tests.contracts.running import STEPS, STILL, apart, hashes, lines, resume
from tests.contracts.test_contracts import FIRST, TAKEN, alike

ONE_METHOD = "dmd"
marked = [
    pytest.param(*pair, id="-".join(pair), marks=() if pair[0] == ONE_METHOD or FIRST[pair[0]] == pair[1] else pytest.mark.contracts_all)
    for pair in TAKEN
]


@pytest.mark.parametrize(("method", "family"), marked)
def test_killed_and_resumed_is_uninterrupted(method, family, runs, workers):
    """SIGKILL at a random moment of a random step: every file of the run is the uninterrupted one's."""
    whole, chance = runs.whole(method, family), random.Random(f"{family} {method}")
    killed = False
    while not killed:  # a machine with much else to do may let it end first
        folder, count = runs.new(f"{method}-{family}"), chance.randrange(3)

        def due(folder=folder, count=count):
            metrics = folder / "metrics.jsonl"
            return (folder / "begun.json").exists() and (metrics.read_text().count("\n") if metrics.exists() else 0) >= count

        killed = workers.killed([*runs.command(method, family), "--out", str(folder)], due, chance.uniform(0, 0.1))
    resume(method, folder).check()
    one, other = hashes(whole.folder), hashes(folder)
    assert [name for name in {**one, **other} if one.get(name) != other.get(name)] == []


@pytest.mark.parametrize(("method", "family"), marked)
def test_two_processes_train_as_one(method, family, runs, workers):
    """The same batch over two processes: losses, weights, averages and moments, to rounding."""
    one, two = runs.still(method, family), runs.new(f"{method}-{family}")
    workers.finish([*runs.command(method, family, **STILL), "--out", str(two)], 2)
    for ours, theirs in zip(lines(one.folder), lines(two), strict=True):
        alike(theirs, ours)
    ours, theirs = (run / f"checkpoints/step-{STEPS:06d}" for run in (one.folder, two))
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    for file in ours.glob("*.safetensors"):
        start = one.seen.start.get(file.stem, one.seen.start[one.seen.main])  # averages and targets begin as the main network
        assert apart(load_file(file), load_file(theirs / file.name), start) < 1e-4, file.name
    mine, other = (torch.load(folder / "optimizers.pt", weights_only=True) for folder in (ours, theirs))
    for name, state in mine.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            mean, same = (torch.cat([moments[moment].flatten() for moments in s["state"].values()]) for s in (state, other[name]))
            assert (mean - same).norm() < 1e-4 * mean.norm(), name

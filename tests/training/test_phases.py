"""Phases: each begins as the average of the one before, with new moments, and a run resumes to the bit wherever it was stopped."""

import json
import random
import shutil
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from distill_cli.errors import UsageError
from distill_cli.methods.train.config import TrainConfig
from distill_cli.training import checkpoint
from distill_cli.training.objective import Phase, phase_at, span_at
from distill_cli.training.optimizer import learning_rate
from tests.training import phases
from tests.training.phases import STEPS


@pytest.fixture(autouse=True)
def alone():
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases") / "whole"
    phases.engine(folder).train()
    return folder


def test_which_phase_a_step_is_in_and_what_the_schedule_runs_over():
    several = [Phase(4, "a"), Phase(3, "b", anew=True), Phase(2, "c"), Phase(5, "d", anew=True)]
    assert [phase_at(several, step) for step in range(15)] == [0] * 4 + [1] * 3 + [2] * 2 + [3] * 6
    assert {span_at(several, step) for step in range(4)} == {(0, 4)}
    assert {span_at(several, step) for step in range(4, 9)} == {(4, 5)}
    assert {span_at(several, step) for step in range(9, 15)} == {(9, 5)}


def test_each_phase_begins_as_the_average_of_the_one_before(tmp_path):
    made = phases.engine(tmp_path / "r")
    made.train()
    for step, start in made.objective.starts:
        before = load_file(checkpoint.path_of(tmp_path / "r/checkpoints", step) / "average.safetensors")["where"]
        assert torch.equal(start, before)
        assert torch.equal(load_file(tmp_path / f"r/{'student-4' if step == 4 else 'student-2'}/point.safetensors")["where"], before)
        assert not torch.equal(load_file(checkpoint.path_of(tmp_path / "r/checkpoints", step) / "student.safetensors")["where"], before)
        after = checkpoint.path_of(tmp_path / "r/checkpoints", step + 1)
        assert torch.equal(load_file(after / "teacher.safetensors")["where"], before)
        assert torch.load(after / "optimizers.pt", weights_only=True)["student"]["state"][0]["step"] == 1  # new moments
        rate = torch.load(after / "optimizers.pt", weights_only=True)["student"]["param_groups"][0]["lr"]
        assert rate == learning_rate(made.config, made.config.lr, 0, STEPS[1 if step == 4 else 2])
    assert [step for step, _ in made.objective.starts] == [4, 7]
    assert load_file(tmp_path / "r/student-2/point.safetensors")["step"] == 7


@pytest.mark.parametrize("seed", range(3))
def test_resumed_anywhere_equals_uninterrupted(seed, tmp_path, whole):
    """Killed before three random steps, and before the first of each phase."""
    for stop in sorted({*random.Random(seed).sample(range(1, sum(STEPS)), 3), 4, 7}):
        AcceleratorState._reset_state(True)
        made = phases.engine(tmp_path / "r")
        turns = made.objective.turns

        def killed(step, draws, turns=turns, stop=stop):
            if step == stop:
                raise KeyboardInterrupt
            return turns(step, draws)

        made.objective.turns = killed
        with pytest.raises(KeyboardInterrupt):
            made.train()
    AcceleratorState._reset_state(True)
    phases.engine(tmp_path / "r").train()
    assert phases.everything(tmp_path / "r") == phases.everything(whole)


def test_killed_between_a_borders_checkpoint_and_its_result(tmp_path, whole):
    """The resumed run writes the result that is missing, and one that is older than the checkpoint anew."""
    shutil.copytree(whole, tmp_path / "r")
    for step in range(8, sum(STEPS) + 1):
        shutil.rmtree(checkpoint.path_of(tmp_path / "r/checkpoints", step))
    for name in ("student", "student-2"):
        shutil.rmtree(tmp_path / "r" / name)
    phases.engine(tmp_path / "r").train()
    assert phases.everything(tmp_path / "r") == phases.everything(whole)


def test_phases_of_other_lengths_are_refused(tmp_path, whole, monkeypatch):
    shutil.copytree(whole, tmp_path / "r")
    monkeypatch.setattr(phases, "STEPS", (4, 4, 4))
    with pytest.raises(UsageError, match=r"steps of its phases: \[4, 4\]; the run has begun with \[4, 3\]"):
        phases.engine(tmp_path / "r")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(kind, tmp_path, whole, workers):
    """Up to the order of sums, with the weights whole on each or spread; and one process goes on with what two have begun."""
    variables = {} if kind == "ddp" else {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    workers.finish(partial(phases.trained, tmp_path / "r"), 2, **variables)
    for name in ("student-4", "student-2", "student"):
        theirs, ours = (load_file(folder / name / "point.safetensors")["where"] for folder in (tmp_path / "r", whole))
        assert torch.allclose(theirs, ours, rtol=1e-5)
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (tmp_path / "r", whole)]
    for theirs, ours in zip(*lines, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    for step in range(6, sum(STEPS) + 1):
        shutil.rmtree(checkpoint.path_of(tmp_path / "r/checkpoints", step))
    phases.engine(tmp_path / "r").train()
    assert torch.allclose(
        load_file(tmp_path / "r/student/point.safetensors")["where"], load_file(whole / "student/point.safetensors")["where"]
    )


def test_a_phase_alone_runs_over_all_steps():
    assert span_at(phases.Objective(TrainConfig(steps=9), "x").phases, 5) == (0, 9)

"""A launcher's variables say together which process this is: half of a set is one line, never a part of the pictures."""

import json
import os

import pytest

from distill_cli import processes
from tests.cli.test_bad_input import one_line

MASTER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
STEP = {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_PROCID": "1"}
JOB = ("sample", "--model", "tiny", "--num", 2, "--steps", 1, "--out", "s")
ALL = (
    *processes.PLACE,
    *processes.OTHERS,
    *processes.UNUSED,
    *processes.UNKNOWN,
    *processes.FLAGS,
    "LOCAL_WORLD_SIZE",
    "SLURM_STEP_ID",
    *STEP,
)


@pytest.fixture
def launched(monkeypatch, tmp_path_factory):
    """Set these variables and no other of a launcher; what is made of them is undone after the test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("claims")))
    for name in ALL:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def by(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return by


def without(variables, name):
    return {key: value for key, value in variables.items() if key != name}


HALF = [
    ({"WORLD_SIZE": ""}, "WORLD_SIZE=: empty"),
    ({"RANK": ""}, "RANK=: empty"),
    ({"LOCAL_RANK": ""}, "LOCAL_RANK=: empty"),
    ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE=: empty"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: not a number"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: not a number"),
    ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE=1.5: not a number"),
    ({"WORLD_SIZE": "0"}, "RANK=0: not below WORLD_SIZE=0"),
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4: set without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "0"}, "RANK=0: set without WORLD_SIZE"),
    ({"RANK": "3"}, "RANK=3: set without WORLD_SIZE"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0: set without RANK, WORLD_SIZE"),
    ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4: above WORLD_SIZE=1"),
    ({"WORLD_SIZE": "4", "RANK": "1", **MASTER}, "RANK=1: set without LOCAL_RANK"),
    ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}, "RANK=1: set without MASTER_ADDR, MASTER_PORT"),
    ({"WORLD_SIZE": "4", "RANK": "4", "LOCAL_RANK": "0", **MASTER}, "RANK=4: not below WORLD_SIZE=4"),
    ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1", **MASTER}, "LOCAL_RANK=1: not below LOCAL_WORLD_SIZE=1"),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **MASTER, "MASTER_PORT": "x"}, "MASTER_PORT=x: not a number"),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **MASTER, "MASTER_ADDR": ""}, "RANK=1: set without MASTER_ADDR"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: MPI's variables are not read"),
    (without(STEP, "SLURM_PROCID"), "SLURM_STEP_NUM_TASKS=4: set without SLURM_PROCID"),
    ({**STEP, "SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS=: empty"),
    ({**STEP, "SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS=x: not a number"),
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE=2(x: not like"),
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "set without SLURM_LOCALID"),
    ({**STEP, "SLURM_PROCID": "4"}, "RANK=4: not below WORLD_SIZE=4"),
    ({**STEP, "SLURM_JOB_ID": "a"}, "SLURM_JOB_ID=a: not a number"),
    ({**STEP, "WORLD_SIZE": "2"}, "WORLD_SIZE=2: srun has started 4 tasks"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM: not supported"),
    ({"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP=1: neither true nor false"),
]


@pytest.mark.parametrize(("variables", "says"), HALF)
def test_half_a_set_is_one_line_and_no_picture(variables, says, launched, distill, tmp_path):
    launched(variables)
    one_line(distill(*JOB), 2, says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": ""}, {"RANK": "x"}, {"LOCAL_WORLD_SIZE": ""}, {**STEP, "SLURM_STEP_NUM_TASKS": "y"}])
def test_help_and_lists_need_none_of_it(variables, launched, distill):
    launched(variables)
    for command in (("--help",), ("sample", "--help"), ("models", "ls"), ("recipes", "check", "digits-cd"), ("--version",)):
        assert distill(*command).code == 0
    one_line(distill("models", "show", "nothing"), 2, "nothing: no model of that name")
    named = next((name for name in variables if name not in STEP), "SLURM_STEP_NUM_TASKS")
    for step, command in enumerate(
        (["train"], ["pairs"], ["dmd"], ["cm"], ["edit", "inpaint"], ["evaluate"], ["classifier"], ["vae"], ["bench", "sample"])
    ):
        one_line(distill(*command), 2, f"error: {named}=")
        os.environ["SLURM_STEP_ID"] = str(step)  # under srun an error is said once a step


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, 0)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"WORLD_SIZE": " 4", "RANK": "3", "LOCAL_RANK": "1", **MASTER}, (3, 4, 1)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER}, (3, 4, 1)),
        (STEP, (1, 4, 1)),
        ({"PMI_SIZE": "1"}, (0, 1, 0)),
    ],
)
def test_a_whole_set_is_taken(variables, place, launched, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launched(variables)
    processes.check_launcher()
    assert (processes.rank(), processes.world_size(), processes.local_rank()) == place


def test_accelerates_own_arithmetic_does_not_touch_ours(launched, distill, tmp_path):
    """Its gradient accumulation divided our loss by 4, and the gradient's norm with it."""
    job = ("cm", "--teacher", "tiny", "--data", "digits", "--steps", 1, "batch_size=2", "sample_every=0")
    assert distill(*job, "--out", "a").code == 0
    launched({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    result = distill(*job, "--out", "b")
    assert result.code == 0
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is not used: accumulate=N does it" in result.err
    assert "ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not used" in result.err
    one, other = (json.loads((tmp_path / run / "metrics.jsonl").read_text()) for run in "ab")
    assert one == other
    assert one["student_grad_norm"] > 0
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ

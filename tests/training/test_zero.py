"""Which configurations of DeepSpeed are taken. That it trains the same is in tests/test_processes.py."""

import importlib.util
import os

import pytest
import torch

from distill_cli.errors import UsageError
from distill_cli.methods.train.config import TrainConfig
from distill_cli.training import zero


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "stage 0"),
        ({"zero_optimization": {"stage": 3}}, "stage 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero_optimization.cpu_offload"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "setting optimizer"),
        ({"zero_optimization": {"stage": 2}, "communication_data_type": "fp16"}, "communication_data_type"),
    ],
)
def test_a_configuration_that_would_train_something_else_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        zero.settings_of(settings, TrainConfig(), 1000)


def test_what_the_recipe_gives_and_what_is_kept(monkeypatch):
    """A configuration as accelerate's guide has it: batch and precision are the recipe's, speed is its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    theirs = {
        "train_batch_size": 512,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True, "round_robin_gradients": True},
    }
    ours = zero.settings_of(theirs, TrainConfig(batch_size=24, accumulate=3, clip_norm=2.0), 1000)
    assert ours["train_micro_batch_size_per_gpu"] == 4
    assert ours["train_batch_size"] == 8
    assert ours["gradient_accumulation_steps"] == 1
    assert ours["gradient_clipping"] == 2.0
    assert ours["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True, "round_robin_gradients": False}
    assert "bf16" not in ours
    assert "torch_autocast" not in ours
    assert zero.settings_of(theirs, TrainConfig(precision="bf16"), 1000)["torch_autocast"]["dtype"] == "bfloat16"


def test_runs_that_cannot_have_it_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    zero.check(TrainConfig(precision="bf16"), networks=1)
    for config, networks, said in (
        (TrainConfig(), 2, "several"),
        (TrainConfig(precision="fp16"), 1, "fp16"),
        (TrainConfig(on_nan="skip"), 1, "on_nan"),
        (TrainConfig(optimizer="muon"), 1, "muon"),
    ):
        with pytest.raises(UsageError, match=said):
            zero.check(config, networks)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed"):
        zero.check(TrainConfig(), networks=1)


def test_one_process_has_nothing_to_spread(monkeypatch):
    """And accelerate is not left to believe otherwise; two processes are heard."""
    network = [torch.nn.Linear(2, 2)]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert zero.plugin(TrainConfig(), network, torch.device("cpu")) is None
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="fp16"):
        zero.plugin(TrainConfig(precision="fp16"), network, torch.device("cpu"))

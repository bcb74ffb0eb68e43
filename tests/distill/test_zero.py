"""Which configurations of DeepSpeed are taken. That it trains the same is in tests/test_processes.py."""

import importlib.util

import pytest

from distill_cli.config import TrainConfig
from distill_cli.distill import zero
from distill_cli.errors import UsageError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "stage 0"),
        ({"zero_optimization": {"stage": 3}}, "stage 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "its own optimizer"),
        ({"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}, "its own scheduler"),
    ],
)
def test_a_configuration_that_would_train_something_else_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        zero.check_settings(settings)
    zero.check_settings({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}})


def test_runs_that_cannot_have_it_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    zero.check(TrainConfig(precision="bf16"), networks=1)
    for config, networks, said in (
        (TrainConfig(), 2, "several"),
        (TrainConfig(precision="fp16"), 1, "fp16"),
        (TrainConfig(on_nan="skip"), 1, "on_nan"),
    ):
        with pytest.raises(UsageError, match=said):
            zero.check(config, networks)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed"):
        zero.check(TrainConfig(), networks=1)


def test_one_process_has_nothing_to_spread(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert not zero.wanted()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert zero.wanted()

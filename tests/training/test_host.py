"""Moments and the average in the host's memory: the same bits, resumed or not, and on a card that is not there."""

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from distill_cli.cli.app import run
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.training.ema import EMA
from distill_cli.training.optimizer import HostAdamW, make_optimizer
from tests.fake_card import Card, card

COMMAND = ("dmd", "--teacher", "tiny", "--batch-size", "4", "sample_every=0", "save_every=2", "warmup_steps=0", "ema_halflife=100")
HOST = ("optimizer_device=cpu", "ema_device=cpu")


def call(*arguments):
    AcceleratorState._reset_state(True)
    assert run([str(argument) for argument in arguments]) == 0


def weights(folder):
    return {str(file.relative_to(folder)): load_file(file) for file in sorted(folder.rglob("*.safetensors"))}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[file][name], other[file][name]) for file in one for name in one[file])


def test_steps_on_the_host_are_adamws_to_the_bit(tmp_path):
    """Over a save of the state too, which AdamW reads as its own."""
    networks, optimizers = [], []
    for where in ("same", "cpu"):
        torch.manual_seed(0)
        networks.append(nn.Sequential(nn.Linear(300, 40), nn.Linear(40, 7)))
        config = DMDConfig(optimizer_device=where, weight_decay=0.1)
        optimizers.append(make_optimizer(config, networks[-1].parameters(), 1e-2))
    assert isinstance(optimizers[1], HostAdamW)
    for step in range(4):
        if step == 2:
            states = [optimizer.state_dict() for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                groups = [
                    group | {"params": old["params"]} for group, old in zip(optimizer.param_groups, state["param_groups"], strict=True)
                ]
                optimizer.load_state_dict(state | {"param_groups": groups})
        for network, optimizer in zip(networks, optimizers, strict=True):
            network(torch.full((5, 300), 0.1 * step + 0.1)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_is_the_same_resumed_or_not(tmp_path):
    call(*COMMAND, "--steps", 4, "--out", tmp_path / "plain")
    call(*COMMAND, *HOST, "--steps", 4, "--out", tmp_path / "whole")
    call(*COMMAND, *HOST, "--steps", 2, "--out", tmp_path / "part")
    call("dmd", "--resume", tmp_path / "part", "--steps", 4)
    whole = weights(tmp_path / "whole" / "checkpoints" / "step-000004")
    assert same(whole, weights(tmp_path / "plain" / "checkpoints" / "step-000004"))
    assert same(whole, weights(tmp_path / "part" / "checkpoints" / "step-000004"))


def test_on_a_card_moments_and_average_stay_on_the_host():
    with card():
        network = nn.Linear(3, 2).to("cuda")
        optimizer = HostAdamW(network.parameters(), lr=1e-2)
        average = EMA(network, 0, "cpu")
        before = network.weight.inner.clone()
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        average.update(network, 4, 4)
        optimizer.load_state_dict(optimizer.state_dict())
        state = optimizer.state[network.weight]
        assert isinstance(network.weight, Card)
        assert not any(isinstance(each, Card) for each in (*state.values(), *average.network.parameters()))
        assert torch.allclose(network.weight.inner, before - 1e-2, atol=1e-3)  # Adam's first step has the length of its rate
        assert torch.equal(average.network.weight, network.weight.inner)  # half-life 0
        with average.at(torch.device("cuda")) as there:
            assert isinstance(there.weight, Card)
        assert not isinstance(average.network.weight, Card)

"""A dry run's plan is counted from the objective itself, and is what the run then takes; of every method in tests/contracts."""

import re

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from distill_cli.commands import method_of
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.registry import load
from distill_cli.runs import Run
from distill_cli.training import checkpoint
from distill_cli.training.engine import Engine
from distill_cli.training.job import Job
from distill_cli.training.plan import plan

SMALL = dict(steps=1, batch_size=4, device="cpu", sample_every=0, keep=500)


def opened(config, dry_run=False):
    method = method_of(config)
    return load(f"methods.{method.objective}")(config, Job(method.command, dry_run=dry_run))


def test_the_plan_is_what_the_run_takes(tmp_path, tiny_pairs):
    config = DMDConfig(**SMALL, teacher="tiny", guidance_scale=2.0, match_pairs=True, pairs=tiny_pairs, out=tmp_path / "r")
    planned = opened(config, True)
    assert all(p.is_meta for each in planned.trained.values() for p in each.parameters())
    objective = opened(config)
    said = plan(objective)
    assert plan(planned) == said
    AcceleratorState._reset_state(True)
    engine = Engine(objective.config, objective)
    engine.open(Run.create(tmp_path / "r", "", "dmd"))
    networks = engine._kept() | objective.frozen
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items() if name != "average"}
    assert dict(re.findall(r"(\w+) ([\d,]+\d)", said["parameters"])) == {name: f"{count:,}" for name, count in counts.items()}
    engine.train_step()
    engine.save()
    path = checkpoint.path_of(engine.run.checkpoints, 1)
    written = [value for file in path.glob("*.safetensors") for value in load_file(file).values()]
    for moments in torch.load(path / "optimizers.pt", weights_only=True).values():
        written += [value for state in moments["state"].values() for value in state.values()]
    size = sum(value.numel() * value.element_size() for value in written)
    number, unit = re.search(r"about ([\d.]+) (MB|GB)", said["disk"]).groups()
    assert float(number) * {"MB": 1e6, "GB": 1e9}[unit] == pytest.approx(500 * size, rel=5.1e-3)  # three digits


def test_arithmetic_by_hand(tmp_path, tiny_pairs):
    """The guided teacher's two calls and the fake score's, and three times as much for what is trained, all on both batches."""
    config = DMDConfig(**SMALL | {"steps": 10}, teacher="tiny", guidance_scale=2.0, match_pairs=True, pairs=tiny_pairs, fake_steps=2)
    calls = opened(config, True).calls()
    assert calls.evaluations() == 8 + 8 + 8 + 3 * (8 + 2 * 8)
    assert str(calls) == "trains student on 8 images, fake on 16 images; evaluates teacher on 16 images, fake on 8 images"

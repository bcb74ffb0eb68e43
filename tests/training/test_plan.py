"""A dry run's plan is counted from the objective itself, and is what the run then takes."""

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
from tests.options import options

SMALL = dict(steps=1, batch_size=4, device="cpu", sample_every=0, keep=500)
NETWORK = dict(channels=[8, 16], attention=[False, False], groups=4, head=8)
KINDS = {
    "dmd": ("dmd", dict(teacher="tiny", guidance_scale=2.0, match_pairs=True)),
    "sd": ("dmd", dict(teacher="tiny-sd", prompts="shapes-held")),
    "cm": ("cm", dict(teacher="tiny", data="digits")),
    "ict": ("cm", dict(method="ict", data="digits", network=NETWORK)),
    "train": ("train", dict(network=NETWORK)),
    "vae": ("vae", dict(network=dict(channels=[8, 8], groups=4))),
}


def opened(config, dry_run=False):
    method = method_of(config)
    return load(f"methods.{method.objective}")(config, Job(method.command, dry_run=dry_run))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_what_the_run_takes(kind, tmp_path, tiny_pairs):
    command, keys = KINDS[kind]
    config = options(command, **SMALL, **keys, out=tmp_path / "r", **({"pairs": tiny_pairs} if kind == "dmd" else {}))
    planned = opened(config, True)
    assert kind not in ("dmd", "sd", "cm") or all(p.is_meta for each in planned.trained.values() for p in each.parameters())
    objective = opened(config)
    said = plan(objective)
    assert plan(planned) == said
    AcceleratorState._reset_state(True)
    engine = Engine(objective.config, objective)
    engine.open(Run.create(tmp_path / "r", "", kind))
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
    assert float(re.search(r"about (\d+) MB", said["disk"])[1]) / 500 == pytest.approx(size / 1e6, rel=0.02)


def test_arithmetic_by_hand(tmp_path, tiny_pairs):
    """The guided teacher's two calls and the fake score's, and three times as much for what is trained, all on both batches."""
    config = DMDConfig(**SMALL | {"steps": 10}, teacher="tiny", guidance_scale=2.0, match_pairs=True, pairs=tiny_pairs, fake_steps=2)
    calls = opened(config, True).calls()
    assert calls.evaluations() == 8 + 8 + 8 + 3 * (8 + 2 * 8)
    assert str(calls) == "trains student on 8 images, fake on 16 images; evaluates teacher on 16 images, fake on 8 images"

"""distill bench: it counts the right calls, and times both sides of the same."""

import pytest
import torch

from distill_cli.bench import cases
from distill_cli.config import PairsConfig, SampleConfig
from distill_cli.methods.dmd.config import DMDConfig
from tests.options import options


@pytest.fixture(autouse=True)
def any_precision():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # accelerate keeps one precision a process
    yield
    AcceleratorState._reset_state(True)


def calls_of(case, monkeypatch):
    """For each side: images forward without gradient, with gradient, networks that got one, optimizer steps."""
    from diffusers import UNet2DModel

    counts = []
    original, stepped = UNet2DModel.forward, {}

    def counting(self, x, *arguments, **options):
        counts[-1][1 if torch.is_grad_enabled() else 0] += len(x)
        return original(self, x, *arguments, **options)

    def stepping(optimizer):
        def step(self, *arguments, **options):
            counts[-1][2] += all(p.grad is not None for p in self.param_groups[0]["params"] if p.requires_grad and p.ndim == 4)
            counts[-1][3] += 1
            return stepped[optimizer](self, *arguments, **options)

        return step

    monkeypatch.setattr(UNet2DModel, "forward", counting)
    for optimizer in (torch.optim.AdamW, torch.optim.RAdam):
        stepped[optimizer] = optimizer.step
        monkeypatch.setattr(optimizer, "step", stepping(optimizer))
    for side in (case.ours, case.bare()):
        counts.append([0, 0, 0, 0])
        side()
    return counts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [8, 12, 2, 2]),  # teacher and fake score; student on noise and on pairs, fake score
        ({"fake_steps": 2}, [8, 16, 3, 3]),
        ({"regression_weight": 0}, [8, 8, 2, 2]),
        ({"matching_weight": 0}, [0, 4, 1, 1]),
        ({"fake_score": False, "regression_weight": 0}, [4, 4, 1, 1]),
        ({"guidance_scale": 2.0, "precision": "bf16"}, [12, 12, 2, 2]),
    ],
)
def test_both_sides_of_dmd_call_the_networks_alike(options, expected, tmp_path, monkeypatch, tiny_pairs):
    config = DMDConfig(teacher="tiny", batch_size=4, device="cpu", pairs=tiny_pairs, **options)
    ours, raw = calls_of(cases.training("dmd", config, tmp_path), monkeypatch)
    assert ours == raw == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "cd"}, [12, 4, 1, 1]),  # the teacher's Heun step, the target; the student
        ({"method": "cd", "solver": "euler", "guidance_scale": 2.0}, [12, 4, 1, 1]),
        ({"method": "cd", "teacher_steps": 2}, [20, 4, 1, 1]),
        ({"method": "ct"}, [4, 4, 1, 1]),
        ({"method": "ect"}, [4, 4, 1, 1]),
        ({"method": "ect", "precision": "bf16"}, [4, 4, 1, 1]),
    ],
)
def test_both_sides_of_cm_call_the_networks_alike(given, expected, tmp_path, monkeypatch):
    config = options("cm", **{"teacher": "tiny", "data": "digits", "batch_size": 4, "device": "cpu"} | given)
    ours, raw = calls_of(cases.training("cm", config, tmp_path), monkeypatch)
    assert ours == raw == expected


def test_both_sides_of_pairs_call_the_networks_alike(tmp_path, monkeypatch):
    config = PairsConfig(teacher="tiny", batch_size=4, steps=2, device="cpu")
    ours, raw = calls_of(cases.bench_pairs(config, tmp_path), monkeypatch)
    assert ours == raw == [3 * 4 * 3, 0, 0, 0]


@pytest.mark.parametrize("command", ["train", "dmd", "sample"])
def test_the_command(command, distill):
    options = {"train": ["batch_size=8"], "dmd": ["teacher=tiny", "batch_size=4"], "sample": ["model=tiny", "steps=1", "batch_size=8"]}
    result = distill("bench", command, "--repeats", 2, "--json", "device=cpu", *options[command])
    assert result.code == 0, result.err
    data = result.json
    assert data["bench"] == command
    assert 0.5 < data["ratio"] < 100
    assert data["images_per_second"] == pytest.approx({"train": 8, "dmd": 4, "sample": 24}[command] / data["ours_seconds"], rel=0.01)


def test_an_unknown_command_names_the_nearest(distill):
    result = distill("bench", "dme")
    assert result.code == 2
    assert "did you mean dmd?" in result.err


def test_text_models_are_timed_against_diffusers_pipeline(tmp_path, monkeypatch):
    """Both sides make the same pictures' worth of calls, guided: two images a picture and step."""
    from diffusers import UNet2DConditionModel

    seen = []
    original = UNet2DConditionModel.forward
    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda self, x, *a, **o: seen.append(len(x)) or original(self, x, *a, **o))
    case = cases.bench_sample(SampleConfig(model="tiny-sd", batch_size=2, steps=3, solver="ddim", device="cpu"), tmp_path)
    counts = []
    for side in (case.ours, case.bare()):
        seen.clear()
        side()
        counts.append(list(seen))
    assert counts[0] == counts[1] == [4] * 3 * cases.BATCHES
    assert case.images == 2 * cases.BATCHES


def test_both_sides_of_latent_dmd_are_the_same_network(tmp_path):
    case = cases.training("dmd", DMDConfig(teacher="tiny-sd", batch_size=2, device="cpu", out=tmp_path / "o"), tmp_path)
    assert case.calls == "3 forwards, 2 x (forward, backward, optimizer)"  # guided teacher, fake score
    case.ours()
    case.bare()()

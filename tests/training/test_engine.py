"""The loop: schedules, averages, exact resume, and what it says when a run goes wrong."""

import json
import math
import os
import random
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from distill_cli.data import open_images
from distill_cli.errors import DistillError, Interrupted, UsageError
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import DMD
from distill_cli.methods.train.config import TrainConfig
from distill_cli.methods.train.denoising import Denoising
from distill_cli.pairs.store import PairStore
from distill_cli.recipes import dump
from distill_cli.runs import Run
from distill_cli.training import checkpoint
from distill_cli.training.ema import EMA
from distill_cli.training.engine import Engine
from distill_cli.training.health import Health
from tests.options import consistency, options

SMALL = dict(batch_size=4, device="cpu", sample_every=0, log_every=3, save_every=2, keep=9)
NETWORK = dict(channels=[8, 16], attention=[False, False], groups=4, head=8)


def engine_of(kind, folder, tiny, tiny_pairs, resume=False, **changes):
    if kind == "dmd":
        config = DMDConfig(
            **SMALL | dict(teacher="tiny", pairs=tiny_pairs, warmup_steps=2, ema_halflife=40, fake_steps=2, lr=1e-3) | changes
        )
        objective = DMD(config, tiny.copy(), PairStore(tiny_pairs))
    elif kind == "cm":
        config = options("cm", **SMALL | dict(teacher="tiny", data="digits", method="ct", ema_halflife=40, dropout=0.2) | changes)
        objective = consistency(config, tiny.copy(), open_images("digits"))
    else:
        config = TrainConfig(**SMALL | dict(network=NETWORK | {"dropout": 0.2}, ema_halflife=40) | changes)
        objective = Denoising(config, open_images("digits"))
    AcceleratorState._reset_state(True)  # accelerate keeps one precision a process
    engine = Engine(config, objective)
    engine.open(Run.resume(folder) if resume else Run.create(folder, dump(config), kind))
    return engine


def weights(folder, step):
    path = checkpoint.path_of(folder / "checkpoints", step)
    return {file.name: load_file(file) for file in path.glob("*.safetensors")} | {
        "optimizers": torch.load(path / "optimizers.pt", weights_only=True)
    }


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_resume_does_not_move_the_end_of_the_regression(tmp_path, tiny, tiny_pairs):
    """3 of 8 steps with the regression, at once, and as a run of 2 steps, then of 5, then of 8: the same bits."""
    changes = dict(regression_steps=3, lr_schedule="constant")
    engine_of("dmd", tmp_path / "whole", tiny, tiny_pairs, steps=8, **changes).train()
    for steps in (2, 5, 8):
        engine_of("dmd", tmp_path / "parts", tiny, tiny_pairs, resume=steps > 2, steps=steps, **changes).train()
    assert same(weights(tmp_path / "whole", 8), weights(tmp_path / "parts", 8))
    last = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in last if "regression_loss" in line] == [3]


def test_average_halves_in_its_halflife():
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1.0)
    ema = EMA(network, halflife=100)
    network.weight.data.fill_(0.0)
    for step in range(10):
        ema.update(network, seen=1_000_000 + step * 10, batch=10)
    assert ema.network.weight.item() == pytest.approx(0.5, rel=1e-5)
    assert EMA(network, 100).decay(seen=1000, batch=10) == pytest.approx(0.5 ** (10 / 50))  # the ramp: 5% of the images seen
    following = EMA(network, 0)
    network.weight.data.fill_(3.0)
    following.update(network, 10, 10)
    assert following.network.weight.item() == 3.0


def test_another_optimizer_resumes_exactly(tmp_path, tiny, tiny_pairs):
    """Weights, averages, moments and metrics, bit for bit, after half a line in the log; the methods' own are in tests/contracts."""
    kind, changes = "cm", dict(steps=7, optimizer="muon")
    engine_of(kind, tmp_path / "whole", tiny, tiny_pairs, **changes).train()
    first = engine_of(kind, tmp_path / "parts", tiny, tiny_pairs, **changes)
    for _ in range(4):
        first.train_step()
        if first.step == 3:
            first._log()
    first.save()
    assert (checkpoint.path_of(first.run.checkpoints, 4) / "target.safetensors").is_file()
    first.train_step()  # killed here: this step and a half-written line are lost
    with open(first.run.metrics, "a") as handle:
        handle.write('{"step": 6, "imag')
    engine_of(kind, tmp_path / "parts", tiny, tiny_pairs, resume=True, **changes).train()
    assert same(weights(tmp_path / "whole", 7), weights(tmp_path / "parts", 7))
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()
    file = "student/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_what_a_resumed_run_may_change(tmp_path, tiny, tiny_pairs, monkeypatch):
    """Settings of the optimizer are those of the recipe as it is now; another optimizer, or other pairs, are refused."""
    first = engine_of("dmd", tmp_path / "r", tiny, tiny_pairs, steps=4)
    first.train_step()
    first.save()
    again = engine_of("dmd", tmp_path / "r", tiny, tiny_pairs, resume=True, steps=4, betas=(0.5, 0.6), weight_decay=0.25)
    for optimizer in again.optimizers.values():
        assert [(tuple(group["betas"]), group["weight_decay"]) for group in optimizer.param_groups] == [((0.5, 0.6), 0.25)]
    with pytest.raises(UsageError, match="optimizer: radam; the run has begun with adamw"):
        engine_of("dmd", tmp_path / "r", tiny, tiny_pairs, resume=True, steps=4, optimizer="radam")
    monkeypatch.setattr(PairStore, "__len__", lambda self: 11)
    with pytest.raises(UsageError, match="images or pairs: 11; the run has begun with 12"):
        engine_of("dmd", tmp_path / "r", tiny, tiny_pairs, resume=True, steps=4)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
def test_a_signal_leaves_a_run_that_resumes(number, code, tmp_path, tiny, tiny_pairs):
    """The user's interrupts, the scheduler's only preempt: as planned."""
    engine = engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, steps=50, save_every=100)
    step = engine.train_step
    engine.train_step = lambda: (step(), os.kill(os.getpid(), number) if engine.step == 3 else None)
    with pytest.raises(Interrupted, match="stopped at step 3 of 50") as error:
        engine.train()
    assert error.value.hint == f"resume with --resume {tmp_path / 'run'}"
    assert error.value.exit_code == code
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [3]
    assert engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, resume=True, steps=50).step == 3


def test_fewer_steps_than_there_are_is_refused(tmp_path, tiny, tiny_pairs):
    engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, steps=2).train()
    with pytest.raises(UsageError, match="--steps 1: the run is at step 2 already"):
        engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, resume=True, steps=1)


@pytest.mark.parametrize(("changes", "says"), [({"precision": "fp16"}, "fp16: needs a GPU"), ({"device": "cuda"}, "no CUDA device")])
def test_what_this_machine_has_not_is_refused_before_a_folder_is_made(changes, says, tmp_path, tiny, tiny_pairs):
    with pytest.raises(UsageError, match=says):
        engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, **changes)
    assert not (tmp_path / "run").exists()


def test_only_the_newest_checkpoints_stay(tmp_path, tiny, tiny_pairs):
    engine_of("train", tmp_path / "run", tiny, tiny_pairs, steps=8, keep=2, network=NETWORK).train()
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [6, 8]


@pytest.mark.parametrize("name", ["student.safetensors", "optimizers.pt", "state.json"])
def test_corrupt_checkpoints_are_found(name, tmp_path, tiny, tiny_pairs):
    engine = engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, steps=9)
    engine.train_step()
    engine.save()
    path = checkpoint.path_of(tmp_path / "run/checkpoints", 1) / name
    content = bytearray(path.read_bytes())
    content[0 if name == "state.json" else len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(DistillError, match=f"{name}: corrupt"):
        engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, resume=True, steps=9)


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path, tiny, tiny_pairs):
    """200 random ones, evenly over the files, before anything of the checkpoint is used."""
    engine = engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, steps=9)
    engine.train_step()
    engine.save()
    before = {name: p.clone() for name, p in engine.plain["student"].named_parameters()}
    files = sorted(checkpoint.path_of(engine.run.checkpoints, 1).iterdir())
    assert len(files) == 5
    chance = random.Random(0)
    for turn in range(200):
        path = files[turn % len(files)]
        content = path.read_bytes()
        spoiled = bytearray(content)
        spoiled[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(spoiled)
        with pytest.raises(DistillError, match=f"{path.name}: corrupt"):
            checkpoint.load(engine.run.checkpoints, 1, engine._kept(), engine.optimizers)
        path.write_bytes(content)
    assert all(torch.equal(before[name], p) for name, p in engine.plain["student"].named_parameters())
    checkpoint.load(engine.run.checkpoints, 1, engine._kept(), engine.optimizers)


def test_nan_stops_at_the_last_good_checkpoint(tmp_path, tiny, tiny_pairs):
    engine = engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, steps=50)
    step = engine.train_step

    def poisoned():
        if engine.step == 4:
            with torch.no_grad():
                engine.plain["student"].network.unet.conv_out.bias.fill_(float("nan"))
        step()

    engine.train_step = poisoned
    with pytest.raises(DistillError, match="student_loss is not a number at step 5") as error:
        engine.train()
    assert "checkpoint of step 4 is good: lower lr in" in error.value.hint
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [2, 4]


def test_the_first_loss_that_is_no_number_is_named(tmp_path, tiny, tiny_pairs):
    """The fake score's, although the student's is no number either one step later."""
    engine = engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, steps=50, log_every=10, save_every=100)
    step = engine.train_step

    def poisoned():
        if engine.step == 2:
            engine.plain["fake"].register_forward_pre_hook(poison)
        step()

    engine.train_step = poisoned
    with pytest.raises(DistillError, match="fake_loss is not a number at step 3"):
        engine.train()


def poison(network, arguments):
    """A hook before a network's call: the input becomes no number where gradients are asked for."""
    return (arguments[0] * float("nan"), *arguments[1:]) if torch.is_grad_enabled() else None


def test_steps_without_a_finite_gradient_are_left_out(tmp_path, tiny, tiny_pairs):
    """Two of six: the weights move as by the other four alone, and the log counts them."""
    engine = engine_of("train", tmp_path / "run", tiny, tiny_pairs, steps=6, log_every=6, on_nan="skip", network=NETWORK, ema_halflife=0)
    step = engine.train_step
    before = {}

    def poisoned():
        bad = engine.step in (2, 3)
        if bad:
            before.update({name: p.clone() for name, p in engine.plain["teacher"].named_parameters()})
            hook = engine.plain["teacher"].register_forward_pre_hook(poison)
        step()
        if bad:
            hook.remove()
            assert all(torch.equal(before[name], p) for name, p in engine.plain["teacher"].named_parameters())

    engine.train_step = poisoned
    engine.train()
    (line,) = (json.loads(text) for text in engine.run.metrics.read_text().splitlines())
    assert line["skipped"] == 2
    assert math.isfinite(line["teacher_loss"])
    assert {int(state["step"]) for state in engine.optimizers["teacher"].optimizer.state.values()} == {4}


def test_leaving_out_every_step_ends(tmp_path, tiny, tiny_pairs):
    engine = engine_of("train", tmp_path / "run", tiny, tiny_pairs, steps=60, on_nan="skip", network=NETWORK, batch_size=1)
    engine.plain["teacher"].register_forward_pre_hook(poison)
    with pytest.raises(DistillError, match="50 steps in a row up to 50 had no finite gradient of teacher"):
        engine.train()


def test_each_network_is_counted_by_itself(tmp_path, tiny, tiny_pairs):
    """The student's gradient never is a number, the fake score's always: the run ends all the same, after a resume, too."""
    for steps, resume in ((20, False), (90, True)):
        engine = engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, resume, steps=steps, on_nan="skip", fake_steps=1, save_every=20)
        engine.plain["student"].register_forward_pre_hook(poison)
        if not resume:
            engine.train()
    with pytest.raises(DistillError, match="50 steps in a row up to 50 had no finite gradient of student"):
        engine.train()


def test_spikes_of_a_loss_are_counted():
    health = Health()
    losses = [1.0 + 0.01 * (-1) ** k for k in range(60)]
    losses[40], losses[50], losses[55] = 1.5, 0.5, float("nan")  # up, down (no spike), no number (one)
    for loss in losses:
        health.count("loss", torch.tensor(loss))
    assert health.spikes.item() == 2
    seen, mean, variance = health.running["loss"].tolist()
    assert (seen, mean) == (59, pytest.approx(1.0, abs=0.02))
    assert 0.005 < variance**0.5 < 0.1
    copy = Health()
    copy.load_state_dict(json.loads(json.dumps(health.state_dict())), torch.device("cpu"))
    for one in (health, copy):
        one.count("loss", torch.tensor(1.7))
    assert torch.equal(health.running["loss"], copy.running["loss"])
    assert copy.spikes.item() == health.spikes.item() == 3


def test_checkpoints_by_the_clock(tmp_path, tiny, tiny_pairs, monkeypatch):
    """Every 3 seconds of a clock that a step moves by one."""
    engine = engine_of("train", tmp_path / "run", tiny, tiny_pairs, steps=8, save_every="3s", network=NETWORK)
    monkeypatch.setattr("distill_cli.training.engine.time.monotonic", lambda: float(engine.step))
    engine.started = 0.0
    engine.train()
    assert checkpoint.steps(engine.run.checkpoints) == [3, 6, 8]


def test_the_best_checkpoints_stay(tmp_path):
    network = torch.nn.Linear(1, 1)
    for step, score in enumerate([5.0, 1.0, 4.0, None, 2.0, 3.0, 9.0], start=1):
        checkpoint.save(tmp_path, step, {"student": network}, {}, {"score": score}, keep=1, best=2)
    assert checkpoint.steps(tmp_path) == [2, 5, 7]


def test_a_result_that_is_older_than_the_last_checkpoint_is_made_again(tmp_path, tiny, tiny_pairs):
    """Killed after the last checkpoint of a longer run and before its result: the shorter run's result must not stay."""
    short = engine_of("train", tmp_path / "run", tiny, tiny_pairs, steps=2, network=NETWORK)
    short.train()
    file = tmp_path / "run/teacher/unet/diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    longer = engine_of("train", tmp_path / "run", tiny, tiny_pairs, resume=True, steps=4, network=NETWORK)
    while longer.step < 4:
        longer.advance()
    os.utime(tmp_path / "run/teacher", (1, 1))  # long ago
    longer.save()
    assert file.read_bytes() == before
    engine_of("train", tmp_path / "run", tiny, tiny_pairs, resume=True, steps=4, network=NETWORK).train()
    assert file.read_bytes() != before
    (tmp_path / "run/teacher/README.md").write_text("edited since")
    engine_of("train", tmp_path / "run", tiny, tiny_pairs, resume=True, steps=4, network=NETWORK).train()
    assert (tmp_path / "run/teacher/README.md").read_text() == "edited since"


def test_a_full_disk_leaves_the_older_checkpoints_whole(tmp_path, tiny, tiny_pairs, monkeypatch):
    engine = engine_of("train", tmp_path / "run", tiny, tiny_pairs, steps=6, network=NETWORK)
    write = torch.save

    def full(content, handle):
        if engine.step == 4:
            with open("/dev/full", "wb", buffering=0) as handle:
                write(content, handle)
        write(content, handle)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DistillError, match="no space left on device"):
        engine.train()
    assert [path.name for path in engine.run.checkpoints.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert engine_of("train", tmp_path / "run", tiny, tiny_pairs, resume=True, steps=6, network=NETWORK).step == 2


def test_a_tracker_gets_what_the_log_gets(tmp_path, tiny, tiny_pairs):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    changes = dict(steps=4, log_every=2, tracker="tensorboard", out=tmp_path / "run", network=NETWORK)
    engine = engine_of("train", tmp_path / "run", tiny, tiny_pairs, **changes)
    engine.train()
    lines = [json.loads(line) for line in engine.run.metrics.read_text().splitlines()]
    (file,) = (path for path in (tmp_path / "run/distill").glob("*tfevents*"))
    found = events.EventAccumulator(str(file))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("teacher_loss")] == [(line["step"], line["teacher_loss"]) for line in lines]
    with pytest.raises(UsageError, match="wandb is not installed"):
        engine_of("train", tmp_path / "other", tiny, tiny_pairs, tracker="wandb", network=NETWORK)


def test_an_existing_folder_is_never_overwritten(tmp_path, tiny, tiny_pairs):
    engine_of("train", tmp_path / "run", tiny, tiny_pairs, steps=1)
    with pytest.raises(UsageError, match="exists already") as error:
        Run.create(tmp_path / "run", "", "train")
    assert "--resume" in error.value.hint


def test_metrics_are_means_of_their_window(tmp_path, tiny, tiny_pairs):
    each = engine_of("train", tmp_path / "each", tiny, tiny_pairs, steps=6, log_every=1, network=NETWORK)
    each.train()
    engine_of("train", tmp_path / "means", tiny, tiny_pairs, steps=6, log_every=3, network=NETWORK).train()
    ones = [json.loads(line)["teacher_loss"] for line in each.run.metrics.read_text().splitlines()]
    means = [json.loads(line)["teacher_loss"] for line in (tmp_path / "means/metrics.jsonl").read_text().splitlines()]
    assert means == pytest.approx([sum(ones[:3]) / 3, sum(ones[3:]) / 3], rel=1e-6)

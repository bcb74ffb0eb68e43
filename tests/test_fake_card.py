"""CUDA code on a machine without a card (fake_card.py): whole commands run on it, no operation mixes devices, nobody waits in a step.

python -m tests.test_fake_card [NAME...]    # prints copies, waits and casts in bf16: of a step of a case, of four pictures of a sample
"""

import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState

from distill_cli.diffusion.transfer import sent
from tests.fake_card import COUNTS, Card, WrongDeviceError, card
from tests.fake_card_cases import BLOCKING, CASES, CAST, CAST_FOR_FOUR, COPIES, SAMPLES, WAITS, made
from tests.looking import few_shapes
from tests.unchanged.record import FOLDERS

TEACHER_PAIRS = ("--num", 4, "--steps", 2, "shard_size=4", "batch_size=4", "--device", "cpu")


def call(*arguments):
    from distill_cli.cli.app import run

    AcceleratorState._reset_state(True)
    try:
        assert run([str(argument) for argument in arguments]) == 0, arguments
    finally:
        AcceleratorState._reset_state(True)


def inputs(name, folder):
    """What a case reads, made on the CPU."""
    command = CASES[name]
    Path(folder, "prompts.txt").write_text("a red circle\na small blue square\n")
    teacher = {"pairs-tiny": ("tiny",), "pairs-tiny-sd": ("tiny-sd", "--prompts", "shapes-held")}
    for store, about in teacher.items():
        if store in command:
            call("pairs", "--teacher", *about, *TEACHER_PAIRS, "--out", store)
    if "vae=vae" in command and not Path(folder, "vae").exists():
        (Path(folder) / "vae").symlink_to(FOLDERS / "vae")


def half(name):
    """What makes a case compute in bf16."""
    return () if "precision=bf16" in CASES[name] else ("precision=bf16",)


def trained(name, *more):
    """Train 3 steps on the card; returns the counts of the second."""
    from distill_cli.training.engine import Engine

    steps, plain = [], Engine.advance

    def advance(self):
        COUNTS.clear()
        out = plain(self)
        steps.append((COUNTS.numbers(), dict(COUNTS.where)))
        return out

    command = made(CASES[name])
    with patch("distill_cli.cli.common.compare"), patch.object(Engine, "advance", advance), few_shapes(), card():
        call(*command, "--device", "cuda", "--steps", 3, "log_every=1000", "sample_every=0", "save_every=2", *more, "--out", name)
    return steps[1]


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_each_method_stays_on_the_card(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs(name, tmp_path)
    counts, where = trained(name)
    assert counts["to_host"] == 0, where
    assert counts["blocking"] <= BLOCKING.get(name, 0), where
    assert counts["waits"] <= WAITS.get(name, 0), where
    assert 0 < counts["to_card"] <= COPIES[name], where


@pytest.mark.parametrize("name", CAST)
def test_a_step_in_half_precision_casts_no_more_than_it_must(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs(name, tmp_path)
    counts, _ = trained(name, *half(name))
    assert 0.9 * CAST[name] < counts["cast_values"] <= CAST[name]


@pytest.mark.parametrize("name", CAST_FOR_FOUR)
def test_pictures_in_half_precision_cast_no_weight_and_wait_for_two_copies(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = of_four(name)
    assert 0.9 * CAST_FOR_FOUR[name] < counts["cast_values"] <= CAST_FOR_FOUR[name]
    assert counts["blocking"] <= 2


def test_every_method_and_every_tiny_model_is_a_case():
    from distill_cli.methods.registry import METHODS
    from distill_cli.models.sources.catalog import MADE

    assert all(any(each.command == command[0] and each.name in command for command in CASES.values()) for each in METHODS)
    for commands in (CASES, SAMPLES):
        assert {word for command in commands.values() for word in command if isinstance(word, str)} >= MADE.keys()


def test_a_run_on_the_card_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained("ct-tiny")
    with patch("distill_cli.cli.common.compare"), card():
        call("cm", "--resume", "ct-tiny", "--steps", 4)
    assert (tmp_path / "ct-tiny/checkpoints/step-000004").is_dir()


@pytest.mark.parametrize("name", SAMPLES)
def test_pictures_of_the_card_are_the_hosts(name, tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    command = ("sample", *made(SAMPLES[name]), "--num", 4, "--seed", 6, "format=npz")
    call(*command, "--device", "cpu", "--out", "host")
    with card() as counts:
        call(*command, "--device", "cuda", "--out", "card")
    assert counts.to_card > 0  # so it was there
    here, there = (np.load(Path(folder, "samples.npz"))["arr_0"] for folder in ("host", "card"))
    assert np.abs(here.astype(float) - there).max() <= (1 if here.dtype == np.uint8 else 1e-4)


def test_pairs_of_the_card_are_the_hosts(tmp_path, monkeypatch):
    from distill_cli.pairs.store import PairStore

    monkeypatch.chdir(tmp_path)
    call("pairs", "--teacher", "tiny", *TEACHER_PAIRS, "--out", "host")
    with card():
        call("pairs", "--teacher", "tiny", *TEACHER_PAIRS[:-1], "cuda", "--out", "card")
    here, there = (PairStore(Path(folder)).batch(range(4))["x0"].float() for folder in ("host", "card"))
    assert (here - there).abs().max() < 2e-3  # stored in float16


def test_what_a_card_refuses_and_what_it_waits_for():
    with card() as counts:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert isinstance(there, Card)
        with pytest.raises(WrongDeviceError, match="add: tensors of two devices"):
            there + here
        with pytest.raises((RuntimeError, TypeError), match="numpy"):
            there.numpy()
        counts.clear()
        assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number travels with the call
        assert (counts.to_card, counts.to_host, counts.waits) == (0, 0, 1)
        there[there > 0]
        there.sum().item()
        there.cpu()
        there + here.to(there.device)
        there.double()
        assert counts.numbers() == {"to_card": 1, "blocking": 1, "to_host": 1, "waits": 3, "casts": 1, "cast_values": 3}
        counts.clear()
        sent(here, "cuda")
        assert (counts.to_card, counts.blocking) == (1, 0)
        with torch.autocast("cuda", torch.bfloat16):
            assert (torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")).dtype == torch.bfloat16
        layer = torch.nn.Linear(2, 2).to("cuda")
        layer.weight.data = layer.weight.data.to(torch.bfloat16)
        assert layer.to("cuda").weight.dtype == torch.bfloat16  # also of what it holds
        weight = torch.ones(2, device="cuda", requires_grad=True)
        (weight * 3).sum().backward()
        assert weight.grad.device.type == "cuda"
    assert not torch.cuda.is_available()


def of_four(name):
    """Counts of four pictures in bf16: what a second batch of four takes."""
    command, both = (*made(SAMPLES[name]), "precision=bf16"), []
    for number in (4, 8):
        with card() as seen:
            call("sample", *command, "--num", number, "batch_size=4", "format=npz", "--device", "cuda", "--out", f"{name}-{number}-s")
        both.append(seen.numbers())
    return {key: both[1][key] - both[0][key] for key in both[0]}


def table(names):
    """Lines of a table: counts a step, and of four pictures."""
    rows = [
        "| job | copies to the card | for which the host waits | copies back | waits | casts | values cast |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [each for each in CASES if each in names or not names]:
        os.chdir(tempfile.mkdtemp())
        inputs(name, ".")
        counts, where = trained(name, *half(name))
        print(name, counts, where, file=sys.stderr)
        rows.append(f"| a step of {name} | " + " | ".join(f"{value:,}" for value in counts.values()) + " |")
    for name in [each for each in SAMPLES if each in names or not names]:
        rows.append(f"| 4 pictures of {name} | " + " | ".join(f"{value:,}" for value in of_four(name).values()) + " |")
    return rows


if __name__ == "__main__":
    print("\n".join(table(sys.argv[1:])))

"""Losses, gradient norms, pairs, samples and folders are what they were when they were recorded (record.py).

Bit for bit on the processor model and the torch version of the recording, else to 1e-3 (pairs, losses) and one grey level (samples).
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.unchanged import record

ARRAYS = load_file(record.ARRAYS)
SAME = json.loads(record.MACHINE.read_text()) == record.machine()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The order of sums depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hold(name, found, tolerance):
    wanted = ARRAYS[name]
    assert found.shape == wanted.shape
    if SAME:
        assert torch.equal(found, wanted), f"{name}: off by {(found.double() - wanted.double()).abs().max():.3g}"
    else:
        assert torch.allclose(found.double(), wanted.double(), atol=tolerance, rtol=tolerance if tolerance < 1 else 0)


@pytest.mark.parametrize("name", record.PAIRS)
def test_pairs_and_samples(name, tmp_path):
    hold(f"pairs.{name}", record.pairs(name, tmp_path), 1e-3)  # stored in float16
    hold(f"samples.{name}", record.samples(name, tmp_path / "samples", 3), 1.0)


@pytest.mark.parametrize("name", record.RUNS)
def test_the_first_steps_of_every_method(name, tmp_path):
    for store in [word for word in record.RUNS[name] if str(word).startswith("pairs-")]:
        record.pairs(store.removeprefix("pairs-"), tmp_path)
    if "vae=vae" in record.RUNS[name]:
        shutil.copytree(record.FOLDERS / "vae", tmp_path / "vae")
    hold(f"losses.{name}", record.losses(name, tmp_path), 1e-3)


@pytest.mark.parametrize("name", [name for name, part in record.KEPT.items() if part in ("student", "teacher")])
def test_folders_as_they_were_written_open(name, tmp_path):
    steps = 2 if record.KEPT[name] == "teacher" else None
    hold(f"folder.{name}", record.samples(record.FOLDERS / name, tmp_path / "s", steps), 1.0)


def test_an_autoencoder_and_a_classifier_open():
    from distill_cli.models import classifier
    from distill_cli.models.stable_diffusion import load_vae

    assert load_vae(record.FOLDERS / "vae").config.scaling_factor > 0
    assert classifier.load(str(record.FOLDERS / "classifier")).info.width == 16

"""Sampling jobs: the same images however they are made, and what a solver's name means."""

import os
import signal
import tracemalloc

import numpy as np
import pytest
import torch

from distill_cli.config import SampleConfig
from distill_cli.diffusion import solvers
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import Interrupted
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampling
from distill_cli.sample.batch import Samples, sample
from tests.conditions import of

SETTINGS = dict(model="tiny", num=7, batch_size=2, steps=2, format="npz", seed=3, device="cpu")


def images(folder):
    with np.load(folder / "samples.npz") as stored:
        return stored["arr_0"], stored["arr_1"]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples") / "whole"
    sample(SampleConfig(**SETTINGS), tiny.copy(), folder)
    return images(folder)


def test_an_interrupted_job_ends_the_same(tmp_path, tiny, whole, monkeypatch):
    original, calls = Model.sample, []

    def sample_then_signal(self, *arguments):
        calls.append(os.kill(os.getpid(), signal.SIGTERM) if len(calls) == 1 else None)
        return original(self, *arguments)

    monkeypatch.setattr(Model, "sample", sample_then_signal)
    with pytest.raises(Interrupted, match="stopped before image 4"):
        sample(SampleConfig(**SETTINGS), tiny.copy(), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("part-*")) == ["part-000000.npz", "part-000002.npz"]  # the last one too is written
    monkeypatch.undo()
    done = sample(SampleConfig(**SETTINGS), tiny.copy(), tmp_path)
    assert (done["made"], done["kept"]) == (3, 4)
    for ours, theirs in zip(images(tmp_path), whole, strict=True):
        assert np.array_equal(ours, theirs)


def test_parts_are_joined_one_at_a_time(tmp_path, tiny):
    """The file is np.savez's to the byte; of 16 parts of 1 MB never more than four are in memory."""
    config = SampleConfig(**SETTINGS | dict(num=16 * 1300, batch_size=1300))
    job = Samples(tmp_path, config, tiny)
    x = np.random.default_rng(0).integers(0, 256, (config.num, 16, 16, 3), dtype=np.uint8)
    for batch in job.batches:
        job.write(batch, x[batch.start : batch.stop])
    tracemalloc.start()
    job.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * x[:1300].nbytes
    np.savez(tmp_path / "expected.npz", arr_0=x, arr_1=job.labels)
    assert job.npz.read_bytes() == (tmp_path / "expected.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("part-*")) == []
    assert np.array_equal(job.first(3), x[:3])


def test_processes_share_the_work(tmp_path, tiny, whole, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = 0
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        made += sample(SampleConfig(**SETTINGS), tiny.copy(), tmp_path)["made"]
    assert made == 7
    for ours, theirs in zip(images(tmp_path), whole, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_solvers_name_means_that_solver(tiny):
    draws, labels = Draws(0, range(2)), torch.tensor([1, 2])
    schedule, x = tiny.denoiser.schedule, 80.0 * Draws(0, range(2)).normal("prior", tiny.shape)
    times = schedule.times(4)

    def noise(k):
        return draws.normal("solver", tiny.shape, turn=k)

    expected = {
        "heun": solvers.heun(tiny.denoiser, schedule, x, times, of(labels)),
        "heun-churn": solvers.heun(tiny.denoiser, schedule, x, times, of(labels), noise=noise),
        "euler": solvers.ddim(tiny.denoiser, schedule, x, times, of(labels)),
        "ddim": solvers.ddim(tiny.denoiser, schedule, x, times, of(labels)),
        "ancestral": solvers.ddim(tiny.denoiser, schedule, x, times, of(labels), noise=noise),
        "few-step": solvers.few_step(
            tiny.denoiser, schedule, x, times, of(labels), sigma_min=0.002, noise=noise, project=tiny.codec.decode
        ),
    }
    for name, images in expected.items():
        assert torch.equal(tiny.sample(draws, labels, Sampling(solver=name, steps=4)), images.clamp(-1, 1))

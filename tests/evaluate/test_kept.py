"""Features that are kept: nothing is computed twice, what has changed is computed again, and pictures are never all in memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_cli.data.npz import Rows
from distill_cli.evaluate import kept
from distill_cli.evaluate.distances import inception_score, kernel_distance
from distill_cli.evaluate.measures import MEASURES, Reference
from distill_cli.evaluate.networks import Network
from distill_cli.evaluate.sources import File, Pictures


class Mean(Network):
    """Sees the mean of each channel, and counts the pictures it is shown."""

    name, prefix, distance, suffix, measures = "mean", "mean_", "FD", "", ("frechet",)
    width, digest, about, batch = 3, "ab" * 32, "means", 20

    def __init__(self, stop=None):
        self.count, self.stop = 0, stop

    def __call__(self, x):
        if self.stop is not None and self.count >= self.stop:
            raise KeyboardInterrupt
        self.count += len(x)
        return {"features": x.mean((2, 3))}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "SHARD", 50)
    x = np.random.default_rng(0).integers(0, 255, (220, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=x)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=x)
    return x


def see(path, network):
    source = Pictures(path, "--model") if path.is_dir() else File(path, "--model")
    return kept.seen(network, source, path.parent / "job", torch.device("cpu")).features


@pytest.mark.parametrize("name", ["x.npz", "packed.npz"])
def test_interrupted_and_gone_on_with(name, file, tmp_path, monkeypatch):
    expected = torch.from_numpy(file).float().permute(0, 3, 1, 2).mean((2, 3)) / 127.5 - 1
    parts = []
    read = Rows.read
    monkeypatch.setattr(Rows, "read", lambda self, part: (parts.append(len(part)), read(self, part))[1])
    with pytest.raises(KeyboardInterrupt):
        see(tmp_path / name, Mean(stop=110))
    second = Mean()
    assert torch.allclose(see(tmp_path / name, second), expected, atol=1e-5)
    assert second.count == 120  # two shards of 50 were complete
    assert max(parts) == Mean.batch
    again = Mean()
    see(tmp_path / name, again)
    assert again.count == 0
    shard = next(tmp_path.glob(f".{name}.features/mean-*/000050.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert torch.allclose(see(tmp_path / name, again), expected, atol=1e-5)
    assert again.count == 50
    os.utime(tmp_path / name, (1, 1))  # another file of that name
    see(tmp_path / name, again)
    assert again.count == 50 + 220


MEMORY = """
import resource, sys, torch
from pathlib import Path
from distill_cli.evaluate.kept import seen
from distill_cli.evaluate.sources import File
from tests.evaluate.test_kept import Mean
for name in ("few", "many"):
    print(len(seen(Mean(), File(Path(f"{name}.npz"), "--model"), Path(), torch.device("cpu"))))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_many_pictures_take_no_more_memory_than_few(tmp_path):
    """40,000 of 32 pixels are 123 MB as bytes and 492 MB as numbers; the peak over that of 2,000 is a small part of it."""
    for name, count in {"few": 2000, "many": 40_000}.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=np.ones((count, 32, 32, 3), np.uint8))
    root = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, env=os.environ | root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    few, begun, many, peak = map(int, ended.stdout.split())
    assert (few, many) == (2000, 40_000)
    assert peak - begun < 40


def test_a_picture_that_has_changed_is_seen_again(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(kept, "SHARD", 4)
    (tmp_path / "p").mkdir()
    for k in range(10):
        Image.new("RGB", (8, 8), (20 * k, 0, 0)).save(tmp_path / f"p/{k}.png")
    see(tmp_path / "p", Mean())
    Image.new("RGB", (8, 8), (0, 255, 0)).save(tmp_path / "p/5.png")
    again = Mean()
    assert see(tmp_path / "p", again)[5].tolist() == pytest.approx([-1, 1, -1])
    assert again.count == 4


def test_copies_are_told_from_new_pictures():
    """Copies of 50 of the real ones, against new ones of the same distribution: half of those are nearer than their neighbour's own."""
    generator = torch.Generator().manual_seed(0)
    real, new = torch.randn(1000, 4, generator=generator), torch.randn(1000, 4, generator=generator)
    copies = real[torch.arange(50).repeat(20)] + 1e-3 * torch.randn(1000, 4, generator=generator)
    reference = Reference(kept.Seen(real), None, 3)
    (share, error), (nearness, _) = MEASURES["memorisation"].made(reference, kept.Seen(copies), None)
    assert share > 0.98
    assert nearness < 0.02
    (share, error), (nearness, _) = MEASURES["memorisation"].made(reference, kept.Seen(new), None)
    assert share == pytest.approx(0.5, abs=4 * error)
    assert nearness == pytest.approx(1, abs=0.1)


def test_density_and_coverage_of_points_on_a_line():
    """Reals at 0..9 with k = 1 reach 1 (Naeem et al. 2002.09797): a fake at 4.5 lies in the balls of 4 and 5, one at 20 in none."""
    real, fake = torch.arange(10.0)[:, None], torch.tensor([[4.5], [20.0]])
    (density, _), (coverage, _) = MEASURES["density-coverage"].made(Reference(kept.Seen(real), None, 1), kept.Seen(fake), None)
    assert density == pytest.approx((2 + 0) / 2)
    assert coverage == pytest.approx(2 / 10)


def test_kernel_distance_and_score_in_closed_form():
    """All of one value: the kernel is constant, so KID is 0 between equal sets. Two classes, certain and equally many: the score is 2."""
    ones = torch.ones(12, 4)
    assert kernel_distance(ones, ones, 5, 10) == pytest.approx((0, 0), abs=1e-12)
    assert kernel_distance(ones, 0 * ones, 5, 10)[0] == pytest.approx(8 + 1 - 2)  # (1 + 1)^3 + (0 + 1)^3 - 2 (0 + 1)^3
    logits = torch.eye(2).repeat(500, 1) * 100
    assert inception_score(logits, 1)[0] == pytest.approx(2)

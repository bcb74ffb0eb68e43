"""What tests share: closed-form teachers, golden numbers, the command line, tiny models."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what is asserted to the last bit is the CPU's
GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    """The slow ones first, so that of several processes none is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def no_power_cut():
    """A kill leaves what was written to the system, so nothing waits for the disk."""
    with patch.object(os, "fsync", lambda _: None):
        yield


@pytest.fixture(scope="session", autouse=True)
def looked_at_little():
    from tests.looking import little

    with little():
        yield


@pytest.fixture(scope="module", autouse=True)
def settled():
    """What is there when a module's tests begin stays: the collections of every run need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def golden():
    """Tensors and header of a golden file, and its mixtures as denoisers."""
    from safetensors import safe_open

    from distill_cli.diffusion.denoiser import MixtureDenoiser

    class Golden(dict):
        def mixture(self, name, schedule=None):
            return MixtureDenoiser(self[f"{name}.means"], self[f"{name}.weights"], self[f"{name}.std"].item(), schedule)

    def load(name):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as handle:
            out = Golden({key: handle.get_tensor(key) for key in handle.keys()})  # noqa: SIM118
            out.header = {key: json.loads(value) for key, value in (handle.metadata() or {}).items()}
        return out

    return load


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def distill(capsys, tmp_path, monkeypatch):
    """Run a command line in an empty folder: distill("pairs", "--num", 3) -> code, out, err."""
    from distill_cli.cli.app import run

    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny():
    from distill_cli.models import load

    return load("tiny")


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory, tiny):
    """A small store of the tiny teacher: 12 pairs in shards of 5."""
    from distill_cli.config import PairsConfig
    from distill_cli.pairs.generate import generate

    folder = tmp_path_factory.mktemp("pairs") / "tiny"
    generate(PairsConfig(teacher="tiny", num=12, shard_size=5, batch_size=4, steps=3), tiny.copy(), folder)
    return folder


@pytest.fixture(scope="session")
def workers(tmp_path_factory):
    from tests.contracts.workers import Workers

    return Workers(tmp_path_factory.mktemp("workers"))

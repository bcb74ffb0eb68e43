"""Networks are in memory once: while they are read, copied for training, and written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill_cli.distill import checkpoint
from docs.memory import training

MIB = 2**20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's counters")
def test_a_start_and_a_resume_hold_what_they_must(tmp_path):
    """42 million parameters: over a run on the tiny teacher, whose memory is the libraries'."""
    held, found = training(tmp_path / "large", [128, 256, 512])
    _, tiny = training(tmp_path / "tiny", [32])
    for kind, networks in (("start", 4), ("resume", 8)):
        beyond = found[kind]["resident"] - tiny[kind]["resident"]
        assert beyond < 1.15 * networks * held + 40 * MIB, (kind, beyond / held)


def test_a_checkpoint_is_written_in_parts(tmp_path):
    """What is written at a time is a tensor, not a network."""
    network = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(32)))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.zeros(1, 512)).sum().backward()
    optimizer.step()
    code = (
        "import sys, torch, resource; from distill_cli.distill import checkpoint; from pathlib import Path;"
        "n = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(64)));"
        "o = torch.optim.Adam(n.parameters()); n(torch.zeros(1, 1024)).sum().backward(); o.step();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; b = peak();"
        "checkpoint.save(Path(sys.argv[1]), 1, {'student': n}, {'student': o}, {}, 1); print(peak() - b)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, check=True, env=os.environ)
    assert int(done.stdout) < 64 * MIB  # of 768 MiB
    checkpoint.save(tmp_path / "d", 1, {"student": network}, {"student": optimizer}, {"a": 1}, 1)
    other = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(32)))
    moments = torch.optim.Adam(other.parameters())
    assert checkpoint.load(tmp_path / "d", 1, {"student": other}, {"student": moments}) == {"a": 1}
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    first, again = (o.state_dict()["state"][31] for o in (optimizer, moments))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert json.loads((tmp_path / "d/step-000001/state.json").read_text())["step"] == 1

"""Networks are in memory once: while they are read, copied for training, and written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill_cli.training import checkpoint

MIB = 2**20
RUNS = """
import ctypes, gc, json, sys
from distill_cli.cli.app import run
from distill_cli.training.engine import Engine
from docs.memory import pixels

def now(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

def peak(*arguments):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = now("VmRSS")
    code = run(["dmd", *arguments, *([] if "--resume" in arguments else ["batch_size=1", "sample_every=0"])])
    return [code, now("VmHWM") - before]

def stopped(engine):
    raise KeyboardInterrupt

def saved(engine):
    step(engine)
    engine.save()
    raise KeyboardInterrupt

pixels("tiny", [32])
held = 4 * pixels("large", [96, 192, 288])
step, Engine.train_step = Engine.train_step, saved
peak("--teacher", "tiny", "--steps", "1", "--out", "t")
Engine.train_step = stopped
start = peak("--teacher", "large", "--steps", "1", "--out", "s")
Engine.train_step = saved
peak("--teacher", "large", "--steps", "1", "--out", "r")
Engine.train_step = stopped
resume = peak("--resume", "r", "--steps", "2")
print(json.dumps([held, start, resume]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets Linux's counters")
def test_a_start_and_a_resume_hold_what_they_must(tmp_path):
    """Up to the first step, beyond what a run on a tiny teacher has left in the process: four networks, and twice two moments."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", RUNS], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    held, start, resume = json.loads(done.stdout.splitlines()[-1])
    for networks, (code, most) in ((4, start), (8, resume)):
        assert code == 130, done.stderr
        assert most < 1.15 * networks * held, (networks, most / held)


def test_a_checkpoint_is_written_in_parts(tmp_path):
    """What is written at a time is a tensor, not a network."""
    network = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(32)))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.zeros(1, 512)).sum().backward()
    optimizer.step()
    code = (
        "import sys, torch, resource; from distill_cli.training import checkpoint; from pathlib import Path;"
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

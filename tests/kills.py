"""Kill -9 at random moments, go on, compare: the results must equal an uninterrupted run's bit for bit.

    python -m tests.kills 30          # so many kills, shared between pairs, dmd, cm and train, on the `tiny` teacher

Prints a line a kill (where it hit, what was there) and ends with 1 if anything differs or a temporary file is left.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

RUN = ("batch_size=4", "log_every=3", "save_every=4", "sample_every=8", "keep=2", "--steps", "30")
COMMANDS = {
    "pairs": ("pairs", "--teacher", "tiny", "--num", "60", "--steps", "6", "shard_size=4"),
    "dmd": ("dmd", "--teacher", "tiny", "--pairs", "reference-pairs", "warmup_steps=2", "ema_halflife=40", *RUN),
    "cm": ("cm", "--method", "ct", "--teacher", "tiny", "--data", "digits", "dropout=0.1", "ema_halflife=40", *RUN),
    "train": ("train", "ema_halflife=40", "network.channels=[8, 16]", "network.attention=[0, 0]", "network.groups=4",
              "network.head=8", *RUN),
}  # fmt: skip
UNLIKE = ("env.json", "speed.jsonl", "verified-0.json")
"""Files that tell when and where a run was."""


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distill_cli", *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()


def hashes(folder: Path) -> dict[str, str]:
    """Every file's SHA-256: weights, averages, optimizers, metrics, pictures, the result."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in UNLIKE]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def killed_and_resumed(folder: Path, kind: str, out: str, wait: float) -> str:
    """Start the job, kill it after `wait` seconds, go on to the end; returns what was there after the kill."""
    process = start(folder, *COMMANDS[kind], "--out", out)
    try:
        process.communicate(timeout=wait)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    left = sorted(str(path.relative_to(folder / out)) for path in (folder / out).rglob("*")) if (folder / out).exists() else []
    done = [name for name in left if name.startswith(("shard-", "checkpoints/step-")) and name.count("/") < 2]
    if kind != "pairs" and (folder / out / "recipe.yaml").exists():
        finish(start(folder, kind, "--resume", out))
    else:
        finish(start(folder, *COMMANDS[kind], "--out", out))
    return f"{len(done)} complete, {sum('.tmp-' in name for name in left)} half-written files or folders"


def main(kills: int, folder: Path, kinds: tuple[str, ...] = tuple(COMMANDS), seed: int = 0) -> list[str]:
    """Do it; returns what went wrong."""
    chance, wrong = random.Random(seed), []
    whole, seconds = {}, {}
    for kind in ("pairs", *(kind for kind in kinds if kind != "pairs")):
        begun = time.monotonic()
        finish(start(folder, *COMMANDS[kind], "--out", f"reference-{kind}"))
        seconds[kind] = time.monotonic() - begun
        whole[kind] = hashes(folder / f"reference-{kind}")
    for number in range(kills):
        kind = kinds[number % len(kinds)]
        out = f"{kind}-{number}"
        wait = seconds[kind] * chance.uniform(0.4, 1.0)
        there = killed_and_resumed(folder, kind, out, wait)
        found = hashes(folder / out)
        other = [name for name in {**found, **whole[kind]} if found.get(name) != whole[kind].get(name)]
        end = other or "equal"
        print(f"kill {number + 1}: {kind} after {wait:.1f} of {seconds[kind]:.1f} s ({there}): {end}", flush=True)
        wrong += [f"{out}/{name}" for name in other]
    return wrong


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        different = main(int(sys.argv[1]) if len(sys.argv) > 1 else 30, Path(work))
    print("all equal" if not different else f"different: {different}")
    sys.exit(bool(different))

"""Pairs whose making was killed equal those made at once (python -m tests.kills 30 does it thirty times, for training too).

Runs that train are killed in tests/contracts.
"""

import random

from tests.kills import COMMANDS, hashes


def test_killed_and_resumed_equals_uninterrupted(tmp_path, workers):
    """SIGKILL at a random moment after a random shard."""
    chance, killed = random.Random(1), False
    workers.finish([*COMMANDS["pairs"], "--out", str(tmp_path / "whole")])
    whole = hashes(tmp_path / "whole")
    while not killed:  # a machine with much else to do may let it end first
        folder, count = tmp_path / f"killed-{chance.random()}", chance.randrange(1, 12)

        def due(folder=folder, count=count):
            return len([*folder.glob("shard-*.safetensors")]) >= count

        killed = workers.killed([*COMMANDS["pairs"], "--out", str(folder)], due, chance.uniform(0, 0.1)) and hashes(folder) != whole
    assert due()
    workers.finish([*COMMANDS["pairs"], "--out", str(folder)])
    assert hashes(folder) == whole

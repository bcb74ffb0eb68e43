"""Killed at a random moment and resumed equals uninterrupted, in real processes (python -m tests.kills 30 does it thirty times)."""

import pytest

from tests import kills


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    assert kills.main(3, tmp_path, ("pairs", "dmd", "cm"), seed=1) == []

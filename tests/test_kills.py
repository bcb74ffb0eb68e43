"""Pairs whose making was killed equal those made at once (python -m tests.kills 30 does it thirty times, for training too).

Runs that train are killed in tests/contracts.
"""

import pytest

from tests import kills


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    assert kills.main(1, tmp_path, ("pairs",), seed=1) == []

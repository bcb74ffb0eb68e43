"""Figure 3 of 2311.18828, by the program in docs."""

import pytest

from docs.figure3 import CASES, numbers, two_modes


@pytest.mark.slow
def test_what_each_part_of_dmd_is_for():
    alone, matched, whole = (numbers(two_modes(case, steps=800)) for case in CASES)
    start = numbers(two_modes(None))
    assert start["left"] == 1.0
    assert start["left_off"] > 1
    assert alone["left"] == 1.0
    assert alone["left_off"] < 0.3
    assert alone["spread"] < 0.1  # (a) all mass at the nearest mode, at a point of it
    assert matched["right"] < 0.05  # (b) the far mode is missed
    assert matched["left_off"] < 0.3
    assert matched["spread"] == pytest.approx(1, abs=0.2)
    assert whole["left"] == pytest.approx(0.7, abs=0.05)  # (c) both modes, in proportion
    assert max(whole["left_off"], whole["right_off"]) < 0.5
    assert whole["right"] == pytest.approx(0.3, abs=0.05)

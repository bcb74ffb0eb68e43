"""Signs of sickness in the looks of a run (training/pictures.py): what they show.

What to change follows from the method and its options: `Objective.remedies`. The bounds were chosen on runs of the built-in teachers
that were made sick on purpose, and on healthy ones: docs/curves.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

Look = Mapping[str, float]
"""A look: its step, ratios to the teacher's measures, drift, and with a classifier Fréchet distance and accuracy."""
PATIENT = 0.25
"""The share of a run in which a student may be as far from the teacher as it began: at first one step of it makes blurred means."""
FARTHER, SWINGS, FAR = 1.3, 2.5, 0.25
"""Drift beyond that of the beginning; beyond the smallest so far; and how large it has to be to matter."""


GUIDED = "guided_"
"""The names in a first look of the guided teacher's measures, over those of the teacher under its usual guidance, begin with this."""


class Sign(NamedTuple):
    """A ratio to the teacher's that is beyond a bound."""

    name: str
    ratio: Callable[[Look], float]
    bound: float
    """Above 1 the largest ratio that is well, below 1 the smallest."""
    says: str

    def shows(self, look: Look, begun: Look, done: float) -> bool:
        """Whether the ratio is beyond the bound, and either farther than at the beginning, or the beginning is over."""
        now, then = self.ratio(look), self.ratio(begun)
        beyond, farther = (now > self.bound, now > then) if self.bound > 1 else (now < self.bound, now < then)
        return beyond and (farther or done > PATIENT)


def _of(name: str) -> Callable[[Look], float]:
    """The ratio of a measure; 1 where it is not compared."""
    return lambda look: look.get(name, 1.0)


SIGNS = (
    Sign("over-saturated", _of("saturation"), 1.2, "their colours are {:.2f} times as strong as the teacher's"),
    Sign("too bright", _of("luminance"), 1.3, "their luminance is {:.2f} times the teacher's"),
    Sign("darkening", _of("luminance"), 0.75, "their luminance is {:.2f} times the teacher's"),
    Sign("blurred", lambda look: _of("sharpness")(look) / _of("contrast")(look), 0.7, "their finest detail is {:.2f} times the teacher's"),
    Sign("collapsing", _of("spread"), 0.65, "inside a class they differ {:.2f} times as much as the teacher's"),
)
GENERAL = {
    "over-saturated": "Lower guidance_scale, or lr",
    "too bright": "Lower lr",
    "darkening": "Lower lr",
    "blurred": "Train longer, or give the student more steps",
    "collapsing": "Lower lr",
    "diverging": "Lower lr",
    "swinging": "Lower lr",
}
"""What to change, by sign, where a method knows nothing better."""


def found(looks: Sequence[Look], done: float) -> Iterator[tuple[str, str]]:
    """Names of the signs of the newest look, and what they show, when the share `done` of all steps is made.

    Where the pictures are farther from the teacher's than before the first step, nothing else is said of them.
    """
    if len(looks) < 2:
        return
    begun, now = looks[0], looks[-1]
    best = min(looks[:-1], key=lambda look: look["drift"])
    if now["drift"] > max(FAR, FARTHER * begun["drift"]):
        yield "diverging", f"drift {now['drift']:.2f}, which is more than before they were trained, {begun['drift']:.2f}"
        return
    if now["drift"] > max(FAR, SWINGS * best["drift"]):
        yield (
            "swinging",
            f"they were near the teacher's, drift {best['drift']:.2f} at step {best['step']:g}, and left, {now['drift']:.2f}",
        )
    for sign in SIGNS:
        if sign.shows(now, begun, done):
            yield sign.name, sign.says.format(sign.ratio(now))


def guided(begun: Look) -> str:
    """A warning where the run guides its teacher so strongly that the teacher's own pictures are garish, or ''.

    The student is held against these pictures, so no later ratio shows it.
    """
    teacher = {name.removeprefix(GUIDED): value for name, value in begun.items() if name.startswith(GUIDED)}
    for sign in SIGNS:
        if sign.bound > 1 and (ratio := sign.ratio(teacher)) > sign.bound:
            says = f"{sign.says.format(ratio)} under its usual guidance"
            return f"the teacher's pictures are {sign.name}: {says}, and the student learns them. Lower the guidance scale"
    return ""


def shown(looks: Sequence[Look], done: float, remedies: Mapping[str, str]) -> Iterator[str]:
    """The warnings of the newest look: the sign, what it shows, and what to change."""
    for name, says in found(looks, done):
        yield f"the student's pictures are {name}: {says}. {remedies.get(name, GENERAL[name])}"

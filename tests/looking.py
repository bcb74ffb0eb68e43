"""Pictures to look at, which runs make and no test looks at closely, are few here and made in few steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from distill_cli.data.shapes import TRAINED, Shapes
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampling

SHOWN, EXAMPLES = Model.shown, Model.examples
"""As users have them."""
PICTURES, STEPS = 4, 3


def few(model: Model, sampling: Sampling | None = None) -> Sampling:
    """How a model is sampled to look at it: as told, in STEPS steps at most where it has no times of its own."""
    sampling = sampling or model.sampling
    return sampling if model.sampler.times else sampling.model_copy(update={"steps": min(sampling.steps, STEPS)})


@contextmanager
def little() -> Iterator[None]:
    """Grids and comparisons of PICTURES pictures, made in STEPS steps at most."""

    def examples(model: Model, seed: int, count: int, sampling: Sampling | None = None, classes: list[int] | None = None) -> Any:
        return EXAMPLES(model, seed, count, few(model, sampling), classes)

    with patch.object(Model, "shown", PICTURES), patch.object(Model, "examples", examples):
        yield


def no_memory() -> Any:
    """Plans that do not count a step's memory, which is most of their time."""
    from distill_cli.training.memory import Memory

    return patch("distill_cli.training.plan.memory", lambda *_: Memory(0, 0, 0, 0, 0, "not counted", False))


def few_shapes() -> Any:
    """The built-in pictures with captions are every twentieth of them: each run on latents encodes them all."""
    return patch.object(Shapes.__init__, "__defaults__", (TRAINED[::20],))

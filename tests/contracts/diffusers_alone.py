"""The pictures that plain diffusers makes by the program that stands in a model's card."""

from __future__ import annotations

import itertools
import re
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from distill_cli.diffusion.noise import Draws


def pictures(
    folder: Path, draws: Draws, shape: tuple[int, int, int], labels: list[int], prompts: list[str], between: bool = True
) -> Tensor | None:
    """(B, C, H, W) in [-1, 1], of the noise of `draws`: the card's program for several pictures; None where the card has none.

    A pipeline that takes no noise is given ours from behind; so is a scheduler for the noise `between` its steps, or it has torch's.
    """
    noise, turns = draws.normal("prior", shape), itertools.count(1)
    found = re.search(r"```python\n(.*?)^pipeline\((.*)\)\.images\[0\]", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    if found is None:
        return None
    space: dict[str, Any] = {"asked": lambda *one, **named: (one, named)}
    exec(found[1].replace("FOLDER", str(folder)), space)
    pipeline = space["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    positional, named = eval(f"asked({found[2]})", space)
    assert positional in ((), ("PROMPT",))
    known = signature(type(pipeline).__call__).parameters
    given = {"batch_size": len(labels), "class_labels": labels, "prompt": prompts, "latents": noise}
    wanted = {"batch_size", "latents", *named} | ({"prompt"} if positional else set())
    named |= {key: value for key, value in given.items() if key in known and key in wanted} | {"output_type": "np"}
    within, scheduler = (import_module(type(part).__module__) for part in (pipeline, pipeline.scheduler))

    def ours(asked: Any, **_: Any) -> Tensor:
        drawn = draws.normal("solver", shape, turn=next(turns))
        return drawn if len(asked) == 4 else drawn.flatten(2).mT  # for packed tokens

    with (
        patch.object(within, "randn_tensor", lambda *_, **__: noise.clone(), create=True),
        patch.object(scheduler, "randn_tensor", ours if between else getattr(scheduler, "randn_tensor", None), create=True),
    ):
        made = pipeline(**named)
    return torch.from_numpy(made.images).permute(0, 3, 1, 2) * 2 - 1

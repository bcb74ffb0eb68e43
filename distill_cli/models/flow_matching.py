"""diffusers' schedulers of flow matching (Esser et al. 2403.03206): read into a schedule, and made for a model that is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from distill_cli.diffusion.schedule import FlowSchedule
from distill_cli.errors import DistillError
from distill_cli.models.model import Model
from distill_cli.models.schedulers import completed, numbers_of

EULER, RENOISING = "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"
SINCE = {EULER: "0.29", RENOISING: "0.34"}
"""The schedulers that are read, and the version of diffusers that has each from then on."""
TIME_INPUT = "1000 t"
UNREAD = (
    "use_dynamic_shifting", "shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
    "stochastic_sampling", "scale_factors",
)  # fmt: skip
"""Options by which a scheduler takes other times than shifted ones, or other steps than Euler's."""


def class_of(kind: str) -> Any:
    """diffusers' class of this name. Raises DistillError, which names the version that has it, if the installed one is older."""
    import diffusers

    if not hasattr(diffusers, kind):
        has = f"{kind} came with diffusers {SINCE[kind]}, and {diffusers.__version__} is installed"
        raise DistillError(has, "pip install --upgrade diffusers")
    return getattr(diffusers, kind)


def schedule_of(config: Mapping[str, Any], source: str) -> FlowSchedule:
    """The schedule of a scheduler's configuration. Raises DistillError for another class, and for options that are not supported."""
    kind = config.get("_class_name")
    if kind not in SINCE:
        raise DistillError(f"{source}: {kind} is no scheduler of flow matching", f"{' and '.join(SINCE)} are read")
    class_of(kind)
    whole = completed(config, source)
    for key in UNREAD:
        if whole.get(key):
            dynamic = "write the shift for your size as `shift`, and set it to false"
            hint = dynamic if key == "use_dynamic_shifting" else "times that are shifted by one number are read"
            raise DistillError(f"{source}: {key} is {json.dumps(whole[key])}, which is not read", hint)
    given = numbers_of(config, ("num_train_timesteps", "shift"), source)
    points, shift = int(given["num_train_timesteps"]), float(given["shift"])
    if points < 2 or shift <= 0:
        raise DistillError(f"{source}: num_train_timesteps {points} and shift {shift:g} make no schedule")
    return FlowSchedule(shift, points)


def scheduler_of(model: Model) -> Any:
    """The scheduler that a model's folder gets.

    A student's shifts nothing, because its list of sigmas is given to the pipeline, and a scheduler would shift that too. Between several
    steps FlowMatchLCMScheduler adds new noise; one step is Euler's step to the end.
    """
    sampler, schedule = model.sampler, model.denoiser.schedule
    assert isinstance(schedule, FlowSchedule)
    return class_of(RENOISING if renoises(model) else EULER)(
        num_train_timesteps=schedule.points, shift=1.0 if sampler.times else schedule.shift, use_dynamic_shifting=False
    )


def renoises(model: Model) -> bool:
    """Whether new noise is added between the steps of a student."""
    return model.sampler.answers == "endpoint" and len(model.sampler.times) > 1


def seeding(model: Model) -> dict[str, str]:
    """What a card's program says of the noise between the steps: StableDiffusion3Pipeline hands on no generator."""
    if not renoises(model):
        return {"seed": "", "seeded": ""}
    return {"seed": "import torch\n", "seeded": "torch.manual_seed(0)  # the noise between the steps\n"}


def differs(model: Model) -> str:
    """Why the scheduler of the folder does not sample a model as it is sampled here; '' where it does."""
    solver = model.sampler.solver
    known = solver in ("euler", "ddim") or model.sampler.answers == "endpoint"
    return "" if known else f"the folder's scheduler takes Euler's steps, and here it is sampled by {solver}"

"""diffusers' schedulers of flow matching (Esser et al. 2403.03206): read into a schedule, and made for a model that is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from distill_cli.config.base import Solver
from distill_cli.diffusion.schedule import FlowSchedule
from distill_cli.diffusion.shift import Shift
from distill_cli.errors import DistillError
from distill_cli.models import installed, schedulers
from distill_cli.models.model import Model
from distill_cli.models.schedulers import completed, numbers_of

EULER, RENOISING, MULTISTEP = "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "DPMSolverMultistepScheduler"
SINCE = {EULER: "0.29", RENOISING: "0.34"}
"""The schedulers that every pipeline of flow matching is read with, and the version of diffusers that has each from then on."""
TIME_INPUT = "1000 t"
UNREAD = (
    "shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "stochastic_sampling", "scale_factors",
)  # fmt: skip
"""Options by which a scheduler takes other times than shifted ones, or other steps than Euler's."""
MOVING = {"base_tokens": "base_image_seq_len", "most_tokens": "max_image_seq_len", "base": "base_shift", "most": "max_shift"}
"""The numbers of a shift that depends on the size, by their names in a scheduler's configuration."""
SOLVED = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True,
          "final_sigmas_type": "zero", "prediction_type": "flow_prediction", "use_flow_sigmas": True, "thresholding": False,
          "euler_at_final": False}  # fmt: skip
"""The options of DPM-Solver++ as it is run here."""


def class_of(kind: str) -> Any:
    """diffusers' class of this name. Raises DistillError, which names the version that has it, if the installed one is older."""
    return installed.class_of(kind, "diffusers", SINCE.get(kind, "0.32"))


def schedule_of(config: Mapping[str, Any], source: str, moving: Shift | None = None, multistep: bool = False) -> FlowSchedule:
    """The schedule of a scheduler's configuration. Raises DistillError for another class, and for options that are not supported.

    `moving`: how the pipeline shifts by size where the configuration asks for it; None if it cannot. `multistep`: DPM-Solver++ is read too.
    """
    kind, known = config.get("_class_name"), (*SINCE, *([MULTISTEP] if multistep else []))
    if kind not in known:
        raise DistillError(f"{source}: {kind} is no scheduler of flow matching", f"{' and '.join(known)} are read")
    class_of(kind)
    whole = completed(config, source)
    for key in (*UNREAD, *([] if moving and kind != MULTISTEP else ["use_dynamic_shifting"])):
        if whole.get(key):
            dynamic = "write the shift for your size as `shift`, and set it to false"
            hint = dynamic if key == "use_dynamic_shifting" else "times that are shifted by one number are read"
            raise DistillError(f"{source}: {key} is {json.dumps(whole[key])}, which is not read", hint)
    for key, value in SOLVED.items() if kind == MULTISTEP else ():
        if whole.get(key) != value:
            raise DistillError(f"{source}: {key} is {json.dumps(whole.get(key))}, which is not read", f"{json.dumps(value)} is read")
    named = "flow_shift" if kind == MULTISTEP else "shift"
    given = numbers_of(config, ("num_train_timesteps", named), source)
    points, shift = int(given["num_train_timesteps"]), float(given[named])
    if points < 2 or shift <= 0:
        raise DistillError(f"{source}: num_train_timesteps {points} and shift {shift:g} make no schedule")
    if not whole.get("use_dynamic_shifting") or moving is None:
        return FlowSchedule(shift, points)
    return FlowSchedule(1.0, points).moved(moving_of(whole, config, source, moving))


def moving_of(whole: Mapping[str, Any], config: Mapping[str, Any], source: str, moving: Shift) -> Shift:
    """A pipeline's shift by size with the numbers of a configuration. Raises DistillError for numbers that make none."""
    kind, numbers = whole.get("time_shift_type", "exponential"), numbers_of(config, tuple(MOVING.values()), source)
    if kind not in ("exponential", "linear"):
        raise DistillError(f"{source}: time_shift_type is {json.dumps(kind)}, exponential or linear is expected")
    given: dict[str, Any] = {name: numbers[key] for name, key in MOVING.items()}
    if given["base_tokens"] >= given["most_tokens"] or (kind == "linear" and min(given["base"], given["most"]) <= 0):
        raise DistillError(f"{source}: {', '.join(f'{key} {numbers[key]:g}' for key in MOVING.values())} make no shift")
    return Shift(moving.rule, moving.tokens, **given, kind=kind, usual_steps=moving.usual_steps)


def solver_of(config: Mapping[str, Any]) -> Solver:
    """The solver that a folder's scheduler is."""
    return "dpm++" if config.get("_class_name") == MULTISTEP else "euler"


def scheduler_of(model: Model) -> Any:
    """The scheduler that a model's folder gets.

    A student's shifts nothing, because its list of sigmas is given to the pipeline, and a scheduler would shift that too. Between several
    steps FlowMatchLCMScheduler adds new noise; one step is Euler's step to the end.
    """
    sampler, schedule = model.sampler, model.denoiser.schedule
    assert isinstance(schedule, FlowSchedule)
    if sampler.times:
        kind = class_of(RENOISING if renoises(model) else EULER)
        return kind(num_train_timesteps=schedule.points, shift=1.0, use_dynamic_shifting=False)
    if sampler.solver == "dpm++" and schedule.moving is None:
        return schedulers.own(schedulers.flow_config(schedule, sampler.steps))
    kind, moving = class_of(EULER), schedule.moving
    if moving is None:
        return kind(num_train_timesteps=schedule.points, shift=schedule.shift, use_dynamic_shifting=False)
    numbers = {key: getattr(moving, name) for name, key in MOVING.items()}
    return kind(num_train_timesteps=schedule.points, use_dynamic_shifting=True, time_shift_type=moving.kind, **numbers)


def renoises(model: Model) -> bool:
    """Whether new noise is added between the steps of a student."""
    return model.sampler.answers == "endpoint" and len(model.sampler.times) > 1


def seeding(model: Model) -> dict[str, str]:
    """What a card's program says of the noise between the steps: most pipelines hand on no generator."""
    if not renoises(model):
        return {"seed": "", "seeded": ""}
    return {"seed": "import torch\n", "seeded": "torch.manual_seed(0)  # the noise between the steps\n"}


def differs(model: Model, multistep: bool = False) -> str:
    """Why the scheduler of the folder does not sample a model as it is sampled here; '' where it does."""
    solver = model.sampler.solver
    known = solver in ("euler", "ddim", *(["dpm++"] if multistep else [])) or model.sampler.answers == "endpoint"
    return "" if known else f"the folder's scheduler takes Euler's steps, and here it is sampled by {solver}"

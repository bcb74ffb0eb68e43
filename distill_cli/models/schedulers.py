"""Sampling by diffusers' schedulers, on the table of betas of the model's own scheduler."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import Denoiser, NetworkDenoiser
from distill_cli.diffusion.schedule import FlowSchedule, TableSchedule
from distill_cli.errors import DistillError

SOLVERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "pndm": "PNDMScheduler", "dpm++": "DPMSolverMultistepScheduler"}
"""diffusers' schedulers by the names of our solvers.

From 2010.02502; 2206.00364 (algorithm 1 without its correction); 2202.09778 without its first Runge-Kutta steps; 2211.01095.
"""
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}

ONLY_DDPM = "flow matching is read as StableDiffusion3Pipeline, or as distill train writes it"
OPTIONS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++", "solver_order": 2},
}
"""Options of these schedulers that our solvers fix, whatever the model's own scheduler says."""
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
"""Options of DPMSolverMultistepScheduler in flow matching."""
MOST_TIMES = 100_000
SPACINGS = ("leading", "linspace", "trailing")
TAKEN = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "prediction_type",
    "timestep_spacing", "steps_offset", "set_alpha_to_one",
)  # fmt: skip
"""What our solvers take from the configuration of a model's scheduler: the table and the spacing of times."""
PIXEL_SCHEDULERS = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
)  # fmt: skip
"""Schedulers whose table of betas says how a pixel model was trained."""
LATENT_SCHEDULERS = (
    *PIXEL_SCHEDULERS, "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler", "LCMScheduler",
)  # fmt: skip
"""Schedulers that a StableDiffusionPipeline folder may have."""

STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""The table of betas of Stable Diffusion (Rombach et al. 2112.10752), as a scheduler configuration."""


def class_of(config: Mapping[str, Any], source: str) -> Any:
    """diffusers' class for a scheduler configuration. Raises DistillError if it names no installed class."""
    import diffusers

    name = config.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if kind is None:
        raise DistillError(f"{source}: _class_name is {name!r}, no scheduler of diffusers {diffusers.__version__}")
    return kind


def completed(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The configuration, completed by the defaults of its class."""
    known = inspect.signature(class_of(config, source).__init__).parameters
    return {name: p.default for name, p in known.items() if p.default is not inspect.Parameter.empty} | dict(config)


def numbers_of(config: Mapping[str, Any], keys: Sequence[str], source: str) -> dict[str, float]:
    """The numbers under `keys`, or the defaults of the class. Raises DistillError for a value that is no number."""
    known, whole = inspect.signature(class_of(config, source).__init__).parameters, completed(config, source)
    for key in keys:
        value, counts = whole.get(key), key in known and isinstance(known[key].default, int)
        if isinstance(value, bool) or not isinstance(value, int if counts else (int, float)) or not math.isfinite(value):
            raise DistillError(f"{source}: {key} is {json.dumps(value)}, a {'whole ' * counts}number is expected")
    return {key: whole[key] for key in keys}


def table_of(config: Mapping[str, Any], source: str, classes: Container[str] = PIXEL_SCHEDULERS) -> tuple[TableSchedule, str]:
    """The schedule and the parameterisation of a diffusers scheduler configuration of one of `classes`, which have a table of betas.

    Missing keys get the defaults of the class. Raises DistillError for settings that are not supported.
    """
    name, kinds = class_of(config, source).__name__, {value: key for key, value in PREDICTION_TYPES.items()}
    whole = completed(config, source)
    if name not in classes:
        known = "a table of betas is read" if "beta_schedule" in whole else "it has no table of betas"
        raise DistillError(f"{source}: {name} is not read: {known}", ONLY_DDPM)
    prediction, spacing, trained = whole.get("prediction_type"), whole.get("timestep_spacing", "leading"), whole.get("trained_betas")
    for key in ("prediction_type", "beta_schedule", "timestep_spacing"):
        if not isinstance(whole.get(key), str | None):
            raise DistillError(f"{source}: {key} is {json.dumps(whole[key])}, a word is expected")
    if prediction not in kinds:
        raise DistillError(f"{source}: prediction_type {prediction!r} is none of {', '.join(kinds)}")
    if spacing not in SPACINGS:
        raise DistillError(f"{source}: timestep_spacing {json.dumps(spacing)} is none of {', '.join(SPACINGS)}")
    for key in ("use_flow_sigmas", "timestep_type"):
        if whole.get(key, False) not in (False, None, "discrete"):
            raise DistillError(f"{source}: {key} is {whole[key]!r}, which is not read", ONLY_DDPM)
    numbers = ["num_train_timesteps", "beta_start", "beta_end", *(["steps_offset"] if "steps_offset" in whole else [])]
    given: dict[str, Any] = numbers_of(config, numbers, source)
    if not 1 < given["num_train_timesteps"] <= MOST_TIMES:
        raise DistillError(f"{source}: num_train_timesteps is {given['num_train_timesteps']}, 2 to {MOST_TIMES} are read")
    if not 0 < given["beta_start"] <= given["beta_end"] < 1:
        raise DistillError(f"{source}: betas from {given['beta_start']} to {given['beta_end']} are not between 0 and 1, or fall")
    if trained is not None and not (isinstance(trained, list) and trained and all(type(beta) in (int, float) for beta in trained)):
        raise DistillError(f"{source}: trained_betas are no list of numbers")
    if trained is not None and len(trained) != given["num_train_timesteps"]:
        raise DistillError(f"{source}: {len(trained)} trained_betas, and num_train_timesteps is {given['num_train_timesteps']}")
    given |= {"beta_schedule": whole.get("beta_schedule"), "trained_betas": trained}
    for key in ("rescale_betas_zero_snr", "set_alpha_to_one"):
        given[key] = whole.get(key, False)
        if type(given[key]) is not bool:
            raise DistillError(f"{source}: {key} is {json.dumps(given[key])}, true or false is expected")
    try:
        schedule = TableSchedule.from_config(given)
    except (ValueError, TypeError) as error:
        raise DistillError(f"{source}: {error}") from error
    table = schedule.alphas_cumprod
    if not (table.isfinite().all() and (table[1:] < table[:-1]).all() and table[-1] >= 0 and table[0] < 1):
        said = f"alpha^2 goes from {table[0]:.3g} to {table[-1]:.3g} over {len(table)} times"
        raise DistillError(f"{source}: its betas make no schedule: {said}")
    if kinds[prediction] == "eps" and not table[-1] > 0:
        hint = "set prediction_type to v_prediction if it predicts v"
        raise DistillError(f"{source}: an eps network cannot start at zero terminal SNR", hint)
    return schedule, kinds[prediction]


def make(config: Mapping[str, Any], kind: str) -> Any:
    """diffusers' scheduler of class `kind`, with the table and the spacing of times from `config` and nothing else."""
    taken = {key: config[key] for key in TAKEN if key in config}
    return own({"_class_name": kind, "clip_sample": False, **taken, **OPTIONS.get(kind, {})})  # latents have no range


def own(config: Mapping[str, Any]) -> Any:
    """diffusers' scheduler with all of a configuration."""
    kind = class_of(config, "scheduler")
    return kind.from_config({key: value for key, value in config.items() if key in inspect.signature(kind.__init__).parameters})


def assumed(config: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """A note on keys of the table that a configuration leaves to its class's defaults; () if there are none."""
    table = () if config.get("trained_betas") is not None else ("beta_schedule", "beta_start", "beta_end")
    missing = [key for key in ("num_train_timesteps", *table, "prediction_type") if key not in config]
    whole = completed(config, source)
    said = ", ".join(f"{key} {whole.get(key)}" for key in missing)
    return (f"{source} does not say {', '.join(missing)}: {said}, the defaults of {config['_class_name']}",) if missing else ()


def run(
    config: dict[str, Any], solver: str, steps: int, denoiser: Denoiser, network: NetworkDenoiser, x: Tensor, condition: Condition
) -> Tensor:
    """x0 (B, C, H, W) from x (B, C, H, W) at the largest time; `denoiser` is `network`, guided or not."""
    flow = isinstance(network.schedule, FlowSchedule)
    scheduler = own(config) if flow else make(config, SOLVERS[solver])
    scheduler.set_timesteps(steps, device=x.device)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        times, scaled = t.to(x.dtype).expand(len(x)), scheduler.scale_model_input(x, t)
        times = times / config["num_train_timesteps"] if flow else times  # whole times, also where a flow's level lies between
        x0 = denoiser(scaled, times, condition)
        x = scheduler.step(network.prediction(scaled, times, x0), t, x, return_dict=False)[0]
    return x


def flow_config(schedule: FlowSchedule, steps: int) -> dict[str, Any]:
    """The configuration of DPM-Solver++ (2211.01095, second order, multistep) on a flow, as SANA's folders have it."""
    shift = schedule.moving.of(steps) if schedule.moving else schedule.shift
    if "use_flow_sigmas" not in inspect.signature(class_of({"_class_name": SOLVERS["dpm++"]}, "dpm++").__init__).parameters:
        raise DistillError("dpm++ on flow matching: the installed diffusers is older than 0.32", "pip install --upgrade diffusers")
    return {
        "_class_name": SOLVERS["dpm++"],
        **OPTIONS[SOLVERS["dpm++"]],
        **FLOW,
        "num_train_timesteps": schedule.points,
        "flow_shift": shift,
    }


@torch.no_grad()
def config_of(schedule: TableSchedule, parameterisation: str) -> dict[str, Any]:
    """A scheduler configuration for a model that came without one."""
    betas = 1 - schedule.alphas_cumprod / torch.cat([torch.ones(1).double(), schedule.alphas_cumprod[:-1]])
    return {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": PREDICTION_TYPES[parameterisation],
        "timestep_spacing": "trailing",  # one step is then at t = 999, as in our solvers
        "clip_sample": False,
    }

"""Sampling by diffusers' own schedulers, with the table of times that a model came with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from distill_cli.diffusion.denoiser import Condition, Denoiser, NetworkDenoiser
from distill_cli.diffusion.schedule import TableSchedule
from distill_cli.errors import DistillError

SOLVERS = {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "dpm++": "DPMSolverMultistepScheduler"}
"""diffusers' schedulers by the names of our solvers (2010.02502; 2202.09778, without its first Runge-Kutta steps; 2211.01095)."""
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}

STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""The table of betas of Stable Diffusion (Rombach et al. 2112.10752), in diffusers' words."""


def table_of(config: dict[str, Any], source: str) -> tuple[TableSchedule, str]:
    """The schedule and the parameterisation of a diffusers scheduler configuration that has a table of betas.

    Raises DistillError for what the mathematics here does not know.
    """
    name, kinds = config.get("_class_name"), {value: key for key, value in PREDICTION_TYPES.items()}
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in kinds:
        raise DistillError(f"{source}: prediction_type {prediction!r} is none of {', '.join(kinds)}")
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise DistillError(f"{source}: {name} has no table of betas", "models of Stable Diffusion 1 and 2 are read, not flow matching")
    try:
        schedule = TableSchedule.from_config(config)
    except (ValueError, TypeError) as error:
        raise DistillError(f"{source}: {error}") from error
    if kinds[prediction] == "eps" and not schedule.alphas_cumprod[-1] > 0:
        raise DistillError(f"{source}: a network that predicts noise has nothing to say at zero terminal SNR", "is it one of v_prediction?")
    return schedule, kinds[prediction]


def make(config: dict[str, Any], kind: str) -> Any:
    """diffusers' scheduler of class `kind` with the table and the spacing of times of `config`."""
    import diffusers

    options: dict[str, Any] = {"skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    if kind == "DPMSolverMultistepScheduler":  # dpm++ is the second-order multistep, whatever the model's own scheduler was
        options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False}
    scheduler = getattr(diffusers, kind)
    known = set(inspect.signature(scheduler.__init__).parameters)
    wanted = {**config, "clip_sample": False}  # latents have no range, as diffusers' pipeline insists too
    return scheduler.from_config({key: value for key, value in wanted.items() if key in known}, **options)


def run(
    config: dict[str, Any], solver: str, steps: int, denoiser: Denoiser, network: NetworkDenoiser, x: Tensor, condition: Condition
) -> Tensor:
    """x0 (B, C, H, W) from x (B, C, H, W) at the largest time; `denoiser` is `network`, guided or not."""
    scheduler = make(config, SOLVERS[solver])
    scheduler.set_timesteps(steps, device=x.device)
    for t in scheduler.timesteps:
        times = t.to(x.dtype).expand(len(x))
        x0 = denoiser(scheduler.scale_model_input(x, t), times, condition)
        x = scheduler.step(network.prediction(x, times, x0), t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def config_of(schedule: TableSchedule, parameterisation: str) -> dict[str, Any]:
    """The configuration of a model without one of its own."""
    betas = 1 - schedule.alphas_cumprod / torch.cat([torch.ones(1).double(), schedule.alphas_cumprod[:-1]])
    return {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": PREDICTION_TYPES[parameterisation],
        "timestep_spacing": "trailing",  # one step is then t = 999, as ours
        "clip_sample": False,
    }

"""EDM models as ConsistencyModelPipeline: a UNet2DModel whose time input is 250 ln sigma, with CMStochasticIterativeScheduler.

A consistency student makes the same picture in plain diffusers. A teacher's folder opens there too, but the pipeline does not
sample teachers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill_cli.diffusion.denoiser import Scales
from distill_cli.diffusion.schedule import GRID, EDMSchedule
from distill_cli.errors import DistillError
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler
from distill_cli.models.schedulers import numbers_of
from distill_cli.models.times import from_indices

PIPELINES = ("ConsistencyModelPipeline",)
SCHEDULERS = ("CMStochasticIterativeScheduler",)
TIME_INPUT = "250 ln sigma"
SNIPPET = """from diffusers import ConsistencyModelPipeline

pipeline = ConsistencyModelPipeline.from_pretrained("FOLDER")
pipeline({call}).images[0].save("picture.png")
"""


def reads(index: dict[str, Any]) -> bool:
    """Whether model_index.json names this pipeline."""
    return index.get("_class_name") in PIPELINES


def fits(model: Model) -> bool:
    """Whether the model's network takes 250 ln sigma as its time."""
    return model.denoiser.time_input == TIME_INPUT


def edm_of(config: dict[str, Any], path: Path, silent_grid: int | None = None) -> tuple[EDMSchedule, Scales]:
    """Schedule and scales from an EDM scheduler's configuration. A grid of `silent_grid` points counts as not given."""
    given = numbers_of(config, ("sigma_min", "sigma_max", "sigma_data", "rho", "num_train_timesteps"), str(path))
    low, high, grid = given["sigma_min"], given["sigma_max"], int(given["num_train_timesteps"])
    grid = GRID if grid == silent_grid else grid
    if not (0 < low < high and given["sigma_data"] > 0 and given["rho"] > 0 and grid > 1):
        raise DistillError(f"{path}: sigma from {low} to {high}, sigma_data {given['sigma_data']}, rho {given['rho']} over {grid} points")
    return EDMSchedule(low, high, given["rho"], grid), Scales(sigma_data=given["sigma_data"], sigma_min=low)


def numbers(model: Model) -> dict[str, Any]:
    """Arguments of diffusers' scheduler for an EDM model."""
    schedule: Any = model.denoiser.schedule
    given = {name: getattr(schedule, name) for name in ("sigma_min", "sigma_max", "rho")}
    return given | {"num_train_timesteps": schedule.grid, "sigma_data": model.denoiser.scales.sigma_data}


def levels(config: dict[str, Any], path: Path) -> shared.Levels:
    """The noise levels of a scheduler's configuration. Without distill.json the model is a one-step student, as diffusers reads it."""
    schedule, scales = edm_of(config, path)
    return shared.Levels(schedule, scales, ("consistency", "edm"), (TIME_INPUT,), Sampler.consistency([schedule.t_max]))


def load(folder: Path, name: str) -> Model:
    """The model in a folder."""
    return shared.read_labelled(folder, name, levels(*shared.scheduler_of(folder, SCHEDULERS)))


def scheduler(model: Model) -> Any:
    """diffusers' scheduler for the model."""
    import diffusers

    return diffusers.CMStochasticIterativeScheduler(**numbers(model))


def save(model: Model, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder."""
    shared.write_labelled(model, folder, dtype, PIPELINES[0], scheduler(model), in_diffusers(model))


def in_diffusers(model: Model) -> InDiffusers:
    """The pipeline samples students that answer with the end of the ODE as here, at times of its grid that begin with the first."""
    sampler, schedule = model.sampler, model.denoiser.schedule
    if sampler.answers != "endpoint":
        return InDiffusers(differs="ConsistencyModelPipeline samples consistency students alone")
    call = "class_labels=0, " if model.conditioner.classes else ""
    own = sampler.times_for(schedule, sampler.solver, sampler.steps)
    points = torch.tensor(from_indices(schedule, range(schedule.grid - 1)), dtype=torch.float64)
    places = (points[:, None] - own).abs().argmin(0)
    if places[0] or not torch.allclose(points[places], own, rtol=1e-4):
        return InDiffusers(differs=f"the pipeline begins at sigma {schedule.t_max:g}, and goes through points of the grid alone")
    steps = "num_inference_steps=1" if len(own) == 1 else f"num_inference_steps=None, timesteps={places.tolist()[::-1]}"
    return InDiffusers(SNIPPET.format(call=f"{call}{steps}"))

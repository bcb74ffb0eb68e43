"""Pixel-space models on diffusers' UNet2DModel or our EDMUNet, stored as ordinary pipeline folders.

EDM and consistency models are ConsistencyModelPipeline folders (time input 250 ln sigma), so a one-step student gives
in plain diffusers the picture it gives here; eps and v models are DDPMPipeline folders. NVlabs' networks have the time
input ln(sigma) / 4: their scheduler is EDMEulerScheduler, whose times those are. What diffusers has no place for stands in
distill.json.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from distill_cli.config import NetworkConfig
from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.schedule import GRID, EDMSchedule, NoiseSchedule, TableSchedule
from distill_cli.errors import DistillError, UsageError, printable_lines
from distill_cli.files import folder_atomic, write_atomic
from distill_cli.models import schedulers
from distill_cli.models.checks import check_pixels
from distill_cli.models.conditioners import ClassConditioner
from distill_cli.models.model import Lineage, Model, Sampling, Text
from distill_cli.models.parts import check_named, load_network, read_json, save_network
from distill_cli.models.schedulers import PIXEL_SCHEDULERS, config_of, numbers_of, table_of
from distill_cli.models.sources.hub import part_of
from distill_cli.models.unet import UNet

EXTRA = "distill.json"
EDM_PIPELINE, DDPM_PIPELINE = "ConsistencyModelPipeline", "DDPMPipeline"
CONSISTENCY_SCHEDULER = "CMStochasticIterativeScheduler"
EDM_SCHEDULERS = (CONSISTENCY_SCHEDULER, "EDMEulerScheduler")
LIBRARIES = {"UNet2DModel": "diffusers", "EDMUNet": "distill_cli.models.edm"}
SNIPPET = """from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("FOLDER")
pipeline("PROMPT", {size}num_inference_steps={steps}, guidance_scale={guidance_scale:g}).images[0].save("picture.png")
"""


class Extra(BaseModel):
    """distill.json: what only this package needs to know of a pipeline folder."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    parameterisation: Literal["eps", "v", "x0", "flow", "edm", "consistency"]
    time_input: Literal["t", "250 ln sigma", "ln sigma / 4"]
    classes: list[Text] = []
    null_label: int | None = None
    learned: tuple[int, ...] | None = None
    sampling: Sampling = Sampling()
    few_step_times: list[float] | None = None
    lineage: Lineage
    recipe: Annotated[str, AfterValidator(printable_lines)] = ""


def extra_of(model: Model) -> Extra:
    return Extra(
        parameterisation=model.denoiser.parameterisation,
        time_input=model.denoiser.time_input,
        classes=list(model.conditioner.classes),
        null_label=model.conditioner.null_label,
        learned=model.conditioner.learned,
        sampling=model.sampling,
        few_step_times=model.few_step_times,
        lineage=model.lineage,
        recipe=model.recipe,
    )


def save(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `model` to `folder`, which is complete or absent; an older one is replaced. Weights are stored as `dtype`."""
    import diffusers

    denoiser, schedule = model.denoiser, model.denoiser.schedule
    if isinstance(schedule, EDMSchedule) and denoiser.time_input == "ln sigma / 4":
        scheduler = diffusers.EDMEulerScheduler(
            num_train_timesteps=schedule.grid,
            sigma_min=schedule.sigma_min,
            sigma_max=schedule.sigma_max,
            sigma_data=denoiser.scales.sigma_data,
            rho=schedule.rho,
        )
        pipeline = DDPM_PIPELINE
    elif isinstance(schedule, EDMSchedule):
        scheduler = diffusers.CMStochasticIterativeScheduler(
            num_train_timesteps=schedule.grid,
            sigma_min=schedule.sigma_min,
            sigma_max=schedule.sigma_max,
            sigma_data=denoiser.scales.sigma_data,
            rho=schedule.rho,
        )
        pipeline = EDM_PIPELINE
    else:
        assert isinstance(schedule, TableSchedule)
        scheduler = schedulers.make(config_of(schedule, denoiser.parameterisation), "DDPMScheduler")
        pipeline = DDPM_PIPELINE
    kind = type(model.unet).__name__
    with folder_atomic(folder) as temporary:
        save_network(model.unet, temporary / "unet", LIBRARIES, dtype)
        scheduler.save_pretrained(temporary / "scheduler")
        index = {
            "_class_name": pipeline,
            "_diffusers_version": diffusers.__version__,
            "unet": [LIBRARIES[kind], kind],
            "scheduler": ["diffusers", type(scheduler).__name__],
        }
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        (temporary / EXTRA).write_text(extra_of(model).model_dump_json(indent=2) + "\n")
        (temporary / "README.md").write_text(card(model))


def save_times(folder: Path, model: Model) -> None:
    """Write a student's few-step times and number of steps into its folder's distill.json, and into its card if that is ours."""
    ours = (folder / EXTRA).exists()
    write_atomic(folder / EXTRA, extra_of(model).model_dump_json(indent=2) + "\n")
    if ours:
        write_atomic(folder / "README.md", card(model))


def card(model: Model) -> str:
    """The README.md of a model's folder."""
    lineage, sampling = model.lineage, model.sampling
    times = ", ".join(f"{time:.4g}" for time in model.few_step_times or [])
    rows = {
        "kind": f"{lineage.kind}{f', by {lineage.method}' if lineage.method else ''}",
        "teacher": f"{lineage.teacher} (weights {lineage.teacher_hash[:12]})" if lineage.teacher else "",
        "licence": lineage.licence,
        "data": lineage.data,
        "images": f"{model.picture} pixels, of {model.conditioner.summary}",
        "sampling": f"{sampling.solver}, {sampling.steps} step{'s' * (sampling.steps > 1)}, guidance scale {sampling.guidance_scale:g}",
        "times": f"{'t' if model.denoiser.time_input == 't' else 'sigma'} {times}" if times else "",
    }
    if times and isinstance(model.denoiser.schedule, EDMSchedule):
        rows["grid"] = f"{model.denoiser.schedule.grid} points, on which --times counts"
    if model.conditioner.learned is not None:
        rows["learned"] = f"the classes {', '.join(map(str, model.conditioner.learned))} alone"
    table = "\n".join(f"| {key} | {value.replace('|', '&#124;')} |" for key, value in rows.items() if value)
    how = "Sample with `distill sample --model FOLDER`."
    if model.text is not None:
        height, width = (side * model.pixels // model.shape[2] for side in model.shape[1:])
        size = "" if height == width else f"height={height}, width={width}, "
        snippet = SNIPPET.format(size=size, **sampling.model_dump())
        how = f"Sample with `distill sample --model FOLDER --prompts FILE`, or in diffusers:\n\n```python\n{snippet}```"
    shown = model.recipe.replace("```", "'''")  # another's text stays in its block
    recipe = f"\n\nThe recipe that made it:\n\n```yaml\n{shown}```" if model.recipe else ""
    return f"# {lineage.name}\n\n| | |\n|---|---|\n{table}\n\nMade by distill. {how}{recipe}\n"


def read_extra(folder: Path, schedule: NoiseSchedule, prediction: str) -> Extra | None:
    """What distill.json says, held against the scheduler's schedule and prediction; None where there is none."""
    if not (folder / EXTRA).exists():
        return None
    try:
        extra = Extra.model_validate(read_json(folder / EXTRA))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise DistillError(f"{folder / EXTRA}: {key}: {problem['msg'].lower()}") from error
    edm, count, times = isinstance(schedule, EDMSchedule), len(extra.classes), extra.few_step_times
    falling = times is None or (bool(times) and all(here > there for here, there in pairwise([*times, -1 if not edm else 0])))
    held = {
        "parameterisation": extra.parameterisation in (("edm", "consistency") if edm else (prediction,)),
        "time_input": edm == (extra.time_input != "t"),
        "null_label": extra.null_label in (None, count) and (bool(count) or extra.null_label is None),
        "learned": extra.learned is None or (bool(extra.learned) and set(extra.learned) <= set(range(count))),
        "few_step_times": falling and (not times or times[0] <= schedule.t_max * (1 + 1e-6)),
    }
    wrong = next((key for key, fits in held.items() if not fits), None)
    if wrong:
        what = f"it does not fit {count} classes, and {prediction} with times to {schedule.t_max:g}"
        raise DistillError(f"{folder / EXTRA}: {wrong} is {json.dumps(getattr(extra, wrong))}: {what}", "is it of another model?")
    return extra


def _schedule(folder: Path, index: dict[str, Any]) -> tuple[NoiseSchedule, Scales, str, tuple[str, ...]]:
    """The schedule, its constants and the network's prediction, from scheduler_config.json, and what it does not say."""
    path = part_of(folder, "scheduler") / "scheduler_config.json"
    config = read_json(path)
    kind, pipeline = config.get("_class_name"), str(index.get("_class_name"))
    if (kind == CONSISTENCY_SCHEDULER) != (pipeline == EDM_PIPELINE) or kind not in (*PIXEL_SCHEDULERS, *EDM_SCHEDULERS):
        known = (CONSISTENCY_SCHEDULER,) if pipeline == EDM_PIPELINE else (*PIXEL_SCHEDULERS, "EDMEulerScheduler")
        raise DistillError(f"{path}: {kind or 'no scheduler class'} in a {pipeline}", f"a {pipeline} is read with {', '.join(known)}")
    check_named(index, "scheduler", kind, path)
    if kind not in EDM_SCHEDULERS:
        schedule, prediction = table_of(config, str(path))
        return schedule, Scales(), prediction, schedulers.assumed(config, str(path))
    if kind == "EDMEulerScheduler" and config.get("prediction_type", "epsilon") != "epsilon":
        raise DistillError(f"{path}: prediction_type {config['prediction_type']!r} with EDM's scalings", "epsilon is read")
    given = numbers_of(config, ("sigma_min", "sigma_max", "sigma_data", "rho", "num_train_timesteps"), str(path))
    low, high, grid = given["sigma_min"], given["sigma_max"], int(given["num_train_timesteps"])
    if kind == "EDMEulerScheduler" and grid == 1000:  # EDMEulerScheduler's default, which says nothing
        grid = GRID
    if not (0 < low < high and given["sigma_data"] > 0 and given["rho"] > 0 and grid > 1):
        raise DistillError(f"{path}: sigma from {low} to {high}, sigma_data {given['sigma_data']}, rho {given['rho']} over {grid} points")
    edm = EDMSchedule(low, high, given["rho"], grid)
    scales = Scales(sigma_data=given["sigma_data"], sigma_min=low)
    return edm, scales, "consistency" if kind == CONSISTENCY_SCHEDULER else "edm", ()


def load(folder: Path, name: str) -> Model:
    """The model in a pipeline folder, in float32, evaluation mode, on the CPU.

    A folder without distill.json is read as diffusers would: a ConsistencyModelPipeline is a one-step student.
    """
    import diffusers

    index = read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    schedule, scales, prediction, notes = _schedule(folder, index)
    network: Any = diffusers.UNet2DModel
    if index.get("unet") == [LIBRARIES["EDMUNet"], "EDMUNet"]:
        from distill_cli.models.edm import EDMUNet as network
    elif index.get("unet") != [LIBRARIES["UNet2DModel"], "UNet2DModel"]:
        raise DistillError(
            f"{folder}: its unet is {index.get('unet')}, not one of {', '.join(LIBRARIES)}", "pixel models of these are read"
        )
    unet = load_network(network, part_of(folder, "unet"))
    count = unet.config.num_class_embeds
    few = pipeline == EDM_PIPELINE
    extra = read_extra(folder, schedule, prediction) or Extra(
        parameterisation=prediction,
        time_input="250 ln sigma" if few else "ln sigma / 4" if prediction == "edm" else "t",
        classes=[str(i) for i in range(count - (network is not diffusers.UNet2DModel) if count else 0)],  # EDMUNet: the null row is none
        sampling=Sampling(solver="few-step", steps=1) if few else Sampling() if prediction == "edm" else Sampling(solver="ddim", steps=50),
        few_step_times=[schedule.t_max] if few else None,
        lineage=Lineage(name=name, kind="student" if few else "teacher"),
    )
    null = extra.null_label
    if extra.lineage.method == "edm" and extra.time_input == "ln sigma / 4" and not unet.config.get("label_dropout"):
        null = None  # NVlabs' networks have learned no null class, though folders converted by earlier versions name one
    model = Model(
        denoiser=NetworkDenoiser(UNet(unet), schedule, extra.parameterisation, scales, extra.time_input).eval().requires_grad_(False),
        conditioner=ClassConditioner(tuple(extra.classes), null, extra.learned),
        lineage=extra.lineage,
        sampling=extra.sampling,
        few_step_times=extra.few_step_times,
        recipe=extra.recipe,
        notes=notes,
    )
    check_pixels(model, folder)
    return model


def check_resolution(resolution: int, network: NetworkConfig) -> None:
    """Refuse pictures that the network's levels cannot halve evenly."""
    parts = 2 ** (len(network.channels) - 1)
    if resolution % parts:
        raise UsageError(f"resolution {resolution}: {len(network.channels)} network.channels need a multiple of {parts}")


def create(
    *,
    resolution: int,
    image_channels: int = 3,
    channels: list[int],
    attention: list[bool],
    layers: int = 1,
    groups: int = 16,
    head: int = 32,
    dropout: float = 0.0,
    classes: list[str],
    schedule: NoiseSchedule,
    parameterisation: str,
    lineage: Lineage,
    seed: int = 0,
) -> Model:
    """A model with random weights of `seed`; with classes, the null label is the one after them."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            sample_size=resolution,
            in_channels=image_channels,
            out_channels=image_channels,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            down_block_types=tuple("AttnDownBlock2D" if on else "DownBlock2D" for on in attention),
            up_block_types=tuple("AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attention)),
            norm_num_groups=groups,
            attention_head_dim=head,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=len(classes) + 1 if classes else None,
            dropout=dropout,
        )
    edm = isinstance(schedule, EDMSchedule)
    return Model(
        denoiser=NetworkDenoiser(UNet(unet), schedule, parameterisation, Scales(), "250 ln sigma" if edm else "t"),
        conditioner=ClassConditioner(tuple(classes), len(classes) if classes else None),
        lineage=lineage,
        sampling=Sampling() if edm else Sampling(solver="ddim", steps=50),
    )

"""distill.json: what diffusers has no place for in a pipeline folder."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from distill_cli.diffusion.schedule import NoiseSchedule
from distill_cli.errors import DistillError, printable_lines
from distill_cli.models.lineage import Lineage, Text
from distill_cli.models.lora import Adapter
from distill_cli.models.model import Model
from distill_cli.models.parts import read_json
from distill_cli.models.sampler import Sampler

EXTRA = "distill.json"


def _of_format_1(data: dict[str, Any]) -> dict[str, Any]:
    """Format 2 of data in format 1, which had no sampler: it follows from few-step times, method and parameterisation."""
    data = {**data, "format": 2}
    sampler, times, lineage = data.pop("sampling", {}), data.pop("few_step_times", None), data.get("lineage")
    if times is not None and isinstance(sampler, dict) and isinstance(lineage, dict):  # what is not is refused
        method = lineage.get("method")
        every = method in ("cd", "ct", "ict", "ect") or (data.get("parameterisation") == "consistency" and method != "dmd")
        knows = "every level" if every else "pure noise"
        sampler = {**sampler, "knows": knows, "answers": "endpoint", "guidance": "inside", "times": times}
    return {**data, "sampler": sampler}


class LoraOf(BaseModel):
    """The LoRA of a student: what it is added to, and where."""

    model_config = ConfigDict(extra="forbid")

    base: Text
    """The name by which the base was loaded."""
    rank: PositiveInt
    targets: Annotated[list[Text], Field(min_length=1)]


class Extra(BaseModel):
    """The content of distill.json."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[2] = 2
    parameterisation: Literal["eps", "v", "x0", "flow", "edm", "consistency"]
    time_input: Literal["t", "1000 t", "250 ln sigma", "ln sigma / 4"]
    boundary: float | None = None
    classes: list[Text] = []
    null_label: int | None = None
    learned: tuple[int, ...] | None = None
    sampler: Sampler = Sampler()
    lineage: Lineage
    recipe: Annotated[str, AfterValidator(printable_lines)] = ""
    size: tuple[PositiveInt, PositiveInt] | None = None
    """(H, W) of the denoiser's data, where the network's configuration has no place for it."""
    lora: LoraOf | None = None

    @model_validator(mode="before")
    @classmethod
    def _older(cls, data: Any) -> Any:
        return _of_format_1(data) if isinstance(data, dict) and data.get("format", 1) == 1 and "sampler" not in data else data


def extra_of(model: Model) -> Extra:
    """The content of a model's distill.json."""
    adapter = model.backbone
    of = LoraOf(base=adapter.source, rank=adapter.rank, targets=list(adapter.targets)) if isinstance(adapter, Adapter) else None
    return Extra(
        lora=of,
        parameterisation=model.denoiser.parameterisation,
        time_input=model.denoiser.time_input,
        boundary=model.denoiser.boundary,
        classes=list(model.conditioner.classes),
        null_label=model.conditioner.null_label,
        learned=model.conditioner.learned,
        sampler=model.sampler,
        lineage=model.lineage,
        recipe=model.recipe,
        size=model.size if model.backbone.shape[1:] != model.shape[1:] else None,
    )


def read_extra(folder: Path, schedule: NoiseSchedule, predictions: tuple[str, ...], time_inputs: tuple[str, ...]) -> Extra | None:
    """The content of distill.json, checked against the rest of the folder; None if there is no such file."""
    path = folder / EXTRA
    if not path.exists():
        return None
    try:
        extra = Extra.model_validate(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise DistillError(f"{path}: {key}: {problem['msg'].lower()}") from error
    sampler, count = extra.sampler, len(extra.classes)
    beyond = -1 if schedule.bins is not None else 0  # a table's last time is 0
    falling = all(here > there for here, there in pairwise([*sampler.times, beyond]))
    reached = not sampler.times or sampler.times[0] <= schedule.t_max * (1 + 1e-6)
    counted = bool(schedule.grid) or not sampler.edits  # times at which it may be asked besides its own
    held = {
        "parameterisation": extra.parameterisation in predictions,
        "time_input": extra.time_input in time_inputs,
        "null_label": extra.null_label in (None, count) and (bool(count) or extra.null_label is None),
        "learned": extra.learned is None or (bool(extra.learned) and set(extra.learned) <= set(range(count))),
        "sampler": sampler.coherent and falling and reached and counted,
    }
    wrong = next((key for key, fits in held.items() if not fits), None)
    if wrong:
        what = f"it does not fit {count} classes, and {predictions[0]} with times to {schedule.t_max:g}"
        said = json.dumps(extra.model_dump(mode="json", include={wrong})[wrong])
        raise DistillError(f"{path}: {wrong} is {said}: {what}", "is it of another model?")
    return extra

"""Load models by name, folder, single file or hub id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from distill_cli.errors import DistillError, UsageError, nearest
from distill_cli.models.sources.catalog import DISTILLED, HUB, LORA, MADE, Known
from distill_cli.models.sources.hub import cached, download, is_id, short_name
from distill_cli.models.sources.names import split
from distill_cli.models.sources.published import PUBLISHED, Published, fetch
from distill_cli.processes import say_hidden

if TYPE_CHECKING:
    from distill_cli.models.model import Model

BUILTIN = Path(__file__).parents[1] / "builtin"
PARTS = ("student", "teacher")
MARKS = ("model_index.json", LORA)
"""A folder with one of these files is that of a model."""


@dataclass(frozen=True)
class Entry:
    """What a built-in name stands for."""

    summary: str
    licence: str
    load: Callable[[], Model]


def _made(name: str) -> Model:
    model: Model = import_module(f"distill_cli.models.{MADE[name].module}").tiny()
    return model


def _builtin(name: str) -> Model:
    return open_folder(BUILTIN / name, name)


def _hub(name: str) -> Model:
    return load(HUB[name].id)


def _published(name: str) -> Model:
    return open_folder(fetch(name), name)


def _elsewhere(known: Mapping[str, Known | Published], get: Callable[[str], Model]) -> dict[str, Entry]:
    """The entries of models that are downloaded on first use."""
    said = "{0.summary}; {0.megabytes} MB, downloaded on first use"
    return {name: Entry(said.format(model), model.licence, partial(get, name)) for name, model in known.items()}


DIGITS = "EDM, 16x16 RGB, handwritten digits in coloured ink, 10 classes; ships with distill"
SHAPES = "Stable Diffusion in miniature: v prediction, 64x64 RGB, 4x8x8 latents, one coloured shape by its caption; ships with distill"
REGISTRY = {
    "digits": Entry(DIGITS, "Apache-2.0; data CC BY 4.0", partial(_builtin, "digits")),
    "shapes": Entry(SHAPES, "Apache-2.0", partial(_builtin, "shapes")),
    **{name: Entry(made.summary, made.licence, partial(_made, name)) for name, made in MADE.items()},
    **_elsewhere(HUB, _hub),
    **_elsewhere(PUBLISHED, _published),
}


def holds_model(folder: Path) -> bool:
    """Whether a folder is that of a model: a pipeline, or a LoRA."""
    return any((folder / name).is_file() for name in MARKS)


def rounds_of(path: Path) -> dict[int, Path]:
    """The students of a run's earlier rounds, by the number of their steps."""
    found = {folder.name.removeprefix("student-"): folder for folder in path.glob("student-*") if holds_model(folder)}
    return {int(steps): folder for steps, folder in found.items() if steps.isdecimal()}


def folder_of(path: Path, steps: int | None = None) -> Path | None:
    """The model's folder in `path`, which is one itself or a run; of a run whose rounds are kept, that of the student of `steps`."""
    kept = rounds_of(path)
    if steps in kept:
        return kept[steps]
    return next((folder for folder in (path, *(path / part for part in PARTS)) if holds_model(folder)), None)


def open_folder(folder: Path, name: str) -> Model:
    """Load the model in a diffusers pipeline folder, or in that of a LoRA, whose base is loaded first."""
    from distill_cli.models import formats

    if (folder / MARKS[0]).is_file() or not (folder / LORA).is_file():
        return formats.load(folder, name)
    base = formats.lora.source_of(folder)
    place = folder_of(Path(split(base)[0])) if Path(split(base)[0]).is_dir() else None
    if place is not None and not (place / MARKS[0]).is_file():
        raise DistillError(f"{folder}: its base, {base}, is a LoRA itself", "a LoRA lies on a whole model")
    try:
        found = load(base)
    except UsageError as error:
        hint = f"put it back, or write its new place into lora.base of {folder / 'distill.json'}"
        raise DistillError(f"{folder}: its base is not here: {error.message}", hint) from error
    return formats.lora.onto(found, folder)


def load(name: str, steps: int | None = None) -> Model:
    """The model called `name`: a built-in one, a folder (of a model, or of a run), a single file, or a hub id. Float32, on the CPU.

    With +FILE[@WEIGHT] behind it, once or several times, those LoRAs are merged into its weights.
    Of a run whose rounds are kept, the student that takes `steps`, else that of the last round.
    Raises UsageError for an unknown name and DistillError for what cannot be read.
    """
    base, loras = split(str(name))
    if loras:
        from distill_cli.models.sources import lora_files

        return lora_files.on(load(base, steps), loras)
    if name in REGISTRY:
        say_hidden("model", name, "the built-in one")
        model = REGISTRY[name].load()
        model.denoiser.eval().requires_grad_(False)
        return model
    path = Path(name)
    if path.is_dir():
        folder = folder_of(path, steps)
        if folder is not None:
            model, kept = open_folder(folder, path.name), rounds_of(path)
            if steps is not None and kept and steps not in (*kept, model.sampler.steps):
                known = ", ".join(map(str, sorted({*kept, model.sampler.steps}, reverse=True)))
                raise UsageError(f"--steps {steps}: {name} has students of {known} steps")
            return model
        if (path / "recipe.yaml").is_file():
            for part in ("classifier", "vae", "clip"):
                if (path / part).is_dir():
                    hint = f"what it has trained is in {path / part}"
                    raise DistillError(f"{path}: a run of `distill {part}`: it makes no pictures", hint)
            raise DistillError(f"{path}: a run that has not finished: it has no student yet", f"finish it with --resume {path}")
        raise DistillError(f"{path}: no model: it has no model_index.json", "give a diffusers pipeline folder")
    if path.is_file():
        from distill_cli.models.sources import single_file

        return single_file.load(path)
    if is_id(name) and path.parent.is_dir() and not short_name(name) and cached(name) is None:
        hint = nearest(path.name, [found.name for found in path.parent.iterdir()], f"{path.parent} has")
        raise UsageError(f"{name}: no such folder", hint)
    if name in DISTILLED:
        raise UsageError(f"{name}: distilled already, so it is no teacher", f"its base: {DISTILLED[name]}")
    if is_id(name):
        from distill_cli.models.formats import PIPELINES

        model = open_folder(download(name, PIPELINES), name)
        known = short_name(name)
        if known and not model.lineage.licence:
            model.lineage = model.lineage.model_copy(update={"licence": HUB[known].licence})
        return model
    raise UsageError(f"{name}: no model of that name and no such folder", nearest(name, REGISTRY, "built in"))

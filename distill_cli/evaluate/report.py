"""Compare models with a set of real data: one table, as text, JSON and, of what can be drawn, a picture."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distill_cli import launch, processes
from distill_cli.config import EvaluateConfig, SampleConfig
from distill_cli.data import Images, npz, open_images
from distill_cli.data.kinds import PICTURES, Kind
from distill_cli.data.pictures import save_comparison, to_uint8
from distill_cli.errors import UsageError
from distill_cli.evaluate import page
from distill_cli.files import bounded, remove_temporaries, write_atomic
from distill_cli.methods.registry import load as named
from distill_cli.models import load
from distill_cli.models.model import Model
from distill_cli.runs import settle, versions
from distill_cli.sample import batch

AGAIN = "the reference, resampled"
REFERENCE_SEED, AGAIN_SEED = 0, 1
SHOWN, PART = 40, 500
Columns = dict[str, tuple[str, str]]
"""The columns of a table: their titles, each with a key of the rows and the format of its values."""
SAMPLED: Columns = {
    "model": ("model", ""), "images": ("images", ""), "evaluations": ("network_evaluations", ""), "images/s": ("images_per_second", ".1f"),
}  # fmt: skip


def split(spec: str) -> tuple[str, int | None]:
    """`NAME@2` -> (NAME, 2 steps); `NAME`, or a path that exists -> (itself, None: the model's own steps)."""
    name, at, steps = spec.rpartition("@")
    if not at or Path(spec).exists():
        return spec, None
    if not steps.isdecimal() or not int(steps):
        raise UsageError(f"--model {spec}: a number of steps must follow @")
    return name, int(steps)


def shared(count: int, part: int, of: Callable[[range], tuple[Tensor, ...]], where: torch.device) -> list[Tensor]:
    """What `of` returns for every `part` places of 0 .. count-1, joined. Processes share the work, and all of them return the whole."""
    ranges = [range(first, min(count, first + part)) for first in range(0, count, part)]
    made = sorted(launch.all_of([(k, of(ranges[k])) for k in processes.mine(len(ranges))], where), key=lambda each: each[0])
    return [torch.cat(values) for values in zip(*(values for _, values in made), strict=True)]


def markdown(columns: Columns, rows: Iterable[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table; None is an empty cell."""
    cells = [["" if row[key] is None else f"{row[key]:{form}}" for key, form in columns.values()] for row in rows]
    head, *lines = ["| " + " | ".join(line) + " |" for line in (columns, *cells)]
    return [head, "|" + "---|" * len(columns), *lines]


def samples_of(out: Path, k: int, spec: str) -> Path:
    """The folder of the k-th model's samples."""
    return out / "samples" / bounded(f"{k}-{re.sub(r'[^A-Za-z0-9_.@-]+', '_', spec)}")


class Evaluation:
    """The folder of an evaluation, begun or continued: settings, samples, the speed at which they were made, the report."""

    def __init__(self, config: EvaluateConfig) -> None:
        assert config.out is not None
        self.folder, self.rates, self.where = config.out, config.out / "rates.json", launch.device(config.device)
        unsaid = {"negative_prompt"} if config.negative_prompt is None else set()  # as in folders of earlier versions
        self.settings = config.model_dump(mode="json", exclude={"out", "device"} | unsaid)
        settle(self.folder / "evaluation.json", self.settings, "an evaluation")
        remove_temporaries(self.folder)
        try:
            self.known: dict[str, float | None] = dict(json.loads(self.rates.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            self.known = {}

    def cost(self, spec: str, made: dict[str, Any]) -> dict[str, Any]:
        """A model's columns about its sampling, from what `batch.sample` returned; waits for all processes.

        Samples that are kept from an earlier call have the speed of then.
        """
        rates = launch.all_of([made["images_per_second"]], self.where)
        self.known[spec] = self.known.get(spec) if None in rates else sum(rates)
        if processes.rank() == 0:
            write_atomic(self.rates, json.dumps(self.known) + "\n")
        return {"network_evaluations": made["network_evaluations"], "images_per_second": self.known[spec]}

    def finish(
        self,
        report: dict[str, Any],
        table: str,
        pictures: Sequence[tuple[str, np.ndarray]],
        columns: int,
        scale: int = 4,
        captions: Sequence[str] = (),
        worst: Sequence[page.Strip] = (),
    ) -> None:
        """Write report.json, report.md, report.html and, of pictures, picture.png.

        `captions` say what pictures at one place have in common; `worst` are the pictures with the lowest scores, with captions.
        """
        if processes.rank() == 0:
            write_atomic(self.folder / "report.json", json.dumps(report, indent=2) + "\n")
            write_atomic(self.folder / "report.md", table + "\n")
            page.write(self.folder, report, SAMPLED, self.settings, pictures, captions, worst)
            if pictures:
                save_comparison(pictures, self.folder / "picture.png", columns, scale)


class Measure(ABC):
    """How samples are measured against a set of real data."""

    columns: ClassVar[Columns]
    """The columns of the scores."""
    least: int
    """Fewer samples cannot be measured."""
    classes: tuple[str, ...]
    """The names of the labels that it can compare."""
    knows: str = "the reference has"
    """Who knows the labels, for errors."""
    text: str
    """The reference, in words."""
    about: str
    """What is measured, in words."""

    @abstractmethod
    def __init__(self, config: EvaluateConfig, images: Images) -> None:
        """Raises UsageError for a set that cannot be measured against."""
        self.images = images

    @abstractmethod
    def measure(self, x: Tensor, labels: Tensor | None) -> dict[str, float | None]:
        """The scores of x (N, C, H, W); `labels` (N,) are those asked for."""

    @abstractmethod
    def again(self, count: int) -> tuple[dict[str, float | None], Tensor]:
        """The scores of `count` samples drawn from the set with replacement, and the first few of them.

        A generator that has memorised the set would get these scores. They are no bound, but a scale for reading the others.
        """

    def title(self, row: dict[str, Any]) -> str:
        """The title of a model's pictures in picture.png."""
        return str(row["model"])

    def warning(self, row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
        """Why a row of the table says little, or ''."""
        return ""


def read_npz(path: Path, kind: Kind = PICTURES) -> tuple[Tensor, Tensor | None]:
    """Data (N, C, H, W) of a kind and labels (N,) from a file as `distill sample` writes it; None if all labels are 0."""
    if not path.exists():
        raise UsageError(f"--model {path}: no such file")
    images, labels = npz.read_npz(path, "write it again with `distill sample --format npz`")
    x = kind.read(images, f"--model {path}")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(images),)):
        raise UsageError(f"--model {path}: arr_1 is {labels.dtype} {labels.shape}", "whole numbers, one an image, are expected")
    labelled = labels is not None and labels.any()  # models without classes have label 0 throughout
    return x, torch.from_numpy(np.asarray(labels, np.int64)) if labelled else None


@dataclass
class Row:
    """A line of the table before measurement: images from a file, or a model that will make them."""

    spec: str
    kind: Kind
    images: Tensor | None = None
    labels: Tensor | None = None
    model: Model | None = None
    steps: int | None = None

    @property
    def about(self) -> str:
        """A short description of what was read, for the job's first line."""
        if self.model is not None:
            return f"{self.spec} ({self.model.about})"
        assert self.images is not None
        return f"{len(self.images)} {self.kind.name} of {self.spec}{', no labels' if self.labels is None else ''}"

    @classmethod
    def of(cls, spec: str, config: EvaluateConfig, reference: Measure) -> Row:
        """Load the model or images that `spec` names; raises UsageError before anything is sampled."""
        kind, shape, classes = reference.images.kind, tuple(reference.images.shape), reference.classes
        if spec.lower().endswith(".npz"):
            row = cls(spec, kind, *read_npz(Path(spec), kind))
            assert row.images is not None
            row.labels = row.labels if classes else None
            wrong = [] if row.labels is None else row.labels[(row.labels < 0) | (row.labels >= len(classes))].tolist()
            if wrong:
                raise UsageError(
                    f"--model {spec}: arr_1 has label {wrong[0]}, and {reference.knows} 0 to {len(classes) - 1}",
                    "labels count from 0; a file without arr_1 is measured without them",
                )
            found, count = tuple(row.images.shape[1:]), len(row.images)
        else:
            name, steps = split(spec)
            row = cls(spec, kind, model=load(name, steps), steps=steps)
            assert row.model is not None
            if row.model.conditioner.takes == "prompts":
                raise UsageError(f"--model {spec}: makes pictures of prompts", "--prompts FILE clip=FOLDER measures how well they fit them")
            row.model.with_defaults(None, steps, None)
            row.model.conditioner.labels(1, config.classes)
            made = row.model.codec.kind
            if made is not kind:
                raise UsageError(f"--model {spec}: makes {made.name}, --data {config.data} has {kind.name}", "give a --data of its kind")
            found, count = made.written(row.model.shape), config.num
        if found != shape:
            hint = "--data FOLDER --resolution N --classifier RUN measure against images of your own"
            raise UsageError(f"--model {spec}: {kind.name} of {found}, the reference has {shape}", hint)
        if count < reference.least:
            raise UsageError(f"--model {spec}: {count} {kind.name} are too few to measure anything", f"more than {reference.least - 1}")
        return row

    def sampled(self, config: EvaluateConfig, to: Evaluation, k: int, reference: Measure) -> dict[str, Any]:
        """Make the images of row k, and the labels if the reference has the same classes; returns the cost of sampling."""
        if self.model is None:
            return to.cost(self.spec, {"network_evaluations": None, "images_per_second": None})
        options = config.model_dump(include={"num", "seed", "device", "precision", "classes"})
        asked = SampleConfig(model=self.spec, steps=self.steps, format="npz", batch_size=config.batch_size or 100, **options)
        folder = samples_of(to.folder, k, self.spec)
        cost = to.cost(self.spec, batch.sample(asked, self.model, folder))  # the parts are joined then
        self.images, _ = read_npz(folder / "samples.npz", reference.images.kind)
        if self.model.conditioner.classes == reference.classes:
            self.labels = self.model.conditioner.labels(config.num, config.classes)
        return cost


def evaluate(config: EvaluateConfig, say_read: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Sample and measure the models in `config.model`, and write the report and picture.png; returns the report.

    `say_read` is called with what was read, before sampling. Processes share the work; all return the same report, process 0 writes it.
    """
    images = open_images(config.data, config.resolution)
    reference: Measure = named(images.kind.measure)(config, images)
    todo = [Row.of(spec, config, reference) for spec in config.model]
    say_read(images, *todo)
    folder = Evaluation(config)
    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, Tensor]] = []
    for k, row in enumerate(todo):
        cost = row.sampled(config, folder, k, reference)
        assert row.images is not None
        rows.append({"model": row.spec, "images": len(row.images), **cost, **reference.measure(row.images, row.labels)})
        shown.append((reference.title(rows[-1]), row.images[:SHOWN]))
        row.images = row.model = None  # the next row's need the room
    for count in sorted({row["images"] for row in rows}):
        scores, first = reference.again(count)
        rows.append({"model": AGAIN, "images": count, "network_evaluations": None, "images_per_second": None, **scores})
    shown.append((AGAIN, first))
    report = {
        "reference": reference.text,
        "features": reference.about,
        "columns": reference.columns,
        "seed": config.seed,
        "rows": rows,
        "warnings": [text for row in rows if (text := reference.warning(row, rows))],
        "versions": versions(),
    }
    pictures = [(title, to_uint8(x)) for title, x in shown] if images.kind.drawn else []
    folder.finish(report, table(report), pictures, columns=20)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, followed by the reference and any warnings."""
    about = f"Reference: {report['reference']}. {report['features']}. Noise of seed {report['seed']}, classes in turn."
    warnings = [f"Warning: {warning}." for warning in report["warnings"]]
    return "\n".join([*markdown(SAMPLED | report["columns"], report["rows"]), "", about, *warnings])

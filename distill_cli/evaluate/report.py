"""Compare models with a set of real data: one table, as text, JSON and, of what can be drawn, a picture."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_cli import launch, processes
from distill_cli.config import BUILTIN_SETS, EvaluateConfig, SampleConfig
from distill_cli.data import Images, npz, open_images
from distill_cli.data.kinds import PICTURES, Kind
from distill_cli.data.pictures import save_comparison, to_uint8
from distill_cli.errors import UsageError
from distill_cli.evaluate import page
from distill_cli.evaluate.sources import AGAIN as AGAIN_NPZ
from distill_cli.evaluate.sources import Given, Source, labels_of, open_source
from distill_cli.files import bounded, remove_temporaries, write_atomic
from distill_cli.methods.registry import load as named
from distill_cli.models import load
from distill_cli.models.model import Model
from distill_cli.runs import settle, versions
from distill_cli.sample import batch

AGAIN = "the reference, resampled"
REFERENCE_SEED, AGAIN_SEED = 0, 1
SHOWN = 40
Columns = dict[str, tuple[str, str]]
"""The columns of a table: their titles, each with a key of the rows and the format of its values."""
SAMPLED: Columns = {
    "model": ("model", ""), "images": ("images", ""), "evaluations": ("network_evaluations", ""), "images/s": ("images_per_second", ".1f"),
}  # fmt: skip

Lowest = tuple[str, Tensor]
"""A score that each picture has of its own: its name, and values (N,)."""
WORST = 8
"""Pictures with the lowest scores that the page shows of each model."""


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
    """The lines of a Markdown table; None is an empty cell, and a spread stands behind its score."""
    cells = [[page.cell(row, key, form) for key, form in columns.values()] for row in rows]
    head, *lines = ["| " + " | ".join(line) + " |" for line in (columns, *cells)]
    return [head, "|" + "---|" * len(columns), *lines]


def samples_of(out: Path, k: int, spec: str) -> Path:
    """The folder of the k-th model's samples."""
    return out / "samples" / bounded(f"{k}-{re.sub(r'[^A-Za-z0-9_.@-]+', '_', spec)}")


def worst_of(spec: str, source: Source, scores: Sequence[Lowest], asked: Callable[[int], str]) -> list[page.Strip]:
    """The pictures of a model with the lowest of each of `scores`, below its highest; `asked` gives what one was asked for."""
    strips: list[page.Strip] = []
    for title, values in scores:
        found = [i for i in values.argsort(stable=True)[:WORST].tolist() if values[i] < values.max()]
        if found:
            shown = to_uint8(torch.cat([source.batch(range(i, i + 1)) for i in found]))
            strips.append((f"{spec}: {title}", shown, [f"{values[i]:.2f}: {asked(i)}" for i in found]))
    return strips


FILES = (".npz", ".pkl", ".pickle", ".pt", ".pth")
"""Suffixes of files that --data may name, though most are refused."""
LATER = ("negative_prompt", "features", "measures", "inception", "dinov2", "kid_subsets", "kid_subset_size", "bootstrap", "attributes")
"""Settings that folders of earlier versions lack; they stand in a folder only if they are not the default."""


class Evaluation:
    """The folder of an evaluation, begun or continued: settings, samples, the speed at which they were made, the report."""

    def __init__(self, config: EvaluateConfig) -> None:
        assert config.out is not None
        self.folder, self.rates, self.where = config.out, config.out / "rates.json", launch.device(config.device)
        unsaid = {key for key in LATER if not config.changed(key)}
        self.settings = config.model_dump(mode="json", exclude={"out", "device", "save_statistics"} | unsaid)
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
    """How samples are measured against real data."""

    columns: Columns
    """The columns of the scores."""
    kind: Kind
    """The kind of data."""
    shape: tuple[int, ...] | None = None
    """(C, H, W) of the real data; None where they are not there, and their statistics are."""
    least: int
    """Fewer samples cannot be measured."""
    classes: tuple[str, ...] = ()
    """The names of the labels that it can compare."""
    knows: str = "the reference has"
    """Who knows the labels, for errors."""
    read: str
    """What was read, for the job's first line."""
    text: str
    """The reference, in words."""
    about: str
    """What is measured, in words."""

    @abstractmethod
    def __init__(self, config: EvaluateConfig, images: Images) -> None:
        """Raises UsageError for a set that cannot be measured against."""

    def begin(self) -> None:
        """Do what takes long, once the evaluation's folder is there; `text` and `about` are known then."""
        return

    @abstractmethod
    def measure(self, source: Source) -> dict[str, float | None]:
        """The scores of samples, and their spreads under the keys that end in SPREAD."""

    @abstractmethod
    def again(self, count: int) -> tuple[dict[str, float | None], Tensor] | None:
        """The scores of `count` samples drawn from the set with replacement, and a few to show; None of statistics alone.

        A generator that has memorised the set would get these scores. They are no bound, but a scale for reading the others.
        """

    def judged(self, source: Source) -> tuple[dict[str, float | None], list[Lowest]]:
        """The scores by judges of each sample and the class that was asked for; `columns` has them from then on. And those by sample."""
        return {}, []

    def asked(self, source: Source, i: int) -> str:
        """The name of the class that sample i was asked to be; '' where it is not known."""
        names = source.classes or self.classes
        return "" if source.labels is None or not names else names[int(source.labels[i])]

    def refuse(self, spec: str, count: int, shape: tuple[int, ...]) -> None:
        """Raise UsageError if samples have another shape (C, H, W) than the real data, or are too few."""
        if self.shape is not None and shape != tuple(self.shape):
            hint = "--data FOLDER --resolution N --classifier RUN measure against images of your own"
            raise UsageError(f"--model {spec}: {self.kind.name} of {shape}, the reference has {tuple(self.shape)}", hint)
        if count < self.least:
            said = f"--model {spec}: {count} {self.kind.name} are too few to measure anything"
            raise UsageError(said, f"more than {self.least - 1}")

    def save_statistics(self, path: Path) -> None:
        """Write what a later evaluation needs of the reference. Raises UsageError if there is no such thing."""
        self.kind.needs_pictures("save_statistics")

    def title(self, row: dict[str, Any]) -> str:
        """The title of a model's pictures in picture.png."""
        return str(row["model"])

    def warnings(self, row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
        """Why a row of the table says little."""
        return []


def read_npz(path: Path, kind: Kind = PICTURES) -> tuple[Tensor, Tensor | None]:
    """Data (N, C, H, W) of a kind and labels (N,) from a file as `distill sample` writes it; None if all labels are 0."""
    if not path.exists():
        raise UsageError(f"--model {path}: no such file")
    images, labels = npz.read_npz(path, AGAIN_NPZ)
    x = kind.read(images, f"--model {path}")
    return x, labels_of(labels, len(images), f"--model {path}")


def opened(spec: str, kind: Kind, resolution: int | None) -> Source | None:
    """Finished samples of an npz file or a folder; None for what must be a model."""
    if kind.drawn:
        return open_source(spec, "--model", resolution)
    if not spec.lower().endswith(".npz"):
        return None
    x, labels = read_npz(Path(spec), kind)
    return Given(x, labels, kind, f"{len(x)} {kind.name} of {spec}")


@dataclass
class Row:
    """A line of the table before measurement: finished samples, or a model that will make them."""

    spec: str
    source: Source | None = None
    model: Model | None = None
    steps: int | None = None

    @property
    def about(self) -> str:
        """A short description of what was read, for the job's first line."""
        if self.model is not None:
            return f"{self.spec} ({self.model.about})"
        assert self.source is not None
        return f"{self.source.about}{', no labels' if self.source.labels is None else ''}"

    @classmethod
    def of(cls, spec: str, config: EvaluateConfig, reference: Measure) -> Row:
        """Load the model or samples that `spec` names; raises UsageError before anything is sampled."""
        kind = reference.kind
        row = cls(spec, opened(spec, kind, config.resolution))
        if row.source is not None:
            _relabel(row.source, spec, reference)
            found, count = tuple(row.source.shape), len(row.source)
        else:
            name, steps = split(spec)
            row = cls(spec, model=load(name, steps), steps=steps)
            assert row.model is not None
            if row.model.conditioner.takes == "prompts":
                raise UsageError(f"--model {spec}: makes pictures of prompts", "--prompts FILE clip=FOLDER measures how well they fit them")
            row.model.with_defaults(None, steps, None)
            row.model.conditioner.labels(1, config.classes)
            made = row.model.codec.kind
            if made is not kind:
                raise UsageError(f"--model {spec}: makes {made.name}, --data {config.data} has {kind.name}", "give a --data of its kind")
            found, count = made.written(row.model.shape), config.num
        reference.refuse(spec, count, found)
        return row

    def sampled(self, config: EvaluateConfig, to: Evaluation, k: int, reference: Measure) -> tuple[Source, dict[str, Any]]:
        """Make the samples of row k, with labels if the reference has the same classes; returns them and the cost of sampling."""
        if self.model is None:
            assert self.source is not None
            return self.source, to.cost(self.spec, {"network_evaluations": None, "images_per_second": None})
        options = config.model_dump(include={"num", "seed", "device", "precision", "classes"})
        asked = SampleConfig(model=self.spec, steps=self.steps, format="npz", batch_size=config.batch_size or 100, **options)
        folder = samples_of(to.folder, k, self.spec)
        cost = to.cost(self.spec, batch.sample(asked, self.model, folder))  # the parts are joined then
        source = opened(str(folder / "samples.npz"), reference.kind, None)
        assert source is not None
        same = bool(reference.classes) and self.model.conditioner.classes == reference.classes
        source.labels = self.model.conditioner.labels(config.num, config.classes) if same else None
        self.model = None  # the next row's needs the room
        return source, cost


def _relabel(source: Source, spec: str, reference: Measure) -> None:
    """Number the labels of finished samples as the reference does, or drop them. Raises UsageError for labels that it does not have."""
    classes = reference.classes
    if source.labels is not None and source.classes:
        numbers = [classes.index(name) if name in classes else -1 for name in source.classes]
        source.labels = None if -1 in numbers else torch.tensor(numbers)[source.labels]
    source.labels = source.labels if classes else None
    wrong = [] if source.labels is None else source.labels[(source.labels < 0) | (source.labels >= len(classes))].tolist()
    if wrong:
        raise UsageError(
            f"--model {spec}: arr_1 has label {wrong[0]}, and {reference.knows} 0 to {len(classes) - 1}",
            "labels count from 0; a file without arr_1 is measured without them",
        )


def reference_images(config: EvaluateConfig) -> Images | None:
    """The set that --data names; None for what is measured against as it stands: a file, or a folder whose pictures are not cropped."""
    path = Path(config.data)
    as_it_is = path.suffix.lower() in FILES or (config.resolution is None and "classifier" not in config.features and path.is_dir())
    return None if config.data not in BUILTIN_SETS and as_it_is else open_images(config.data, config.resolution)


def evaluate(config: EvaluateConfig, say_read: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Sample and measure the models in `config.model`, and write the report and picture.png; returns the report.

    `say_read` is called with what was read, before sampling. Processes share the work; all return the same report, process 0 writes it.
    """
    images = reference_images(config)
    kind = PICTURES if images is None else images.kind
    reference: Measure = named(kind.measure)(config, images)
    asked = config.model if "model" in config.model_fields_set or config.save_statistics is None else []
    todo = [Row.of(spec, config, reference) for spec in asked]
    say_read(reference.read, *todo)
    folder = Evaluation(config)
    reference.begin()
    if config.save_statistics is not None and processes.rank() == 0:
        reference.save_statistics(config.save_statistics)
    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, Tensor]] = []
    worst: list[page.Strip] = []
    for k, row in enumerate(todo):
        source, cost = row.sampled(config, folder, k, reference)
        measured, (judged, scores) = reference.measure(source), reference.judged(source)
        rows.append({"model": row.spec, "images": len(source), **cost, **measured, **judged})
        worst += worst_of(row.spec, source, scores, partial(reference.asked, source))
        shown.append((reference.title(rows[-1]), source.batch(range(min(SHOWN, len(source))))))
    more, first = resampled(reference, rows, SAMPLED | reference.columns)
    rows += more
    if first is not None:
        shown.append((AGAIN, first))
    report = {
        "reference": reference.text,
        "features": reference.about,
        "columns": reference.columns,
        "seed": config.seed,
        "rows": rows,
        "warnings": [text for row in rows for text in reference.warnings(row, rows)],
        "versions": versions(),
    }
    pictures = [(title, to_uint8(x)) for title, x in shown] if kind.drawn else []
    folder.finish(report, table(report), pictures, columns=20, worst=worst)
    return report


def resampled(reference: Measure, rows: Sequence[dict[str, Any]], columns: Columns) -> tuple[list[dict[str, Any]], Tensor | None]:
    """A row of the reference itself for every number of samples in the table, and a few of its samples; none of statistics alone."""
    out, first = [], None
    for count in sorted({row["images"] for row in rows}):
        if found := reference.again(count):
            scores, first = found
            out.append({**dict.fromkeys(key for key, _ in columns.values()), "model": AGAIN, "images": count, **scores})
    return out, first


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, followed by the reference and any warnings."""
    about = f"Reference: {report['reference']}. {report['features']}. Noise of seed {report['seed']}, classes in turn."
    warnings = [f"Warning: {warning}." for warning in report["warnings"]]
    return "\n".join([*markdown(SAMPLED | report["columns"], report["rows"]), "", about, *warnings])

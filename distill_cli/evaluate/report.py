"""Compare models with real images in a classifier's features: one table, as text, JSON and a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_cli import launch, processes
from distill_cli.config import EvaluateConfig, SampleConfig
from distill_cli.data import Images, open_images
from distill_cli.data.pictures import from_uint8, save_comparison, to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.evaluate.distances import frechet, precision_recall, radii
from distill_cli.files import bounded, remove_temporaries, write_atomic
from distill_cli.models import load
from distill_cli.models.classifier import Classifier
from distill_cli.models.classifier import load as load_classifier
from distill_cli.models.model import Model
from distill_cli.runs import settle, versions
from distill_cli.sample import batch

AGAIN = "the reference, resampled"
REFERENCE_SEED, AGAIN_SEED = 0, 1
SHOWN, PART = 40, 500
RATES = "rates.json"
ENOUGH = 10
"""Images for each feature below which a Fréchet distance gets a warning."""
COLUMNS = ("model", "images", "evaluations", "images/s", "accuracy", "frechet", "precision", "recall")


class Reference:
    """The real images, each taken once: their features, and scores of images against them."""

    def __init__(self, config: EvaluateConfig, images: Images, classifier: Classifier) -> None:
        info = classifier.info
        if tuple(images.shape) != info.shape or tuple(images.classes) != info.classes:
            theirs = f"{len(images.classes)} of {tuple(images.shape)}"
            if len(images.classes) == len(info.classes) and tuple(images.shape) == info.shape:
                theirs = f"others: {', '.join(images.classes[:3])}, ..."
            known = f"--classifier {config.classifier}: knows {len(info.classes)} classes of {info.shape} images"
            raise UsageError(f"{known}, --data {config.data} has {theirs}", "distill classifier --data trains one for your images")
        self.config, self.images, self.classifier = config, images, classifier
        every = range(len(images))
        self.features, _, labels, _ = self._measured(every, Draws(REFERENCE_SEED, every))
        wanted = range(len(images.classes)) if config.classes is None else config.classes
        of_them = torch.isin(labels, torch.tensor(list(wanted)))
        self.positions, self.features = of_them.nonzero().flatten().tolist(), self.features[of_them]
        if len(self.positions) <= config.neighbours + 1:
            raise UsageError(f"--data {config.data}: {len(self.positions)} images are too few to measure against", "take more of them")
        which = "all" if config.classes is None else f"of classes {', '.join(map(str, config.classes))} the"
        drawn = f"each once, what is random in them drawn with seed {REFERENCE_SEED}"
        self.text = f"{which} {len(self.positions)} images of {config.data}, {drawn}"

    def _measured(self, positions: Sequence[int], draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, predicted labels and true labels of images of the set, and the first few images."""

        def images(part: range) -> tuple[Tensor, Tensor]:
            return self.images.batch([positions[i] for i in part], Draws(draws.seed, [draws.indices[i] for i in part]))

        return measured(self.classifier, len(positions), images)

    def again(self, count: int) -> tuple[dict[str, float | None], Tensor]:
        """The scores of `count` images drawn from the set with replacement, and the first few of them.

        A generator that has memorised the set would get these scores. They are no bound, but a scale for reading the others.
        """
        draws = Draws(AGAIN_SEED, range(count))
        positions = [self.positions[i] for i in (draws.uniform("order") * len(self.positions)).long().tolist()]
        features, predicted, labels, shown = self._measured(positions, draws)
        return self._scores(features, predicted, labels), shown

    @cached_property
    def reach(self) -> Tensor:
        """(N,) distance of each real image to its k-th nearest neighbour, for precision."""
        return radii(self.features, self.config.neighbours)

    def frechet(self, images: Tensor) -> float:
        """The Fréchet distance of images (N, C, H, W) to the real ones."""
        return frechet(self.classifier.measure(images)[0], self.features)

    def measure(self, images: Tensor, labels: Tensor | None) -> dict[str, float | None]:
        """Accuracy (None without `labels`, those asked for), Fréchet distance, precision and recall of images (N, C, H, W)."""
        unknown = torch.zeros(len(images)) if labels is None else labels
        features, predicted, _, _ = measured(
            self.classifier, len(images), lambda part: (images[part.start : part.stop], unknown[part.start : part.stop])
        )
        return self._scores(features, predicted, labels)

    def _scores(self, features: Tensor, predicted: Tensor, labels: Tensor | None) -> dict[str, float | None]:
        precision, recall = precision_recall(self.features, features, self.config.neighbours, self.reach)
        return {
            "accuracy": None if labels is None else (predicted == labels).double().mean().item(),
            "frechet": frechet(features, self.features),
            "precision": precision,
            "recall": recall,
        }


def measured(classifier: Classifier, count: int, images: Callable[[range], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, predicted labels and true labels of `count` images, and the first few images.

    `images` returns the images of a range and their labels. Processes share the ranges, and all of them return the whole.
    """
    ranges = [range(first, min(count, first + PART)) for first in range(0, count, PART)]
    mine = []
    for k in processes.mine(len(ranges)):
        pixels, labels = images(ranges[k])
        mine.append((k, *classifier.measure(pixels), labels, pixels[: SHOWN if k == 0 else 0]))
    parts = sorted(launch.all_of(mine, next(classifier.parameters()).device), key=lambda part: part[0])
    features, predicted, true, shown = (torch.cat([part[k] for part in parts]) for k in range(1, 5))
    return features, predicted, true, shown


def split(spec: str) -> tuple[str, int | None]:
    """`NAME@2` -> (NAME, 2 steps); `NAME`, or a path that exists -> (itself, None: the model's own steps)."""
    name, at, steps = spec.rpartition("@")
    if not at or Path(spec).exists():
        return spec, None
    if not steps.isdecimal() or not int(steps):
        raise UsageError(f"--model {spec}: after @ comes a number of steps")
    return name, int(steps)


def read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) in [-1, 1] and labels (N,) from a file as `distill sample` writes it; None if all labels are 0."""
    if not path.exists():
        raise UsageError(f"--model {path}: no such file")
    images, labels = batch.read_npz(path, "write it again with `distill sample --format npz`")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UsageError(f"--model {path}: arr_0 is {images.dtype} {images.shape}, not uint8 (N, H, W, 3)", _as_expected(images))
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(images),)):
        raise UsageError(f"--model {path}: arr_1 is {labels.dtype} {labels.shape}", "whole numbers, one an image, are expected")
    labelled = labels is not None and labels.any()  # models without classes have label 0 throughout
    return from_uint8(images), torch.from_numpy(np.asarray(labels, np.int64)) if labelled else None


def _as_expected(images: np.ndarray) -> str:
    """A hint: how to turn images of another type or layout into uint8 (N, H, W, 3)."""
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        return "channels come last: x.transpose(0, 2, 3, 1)"
    if images.dtype.kind == "f":
        return "for values in [0, 1]: (255 * x).round().astype('uint8')"
    return "three channels of 0 to 255, channels last"


@dataclass
class Row:
    """A line of the table before measurement: images from a file, or a model that will make them."""

    spec: str
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
        return f"{len(self.images)} pictures of {self.spec}{', no labels' if self.labels is None else ''}"

    @classmethod
    def of(cls, spec: str, config: EvaluateConfig, shape: tuple[int, ...], classes: Sequence[str]) -> Row:
        """Load the model or images that `spec` names; raises UsageError before anything is sampled."""
        if spec.lower().endswith(".npz"):
            row = cls(spec, *read_npz(Path(spec)))
            assert row.images is not None
            wrong = [] if row.labels is None else row.labels[(row.labels < 0) | (row.labels >= len(classes))].tolist()
            if wrong:
                raise UsageError(
                    f"--model {spec}: arr_1 has label {wrong[0]}, and --classifier {config.classifier} knows 0 to {len(classes) - 1}",
                    "labels count from 0; a file without arr_1 is measured without them",
                )
            found, count = tuple(row.images.shape[1:]), len(row.images)
        else:
            name, steps = split(spec)
            row = cls(spec, model=load(name, steps), steps=steps)
            assert row.model is not None
            if row.model.conditioner.takes == "prompts":
                raise UsageError(f"--model {spec}: makes pictures of prompts", "--prompts FILE clip=FOLDER measures how well they fit them")
            row.model.with_defaults(None, steps, None)
            row.model.conditioner.labels(1, config.classes)
            found, count = (3, *row.model.shape[1:]), config.num  # grey pictures are stored as colour ones
        if found != shape:
            hint = "--data FOLDER --resolution N --classifier RUN measure against images of your own"
            raise UsageError(f"--model {spec}: images of {found}, the reference has {shape}", hint)
        if count <= config.neighbours + 1:
            raise UsageError(f"--model {spec}: {count} images are too few to measure anything", f"more than {config.neighbours + 1}")
        return row

    def sampled(self, config: EvaluateConfig, folder: Path, classes: tuple[str, ...]) -> dict[str, Any]:
        """Make the images, and the labels if the classifier has the same classes; returns the cost of sampling."""
        if self.model is None:
            return {"network_evaluations": None, "images_per_second": None}
        options = config.model_dump(include={"num", "seed", "device", "precision", "classes"})
        size = config.batch_size or 100
        made = batch.sample(SampleConfig(model=self.spec, steps=self.steps, format="npz", batch_size=size, **options), self.model, folder)
        rates = launch.all_of([made["images_per_second"]], launch.device(config.device))  # waits until all parts are joined
        made["images_per_second"] = None if None in rates else sum(rates)
        self.images, _ = read_npz(folder / "samples.npz")
        if self.model.conditioner.classes == classes:
            self.labels = self.model.conditioner.labels(config.num, config.classes)
        return made


def evaluate(config: EvaluateConfig, say_read: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Sample and measure the models in `config.model`, and write report.json, report.md and picture.png; returns the report.

    `say_read` is called with what was read, before sampling. Processes share the work; all return the same report, process 0 writes it.
    """
    assert config.out is not None
    classifier = load_classifier(config.classifier).to(launch.device(config.device))
    reference = Reference(config, open_images(config.data, config.resolution), classifier)
    todo = [Row.of(spec, config, tuple(reference.images.shape), classifier.info.classes) for spec in config.model]
    say_read(reference.images, *todo)
    settle(config.out / "evaluation.json", config.model_dump(mode="json", exclude={"out", "device"}), "an evaluation")
    remove_temporaries(config.out)
    rates = old_rates(config.out / RATES)
    rows: list[dict[str, Any]] = []
    pictures = []
    for k, row in enumerate(todo):
        cost = row.sampled(config, samples_of(config.out, k, row.spec), classifier.info.classes)
        assert row.images is not None
        rate = rates[row.spec] = cost["images_per_second"] or rates.get(row.spec)
        if processes.rank() == 0:
            write_atomic(config.out / RATES, json.dumps(rates) + "\n")
        known = {"network_evaluations": cost["network_evaluations"], "images_per_second": rate}
        rows.append({"model": row.spec, "images": len(row.images), **known, **reference.measure(row.images, row.labels)})
        pictures.append((title(rows[-1]), to_uint8(row.images[:SHOWN])))
        row.images = row.model = None  # the next row's need the room
    for count in sorted({row["images"] for row in rows}):
        scores, shown = reference.again(count)
        rows.append({"model": AGAIN, "images": count, "network_evaluations": None, "images_per_second": None, **scores})
    pictures.append((AGAIN, to_uint8(shown)))
    width = reference.features.shape[1]
    report = {
        "reference": reference.text,
        "features": f"{width} features of the classifier {config.classifier}, trained on {classifier.info.data}",
        "seed": config.seed,
        "rows": rows,
        "warnings": [text for row in rows if (text := worth(row, rows, width, len(reference.features)))],
        "versions": versions(),
    }
    if processes.rank() == 0:
        write_atomic(config.out / "report.json", json.dumps(report, indent=2) + "\n")
        write_atomic(config.out / "report.md", table(report) + "\n")
        save_comparison(pictures, config.out / "picture.png", columns=20)
    return report


def worth(row: dict[str, Any], rows: list[dict[str, Any]], width: int, reference: int) -> str:
    """A warning that a Fréchet distance is of too few images, or against too few; '' if it is not."""
    count = min(row["images"], reference)
    if row["model"] == AGAIN or count >= ENOUGH * width:
        return ""
    floor = next(r["frechet"] for r in rows if r["model"] == AGAIN and r["images"] == row["images"])
    why = "their covariance is singular" if count <= width else f"fewer than {ENOUGH} a feature"
    return (
        f"{row['model']}: {count} {'real ' * (count < row['images'])}images for {width} features, {why}: real images in that number "
        f"get a Fréchet distance of {floor:.3g}, the model's is {row['frechet']:.3g}; take more (--num, with another --out)"
    )


def old_rates(path: Path) -> dict[str, float | None]:
    """Images per second of models whose samples are kept in this folder from an earlier call."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def samples_of(out: Path, k: int, spec: str) -> Path:
    """The folder of the k-th model's samples."""
    return out / "samples" / bounded(f"{k}-{re.sub(r'[^A-Za-z0-9_.@-]+', '_', spec)}")


def title(row: dict[str, Any]) -> str:
    """The title of a model's pictures in picture.png."""
    numbers = [f"Frechet {row['frechet']:.3f}"]
    if row["accuracy"] is not None:
        numbers.append(f"accuracy {row['accuracy']:.3f}")
    if row["network_evaluations"]:
        numbers.append(f"{row['network_evaluations']} network evaluations")
    return f"{row['model']}: {', '.join(numbers)}"


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, followed by the reference and any warnings."""

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in report["rows"]:
        cells = [row["model"], cell(row["images"], 0), cell(row["network_evaluations"], 0), cell(row["images_per_second"], 1)]
        cells += [cell(row["accuracy"], 3), cell(row["frechet"], 4), cell(row["precision"], 3), cell(row["recall"], 3)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Reference: {report['reference']}. {report['features']}. Noise of seed {report['seed']}, classes in turn."]
    return "\n".join(lines + [f"Warning: {warning}." for warning in report["warnings"]])

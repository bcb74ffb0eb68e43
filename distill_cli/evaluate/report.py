"""Models against real images in a classifier's features: one table, as text, JSON and a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_cli import launch
from distill_cli.config import EvaluateConfig, SampleConfig
from distill_cli.data import Images, open_images
from distill_cli.data.pictures import from_uint8, save_comparison, to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.evaluate.distances import frechet, precision_recall
from distill_cli.files import write_atomic
from distill_cli.models import load
from distill_cli.models.classifier import Classifier
from distill_cli.models.classifier import load as load_classifier
from distill_cli.runs import versions
from distill_cli.sample import batch

AGAIN = "real images, drawn again"
REFERENCE_SEED, AGAIN_SEED = 0, 1
SHOWN = 40
ENOUGH = 10
"""Images a feature, under which a Fréchet distance gets a warning."""
COLUMNS = ("model", "evaluations", "images/s", "accuracy", "frechet", "precision", "recall")


class Reference:
    """The real images, each once: their features, and what a fresh draw of them would score."""

    def __init__(self, config: EvaluateConfig, images: Images, classifier: Classifier) -> None:
        info = classifier.info
        if tuple(images.shape) != info.shape or tuple(images.classes) != info.classes:
            raise UsageError(
                f"--classifier {config.classifier}: knows {len(info.classes)} classes of {info.shape} images, "
                f"--data {config.data} has {len(images.classes)} of {tuple(images.shape)}",
                "distill classifier --data trains one for your images",
            )
        self.config, self.images, self.classifier = config, images, classifier
        every = range(len(images))
        self.pixels, self.labels = images.batch(every, Draws(REFERENCE_SEED, every))
        self.features, _ = classifier.measure(self.pixels)
        self.text = f"all {len(images)} images of {config.data}, each once, what is random in them drawn with seed {REFERENCE_SEED}"

    def again(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` images drawn from the set with replacement, with their labels: a generator that knows it by heart."""
        draws = Draws(AGAIN_SEED, range(count))
        positions = (draws.uniform("order") * len(self.images)).long().tolist()
        return self.images.batch(positions, draws)

    def frechet(self, images: Tensor) -> float:
        """The Fréchet distance of images (N, C, H, W) to the real ones."""
        return frechet(self.classifier.measure(images)[0], self.features)

    def measure(self, images: Tensor, labels: Tensor | None) -> dict[str, float | None]:
        """Accuracy (where the labels asked for are known), Fréchet distance, precision and recall of images (N, C, H, W)."""
        features, predicted = self.classifier.measure(images)
        precision, recall = precision_recall(self.features, features, self.config.neighbours)
        return {
            "accuracy": None if labels is None else (predicted == labels).double().mean().item(),
            "frechet": frechet(features, self.features),
            "precision": precision,
            "recall": recall,
        }


def split(spec: str) -> tuple[str, int | None]:
    """`NAME@2` -> NAME, 2 steps; `NAME` -> NAME, the model's own."""
    name, at, steps = spec.rpartition("@")
    if not at:
        return spec, None
    if not steps.isdigit() or not int(steps):
        raise UsageError(f"--model {spec}: after @ comes a number of steps")
    return name, int(steps)


def read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) in [-1, 1] and labels of a file as `distill sample --format npz` writes it."""
    if not path.is_file():
        raise UsageError(f"--model {path}: no such file")
    images, labels = batch.read_npz(path, "write it again with `distill sample --format npz`")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UsageError(f"--model {path}: arr_0 is {images.dtype} {images.shape}", "uint8 (N, H, W, 3) is expected")
    return from_uint8(images), None if labels is None else torch.from_numpy(labels).long()


def _images(spec: str, config: EvaluateConfig, classes: tuple[str, ...]) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """The images of one row, their labels where the classifier knows them, and what making them cost."""
    assert config.out is not None
    if spec.endswith(".npz"):
        images, labels = read_npz(Path(spec))
        return images, labels, {"network_evaluations": None, "images_per_second": None}
    name, steps = split(spec)
    model = load(name)
    folder = config.out / "samples" / re.sub(r"[^\w.@-]+", "_", spec).strip("_")
    options = config.model_dump(include={"num", "seed", "device", "batch_size", "precision"})
    made = batch.sample(SampleConfig(model=name, steps=steps, format="npz", **options), model, folder)
    images, labels = read_npz(folder / "samples.npz")
    return images, labels if model.conditioner.classes == classes else None, made


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Sample what `config.model` lists, measure it, and write report.json, report.md and picture.png; returns the report."""
    assert config.out is not None
    classifier = load_classifier(config.classifier).to(launch.device(config.device))
    reference = Reference(config, open_images(config.data, config.resolution), classifier)
    width = reference.features.shape[1]
    rates = _old_rates(config.out / "report.json")
    rows: list[dict[str, Any]] = []
    pictures = []
    counts = set()
    for spec in config.model:
        images, labels, cost = _images(spec, config, classifier.info.classes)
        if images.shape[1:] != reference.pixels.shape[1:]:
            raise UsageError(f"--model {spec}: images of {tuple(images.shape[1:])}, the reference has {tuple(reference.pixels.shape[1:])}")
        if len(images) <= config.neighbours + 1:
            raise UsageError(f"--model {spec}: {len(images)} images are too few to measure anything", f"more than {config.neighbours + 1}")
        rate = cost["images_per_second"] or rates.get(spec)
        rows.append({"model": spec, "images": len(images), "network_evaluations": cost["network_evaluations"], "images_per_second": rate})
        rows[-1] |= reference.measure(images, labels)
        pictures.append((title(rows[-1]), to_uint8(images[:SHOWN])))
        counts.add(len(images))
    for count in sorted(counts):
        images, labels = reference.again(count)
        rows.append({"model": AGAIN, "images": count, "network_evaluations": None, "images_per_second": None})
        rows[-1] |= reference.measure(images, labels)
    pictures.append((AGAIN, to_uint8(images[:SHOWN])))
    report = {
        "reference": reference.text,
        "features": f"{width} features of the classifier {config.classifier}, trained on {classifier.info.data}",
        "seed": config.seed,
        "rows": rows,
        "warnings": [worth(row, rows, width) for row in rows if row["model"] != AGAIN and worth(row, rows, width)],
        "versions": versions(),
    }
    write_atomic(config.out / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomic(config.out / "report.md", table(report) + "\n")
    save_comparison(pictures, config.out / "picture.png", columns=20)
    return report


def worth(row: dict[str, Any], rows: list[dict[str, Any]], width: int) -> str:
    """What the Fréchet distance of too few images is worth, or ''."""
    if row["images"] >= ENOUGH * width:
        return ""
    floor = next(r["frechet"] for r in rows if r["model"] == AGAIN and r["images"] == row["images"])
    why = "their covariance is singular" if row["images"] <= width else f"fewer than {ENOUGH} a feature"
    return (
        f"{row['model']}: {row['images']} images for {width} features, {why}: real images in that number get a "
        f"Fréchet distance of {floor:.3g}, so that of the model, {row['frechet']:.3g}, says little; raise --num"
    )


def _old_rates(path: Path) -> dict[str, float]:
    """Images a second of an earlier evaluation in this folder, whose samples are kept and not made again."""
    try:
        return {row["model"]: row["images_per_second"] for row in json.loads(path.read_text())["rows"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def title(row: dict[str, Any]) -> str:
    numbers = [f"Frechet {row['frechet']:.3f}"]
    if row["accuracy"] is not None:
        numbers.append(f"accuracy {row['accuracy']:.3f}")
    if row["network_evaluations"]:
        numbers.append(f"{row['network_evaluations']} network evaluations")
    return f"{row['model']}: {', '.join(numbers)}"


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, with what the reference is below it."""

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in report["rows"]:
        cells = [row["model"], cell(row["network_evaluations"], 0), cell(row["images_per_second"], 1), cell(row["accuracy"], 3)]
        cells += [cell(row["frechet"], 4), cell(row["precision"], 3), cell(row["recall"], 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Reference: {report['reference']}. {report['features']}."])

"""Pictures measured in a classifier's features: accuracy, Fréchet distance, precision, recall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distill_cli import launch
from distill_cli.config import EvaluateConfig
from distill_cli.data import Images
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.evaluate.distances import frechet, precision_recall, radii
from distill_cli.evaluate.report import AGAIN, AGAIN_SEED, PART, REFERENCE_SEED, SHOWN, Measure, shared
from distill_cli.models.classifier import Classifier
from distill_cli.models.classifier import load as load_classifier

ENOUGH = 10
"""Images for each feature below which a Fréchet distance gets a warning."""


class Features(Measure):
    """The real images, each taken once: their features, and scores of images against them."""

    columns = {
        "accuracy": ("accuracy", ".3f"), "frechet": ("frechet", ".4f"), "precision": ("precision", ".3f"), "recall": ("recall", ".3f"),
    }  # fmt: skip

    def __init__(self, config: EvaluateConfig, images: Images, classifier: Classifier | None = None) -> None:
        classifier = classifier or load_classifier(config.classifier).to(launch.device(config.device))
        info = classifier.info
        if tuple(images.shape) != info.shape or tuple(images.classes) != info.classes:
            theirs = f"{len(images.classes)} of {tuple(images.shape)}"
            if len(images.classes) == len(info.classes) and tuple(images.shape) == info.shape:
                theirs = f"others: {', '.join(images.classes[:3])}, ..."
            known = f"--classifier {config.classifier}: knows {len(info.classes)} classes of {info.shape} images"
            raise UsageError(f"{known}, --data {config.data} has {theirs}", "distill classifier --data trains one for your images")
        super().__init__(config, images)
        self.config, self.classifier, self.classes, self.least = config, classifier, info.classes, config.neighbours + 2
        self.knows = f"--classifier {config.classifier} knows"
        every = range(len(images))
        self.features, _, labels, _ = self._measured(every, Draws(REFERENCE_SEED, every))
        wanted = range(len(images.classes)) if config.classes is None else config.classes
        of_them = torch.isin(labels, torch.tensor(list(wanted)))
        self.positions, self.features = of_them.nonzero().flatten().tolist(), self.features[of_them]
        if len(self.positions) < self.least:
            raise UsageError(f"--data {config.data}: {len(self.positions)} images are too few to measure against", "take more of them")
        which = "all" if config.classes is None else f"of classes {', '.join(map(str, config.classes))} the"
        drawn = f"each once, what is random in them drawn with seed {REFERENCE_SEED}"
        self.text = f"{which} {len(self.positions)} images of {config.data}, {drawn}"
        self.about = f"{self.features.shape[1]} features of the classifier {config.classifier}, trained on {info.data}"

    def _measured(self, positions: Sequence[int], draws: Draws) -> list[Tensor]:
        """Features, predicted labels and true labels of images of the set, and the first few images."""

        def images(part: range) -> tuple[Tensor, Tensor]:
            return self.images.batch([positions[i] for i in part], Draws(draws.seed, [draws.indices[i] for i in part]))

        return measured(self.classifier, len(positions), images)

    def again(self, count: int) -> tuple[dict[str, float | None], Tensor]:
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
        known = torch.zeros(len(images)) if labels is None else labels
        features, predicted, *_ = measured(self.classifier, len(images), lambda p: (images[p.start : p.stop], known[p.start : p.stop]))
        return self._scores(features, predicted, labels)

    def _scores(self, features: Tensor, predicted: Tensor, labels: Tensor | None) -> dict[str, float | None]:
        precision, recall = precision_recall(self.features, features, self.config.neighbours, self.reach)
        return {
            "accuracy": None if labels is None else (predicted == labels).double().mean().item(),
            "frechet": frechet(features, self.features),
            "precision": precision,
            "recall": recall,
        }

    def title(self, row: dict[str, Any]) -> str:
        """The title of a model's pictures in picture.png."""
        numbers = [f"Frechet {row['frechet']:.3f}"]
        if row["accuracy"] is not None:
            numbers.append(f"accuracy {row['accuracy']:.3f}")
        if row["network_evaluations"]:
            numbers.append(f"{row['network_evaluations']} network evaluations")
        return f"{row['model']}: {', '.join(numbers)}"

    def warning(self, row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
        """A warning that a Fréchet distance is of too few images, or against too few; '' if it is not."""
        width, count = self.features.shape[1], min(row["images"], len(self.features))
        if row["model"] == AGAIN or count >= ENOUGH * width:
            return ""
        floor = next(r["frechet"] for r in rows if r["model"] == AGAIN and r["images"] == row["images"])
        why = "their covariance is singular" if count <= width else f"fewer than {ENOUGH} a feature"
        return (
            f"{row['model']}: {count} {'real ' * (count < row['images'])}images for {width} features, {why}: real images in that number "
            f"get a Fréchet distance of {floor:.3g}, the model's is {row['frechet']:.3g}; take more (--num, with another --out)"
        )


def measured(classifier: Classifier, count: int, images: Callable[[range], tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Features, predicted labels and true labels of `count` images, and the first few images.

    `images` returns the images of a range and their labels.
    """

    def of(part: range) -> tuple[Tensor, ...]:
        pixels, labels = images(part)
        return *classifier.measure(pixels), labels, pixels[: 0 if part.start else SHOWN]

    return shared(count, PART, of, next(classifier.parameters()).device)

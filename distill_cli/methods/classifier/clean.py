"""Trains the small classifier in whose features `distill evaluate` measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.data import Images
from distill_cli.data.images import split
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.methods.classifier.config import ClassifierConfig
from distill_cli.models.classifier import Classifier, ClassifierInfo
from distill_cli.training.examples import read_ahead
from distill_cli.training.objective import Call, Calls, Full, Loss, Objective

MEASURED = 500
"""Images in memory at once while the accuracy is measured."""


class Classification(Objective):
    """Cross-entropy on all images that are not held out. They are shifted by up to a pixel, and sets with random colours redraw them."""

    config: ClassifierConfig
    images: Images
    order: Order

    def __init__(self, config: ClassifierConfig, images: Images) -> None:
        if not config.noisy:
            images.kind.needs_pictures("classifier", f"--data {config.data} is measured without one")
        if len(images.classes) < 2:
            raise UsageError(f"--data {config.data}: {len(images.classes)} classes", "a classifier needs two or more: subfolders name them")
        super().__init__(config, "classifier")
        self.images = images
        self.seen, self.held_out = split(images, config.holdout, config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.trained["classifier"] = Full(self.begin(), config.lr)
        self.order = Order(config.seed, len(self.seen))

    def begin(self) -> nn.Module:
        """The network before training."""
        config, images = self.config, self.images
        return Classifier(ClassifierInfo(images.shape, tuple(images.classes), config.width, config.data))

    def positions(self, draws: Draws) -> list[int]:
        """Of the pictures of the samples of `draws`."""
        return [self.seen[self.order[i]] for i in draws.indices]

    def ahead(self, step: int, draws: Draws) -> None:
        read_ahead(self.images, self.positions(draws))

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        x, labels = self.images.batch(self.positions(draws), draws)
        moves = torch.stack([draws.uniform("augment", turn) for turn in (1, 2)], 1).mul(3).floor().long() - 1
        padded = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
        height, width = x.shape[2:]
        x = torch.stack([p[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for p, (dy, dx) in zip(padded, moves.tolist())])
        labels = sent(labels, self.device)
        yield self.loss(self.network("classifier")(sent(x, self.device)).float(), labels)

    def loss(self, logits: Tensor, labels: Tensor) -> Loss:
        """The cross-entropy, and the share of right answers."""
        right = (logits.argmax(1) == labels).float().mean()
        return Loss("classifier", nn.functional.cross_entropy(logits, labels), {"accuracy": right})

    def right(self, network: nn.Module, part: list[int]) -> int:
        """How many of the images at these positions the network reads rightly."""
        assert isinstance(network, Classifier)
        images, labels = self.images.batch(part, Draws(self.config.seed, part))
        return int((network.measure(images)[1] == labels).sum())

    def model(self, network: nn.Module, step: int) -> Classifier:
        """The classifier, with its accuracy on the images held out."""
        assert isinstance(network, Classifier)
        if not self.held_out:
            return network
        parts = [self.held_out[first : first + MEASURED] for first in range(0, len(self.held_out), MEASURED)]
        right = sum(self.right(network, part) for part in parts)
        return network.with_accuracy(right / len(self.held_out))

    def remarks(self, made: Classifier) -> tuple[dict[str, Any], str]:
        """The accuracy, and the number of images that gave it."""
        count, accuracy = len(self.held_out), made.info.accuracy
        said = f"accuracy on {count} images held out: {accuracy:.4f}" if accuracy is not None else ""
        return {"accuracy": accuracy, "held_out": count}, said

    def trial(self, network: nn.Module, made: Any, count: int, where: torch.device) -> Any:
        return network(torch.empty(count, *self.images.shape, device=where))

    def calls(self, step: int = 0) -> Calls:
        return Calls([Call("classifier", self.config.batch_size)])

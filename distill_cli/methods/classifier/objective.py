"""Trains the small classifier in whose features `distill evaluate` measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distill_cli.data import Images
from distill_cli.data.images import split
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.errors import UsageError
from distill_cli.methods.classifier.config import ClassifierConfig
from distill_cli.models.classifier import Classifier, ClassifierInfo
from distill_cli.training.objective import Loss

MEASURED = 500
"""Images that are in memory at once when the accuracy is measured."""


class Classification:
    """Cross-entropy on all images but those held out, moved by up to a pixel, and whose colours the set draws anew each time."""

    result = "classifier"

    def __init__(self, config: ClassifierConfig, images: Images) -> None:
        if len(images.classes) < 2:
            raise UsageError(f"--data {config.data}: {len(images.classes)} classes", "a classifier needs two or more: subfolders name them")
        self.config, self.images = config, images
        self.seen, self.held_out = split(images, config.holdout, config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = Classifier(ClassifierInfo(images.shape, tuple(images.classes), config.width, config.data))
        self.networks: dict[str, nn.Module] = {"classifier": network}
        self.rates = {"classifier": config.lr}
        self.frozen: list[nn.Module] = []
        self.kept: dict[str, nn.Module] = {}
        self.identity: dict[str, Any] = {}
        self.order = Order(config.seed, len(self.seen))

    def turns(self, draws: Draws) -> Iterator[Loss]:
        network = self.networks["classifier"]
        device = next(network.parameters()).device
        x, labels = self.images.batch([self.seen[self.order[i]] for i in draws.indices], draws)
        moves = torch.stack([draws.uniform("augment", turn) for turn in (1, 2)], 1).mul(3).floor().long() - 1
        padded = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
        height, width = x.shape[2:]
        x = torch.stack([p[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for p, (dy, dx) in zip(padded, moves.tolist())])
        labels = labels.to(device)
        logits = network(x.to(device))
        right = (logits.argmax(1) == labels).float().mean()
        yield Loss("classifier", nn.functional.cross_entropy(logits, labels), {"accuracy": right})

    def model(self, network: nn.Module) -> Classifier:
        """The classifier, with its accuracy on the images held out."""
        assert isinstance(network, Classifier)
        if not self.held_out:
            return network
        right = 0
        for first in range(0, len(self.held_out), MEASURED):
            part = self.held_out[first : first + MEASURED]
            images, labels = self.images.batch(part, Draws(self.config.seed, part))
            right += int((network.measure(images)[1] == labels).sum())
        return network.with_accuracy(right / len(self.held_out))

    def advice(self, metrics: dict[str, float], done: float) -> str:
        return ""

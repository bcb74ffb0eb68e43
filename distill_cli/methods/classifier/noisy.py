"""Trains a classifier of noised data for classifier guidance (Dhariwal & Nichol 2105.05233, section 4), on a model's own schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.data import Images
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import add_noise
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.launch import preparing
from distill_cli.methods.classifier.clean import Classification
from distill_cli.methods.classifier.config import ClassifierConfig
from distill_cli.models.model import Model
from distill_cli.models.noisy_classifier import NoisyClassifier, NoisyInfo, described
from distill_cli.runs import Run
from distill_cli.training.examples import check_images
from distill_cli.training.objective import Loss
from distill_cli.training.source import Latents


class NoisyClassification(Classification):
    """Cross-entropy on x_t of the model's data, at times drawn evenly over its range as solvers walk it."""

    def __init__(self, config: ClassifierConfig, images: Images, model: Model) -> None:
        self.of, self.schedule = model, model.denoiser.schedule
        check_images(config.data, model, images)
        super().__init__(config, images)
        self.identity |= {"schedule": described(self.schedule), "model": model.weights_hash()}
        self.latents: Latents | None = None
        self.frozen |= model.codec.parts()

    def begin(self) -> nn.Module:
        own, images = self.of.conditioner.classes, self.images
        if own and tuple(images.classes) != own:
            raise UsageError(
                f"--data {self.config.data}: classes {', '.join(images.classes[:3])}, ..., those of {self.of.lineage.name} differ"
            )
        classes, width, name = tuple(images.classes), self.config.width, self.of.lineage.name
        return NoisyClassifier(NoisyInfo(self.of.shape, classes, width, self.config.data, model=name, schedule=described(self.schedule)))

    def prepare(self, where: torch.device, run: Run) -> None:
        """Encode the pictures of a latent model, once."""
        if self.of.codec.parts():
            with preparing(where, f"resume with --resume {run.folder}") as stop:
                self.latents = Latents(self.images, self.of.codec, where, 1, self.config.seed, stop)

    def noised(self, positions: list[int], draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """x_t (B, C, H, W), t (B,) and labels (B,) of data at `positions`, on the device."""
        x, labels = self.images.batch(positions, draws)
        if self.latents is not None:
            x = self.latents.batch(positions, draws.normal("augment", self.of.shape))
        x, t = (sent(each, self.device) for each in (x, self.schedule.at(draws.uniform("time")).float()))
        return add_noise(self.schedule, x, sent(draws.normal("noise", self.of.shape), x.device), t), t, sent(labels, self.device)

    def logits(self, network: Any, x: Tensor, t: Tensor) -> Tensor:
        logits: Tensor = network(x, self.schedule.alpha(t), self.schedule.sigma(t))
        return logits.float()

    def ahead(self, step: int, draws: Draws) -> None:
        if self.latents is None:
            super().ahead(step, draws)

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        x, t, labels = self.noised(self.positions(draws), draws)
        yield self.loss(self.logits(self.network("classifier"), x, t), labels)

    @torch.no_grad()
    def right(self, network: nn.Module, part: list[int]) -> int:
        x, t, labels = self.noised(part, Draws(self.config.seed, part))
        return int((self.logits(network, x, t).argmax(1) == labels).sum())

    def trial(self, network: nn.Module, made: Any, count: int, where: torch.device) -> Any:
        ones = torch.ones(count, device=where)
        return network(torch.empty(count, *self.of.shape, device=where), ones, ones)

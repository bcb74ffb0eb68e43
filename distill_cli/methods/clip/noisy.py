"""Trains a CLIP model of noised data, on a model's own schedule (Nichol et al. 2112.10741, section 2.3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distill_cli.data import Images
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.schedule import add_noise
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.launch import preparing
from distill_cli.methods.clip.clean import Contrast
from distill_cli.methods.clip.config import CLIPConfig
from distill_cli.models.clip import NOISED, Towers, towers_of
from distill_cli.models.model import Model
from distill_cli.models.noisy_classifier import described
from distill_cli.models.noisy_clip import NoisyClip, leveled
from distill_cli.runs import Run
from distill_cli.training.examples import check_images, read_ahead
from distill_cli.training.objective import Loss
from distill_cli.training.source import Latents


class NoisyContrast(Contrast):
    """The same loss on x_t of the model's data, at times drawn evenly over its range as solvers walk it."""

    def __init__(self, config: CLIPConfig, images: Images, model: Model) -> None:
        self.of, self.schedule = model, model.denoiser.schedule
        check_images(config.data, model, images)
        super().__init__(config, images)
        self.count, self.latents = len(images), None
        self.order = Order(config.seed, config.versions * self.count)
        self.which = self.which.repeat(config.versions)
        self.identity |= {"schedule": described(self.schedule), "model": model.weights_hash()}
        self.frozen |= model.codec.parts()

    latents: Latents | None

    def begin(self, tokenizer: Any) -> NoisyClip:
        channels, height, width = self.of.shape
        if height != width:
            raise UsageError(f"--model {self.config.model}: data of {height}x{width}, a CLIP model sees squares")
        self.check_patch("data", width)
        info = {"model": self.of.lineage.name, "shape": [channels, height, width], "schedule": described(self.schedule)}
        config = self.config
        towers = towers_of(width, channels + 1, config.network, config.text, tokenizer, config.seed, **{NOISED: info})
        return NoisyClip(towers, tokenizer, captions=list(self.numbers))

    def prepare(self, where: torch.device, run: Run) -> None:
        """Encode the pictures of a latent model, once."""
        if self.of.codec.parts():
            with preparing(where, f"resume with --resume {run.folder}") as stop:
                self.latents = Latents(self.images, self.of.codec, where, self.config.versions, self.config.seed, stop)

    def ahead(self, step: int, draws: Draws) -> None:
        if self.latents is None:
            read_ahead(self.images, [position % self.count for position in self.positions(draws)])

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        positions = self.positions(draws)
        if self.latents is None:
            x, _ = self.images.batch([position % self.count for position in positions], draws)
        else:
            x = self.latents.batch(positions, draws.normal("augment", self.of.shape))
        x, t = (sent(each, self.device) for each in (x, self.schedule.at(draws.uniform("time")).float()))
        x = add_noise(self.schedule, x, sent(draws.normal("noise", self.of.shape), x.device), t)
        seen = leveled(x, self.schedule.alpha(t), self.schedule.sigma(t))
        yield self.contrast(self.network("clip"), seen, positions, self.candidates(step))

    def model(self, network: nn.Module, step: int) -> NoisyClip:
        assert isinstance(network, Towers)
        return NoisyClip(network, self.clip.tokenizer, captions=list(self.numbers))

    def trial(self, network: nn.Module, made: Any, count: int, where: torch.device) -> Any:
        channels, height, width = self.of.shape
        tokens = torch.zeros(count, self.tokens.shape[1], dtype=torch.long, device=where)
        return network(torch.empty(count, channels + 1, height, width, device=where), tokens)

"""Trains the autoencoder of a latent model: squared error, and the KL divergence of its latents from a standard normal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distill_cli.data import Images
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.methods.vae.config import VAEConfig
from distill_cli.models.autoencoder import Autoencoder, create
from distill_cli.models.codec import VAECodec
from distill_cli.training.examples import read_ahead
from distill_cli.training.job import Job
from distill_cli.training.objective import Call, Calls, Full, Loss, Objective

MEASURED = 512
"""Number of pictures from whose latents the scale is measured."""


def open(config: VAEConfig, job: Job) -> Objective:
    return Autoencoding(config, job.images(config))


class Autoencoding(Objective):
    """A variational autoencoder (Kingma & Welling 1312.6114) with a light prior, as latent diffusion has it (2112.10752)."""

    config: VAEConfig
    images: Images
    order: Order

    def __init__(self, config: VAEConfig, images: Images) -> None:
        images.kind.needs_pictures("vae", f"--data {config.data} needs no latents")
        parts = 2 ** (len(config.network.channels) - 1)
        if images.shape[-1] % parts:
            channels = f"{len(config.network.channels)} network.channels"
            raise UsageError(f"resolution {images.shape[-1]}: {channels} need a multiple of {parts} pixels")
        super().__init__(config, "vae")
        self.images = images
        self.latent = (config.network.latent_channels, images.shape[1] // parts, images.shape[2] // parts)
        self.trained["vae"] = Full(create(images.shape[-1], images.shape[0], config.network, config.seed), config.lr)
        self.order = Order(config.seed, len(images))

    def positions(self, draws: Draws) -> list[int]:
        """Of the pictures of the samples of `draws`."""
        return [self.order[i] for i in draws.indices]

    def ahead(self, step: int, draws: Draws) -> None:
        read_ahead(self.images, self.positions(draws))

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        x, _ = self.images.batch(self.positions(draws), draws)
        x = sent(x, self.device)
        made, mean, logvar = self.network("vae")(x, sent(draws.normal("noise", self.latent), self.device))
        error = (made.float() - x).square().mean()
        divergence = 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).mean()
        yield Loss("vae", error + self.config.kl_weight * divergence, {"error": error, "divergence": divergence})

    @torch.no_grad()
    def model(self, network: nn.Module, step: int) -> Autoencoder:
        """The autoencoder, with the scale that gives its latents a standard deviation of 1 (2112.10752, appendix G)."""
        assert isinstance(network, Autoencoder)
        network.vae.register_to_config(scaling_factor=1.0)
        latents = []
        for first in range(0, MEASURED, 32):
            part = [k % len(self.images) for k in range(first, first + 32)]
            latents.append(VAECodec(network.vae).encode(self.images.batch(part, Draws(self.config.seed, part))[0]))
        means, spreads = map(torch.cat, zip(*latents, strict=True))
        variance = means.var() + spreads.square().mean()
        network.vae.register_to_config(scaling_factor=round(float(variance.rsqrt()), 5))
        return network

    def trial(self, network: nn.Module, made: Any, count: int, where: torch.device) -> Any:
        return network(torch.empty(count, *self.images.shape, device=where), torch.empty(count, *self.latent, device=where))

    def calls(self, step: int = 0) -> Calls:
        return Calls([Call("vae", self.config.batch_size)])

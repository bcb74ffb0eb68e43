"""Autoencoders: pictures to latents and back, as diffusers' AutoencoderKL (Kingma & Welling 1312.6114; Rombach et al. 2112.10752)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.config import VAENetworkConfig
from distill_cli.files import folder_atomic
from distill_cli.models.parts import save_network


class Autoencoder(nn.Module):
    """An AutoencoderKL in training: `autoencoder(images, noise)` -> reconstruction, means, log variances."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.vae.encode(images).latent_dist
        return self.vae.decode(found.mean + found.std * noise).sample, found.mean, found.logvar

    def save(self, folder: Path) -> None:
        """Write diffusers' folder of an AutoencoderKL, complete or absent."""
        with folder_atomic(Path(folder)) as temporary:
            save_network(self.vae, temporary, ("AutoencoderKL",), torch.float32)


def create(pixels: int, image_channels: int, network: VAENetworkConfig, seed: int) -> Autoencoder:
    """An autoencoder with random weights of `seed`."""
    import diffusers

    levels = len(network.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            sample_size=pixels,
            latent_channels=network.latent_channels,
            block_out_channels=tuple(network.channels),
            layers_per_block=network.layers,
            norm_num_groups=network.groups,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            scaling_factor=1.0,
        )
    return Autoencoder(vae)

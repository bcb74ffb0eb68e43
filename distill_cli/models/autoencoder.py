"""Autoencoders: pictures to latents and back, as diffusers' AutoencoderKL (Kingma & Welling 1312.6114; Rombach et al. 2112.10752)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.config import VAENetworkConfig
from distill_cli.errors import DistillError, UsageError
from distill_cli.files import folder_atomic
from distill_cli.models.parts import load_network, save_network
from distill_cli.models.sources.hub import find

AT_A_TIME = 2**20
"""Pixels that are decoded at a time: four pictures of 512 x 512."""


class VAECodec:
    """Between pictures in [-1, 1] and the latents that a denoiser works on: z = (encoded - shift) * scale.

    `vae` is an AutoencoderKL, or an AutoencoderTiny, which has neither scale nor noise.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        config = vae.config
        self.scale, self.shift = float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)

    @property
    def factor(self) -> int:
        """Pixels a latent, each way."""
        config = self.vae.config
        return 2 ** (len(config.get("block_out_channels") or config.encoder_block_out_channels) - 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations (B, c, h, w) of the latents."""
        found = self.vae.encode(images.to(next(self.vae.parameters()).device)).latent_dist
        return (found.mean.float() - self.shift) * self.scale, found.std.float() * self.scale

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], on the device of the autoencoder; differentiable."""
        return self.raw(x).clamp(-1, 1)

    def raw(self, x: Tensor) -> Tensor:
        """As decode, but not clamped."""
        x = x.to(next(self.vae.parameters()).device) / self.scale + self.shift
        count = max(1, AT_A_TIME // (x.shape[-1] * x.shape[-2] * self.factor**2))
        return torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in x.split(count)])

    def project(self, x: Tensor) -> Tensor:
        """Latents have no range."""
        return x


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


def load_decoder(spec: str, codec: VAECodec) -> Any:
    """An AutoencoderTiny for the latents of `codec`, which decodes in a fraction of the time, from a folder or by its hub id."""
    import diffusers

    folder = find(spec, ("config.json", "diffusion_pytorch_model.safetensors"), f"decoder {spec}")
    tiny = load_network(diffusers.AutoencoderTiny, folder)
    if (tiny.config.latent_channels, VAECodec(tiny).factor) != (codec.vae.config.latent_channels, codec.factor):
        raise UsageError(f"decoder {spec}: for other latents than the teacher's", "taesd is of Stable Diffusion 1 and 2")
    if tiny.config.out_channels != 3:
        raise DistillError(f"decoder {spec}: pictures of {tiny.config.out_channels} channels", "colour pictures are read")
    return tiny

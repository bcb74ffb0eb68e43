"""Codecs: pictures to the data that a denoiser works on (pixels or latents), and back."""

from __future__ import annotations

import math
from contextlib import nullcontext
from fractions import Fraction
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle

from distill_cli.data.kinds import PICTURES, Kind
from distill_cli.data.shapes import THINGS, render
from distill_cli.errors import DistillError, UsageError
from distill_cli.models.parts import load_network
from distill_cli.models.sources.hub import find
from distill_cli.processes import say
from distill_cli.tensors import store_matrices

AT_A_TIME = 2**20
"""Pixels that are decoded together: four pictures of 512 x 512."""
TINY = "taesd is for Stable Diffusion 1 and 2, taesdxl for XL, taesd3 for 3"
FAR = 20
"""Mean difference of two decoders' pictures, of 255, from which one of them may be for other latents."""


class Codec:
    """The interface of codecs, and the identity, which is the codec of pixel models. Pictures are (B, C, H, W) in [-1, 1]."""

    kind: Kind = PICTURES
    """What `decode` makes."""
    factor: int = 1
    """Width of a picture over the width of its latents."""
    lpips_below: float = math.inf
    """LPIPS enlarges pictures that are narrower than this."""
    tiles: int = 0
    """Width of a tile of what `decode` gets; 0: pictures are decoded whole."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations (B, c, h, w) of the latents of images."""
        return images, torch.zeros_like(images)

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], on the device of the networks; differentiable."""
        return self.raw(x).clamp(-1, 1)

    def raw(self, x: Tensor) -> Tensor:
        """As `decode`, without clamping."""
        return x

    def project(self, x: Tensor) -> Tensor:
        """The valid data nearest to `x`: pixels are clamped to [-1, 1], latents have no range."""
        return x.clamp(-1, 1)

    def check(self, shape: tuple[int, int, int], where: str) -> None:
        """Raise DistillError if the denoiser's data of `shape` (C, H, W) cannot be decoded."""
        if shape[0] not in (1, 3):
            raise DistillError(f"{where}: pictures of {shape[0]} channels", "grey (1) and colour (3) are read")

    def parts(self) -> dict[str, Any]:
        """Its networks, by their names in a pipeline."""
        return {}

    def decoders(self) -> list[Any]:
        """The networks of `decode`."""
        return []

    def fresh(self) -> Codec:
        """A codec of the same configuration with new networks; on the meta device it takes no memory."""
        return self

    def cast(self, dtype: torch.dtype | None) -> None:
        """Store the matrices of `decode` in half precision, once; pictures under autocast stay the same to the bit."""

    def tile(self, pixels: int) -> None:
        """Decode in overlapping tiles of `pixels` a side, by diffusers' enable_tiling. Raises UsageError where that is not possible."""
        raise UsageError(f"tiles {pixels}: for latents, and the model's data are pixels", "leave it out")

    def with_decoder(self, spec: str) -> Codec:
        """A codec for the same latents that decodes faster. Raises UsageError if there are no latents."""
        raise UsageError(f"decoder {spec}: for latents, and the model's data are pixels", "leave it out")

    def sketched_decoder(self) -> Codec:
        """As `with_decoder`, for plans: of TAESD's architecture, on the meta device."""
        return self.with_decoder("of a plan")

    def sized(self, pixels: int, shape: tuple[int, int, int], multiple: int, most: float = math.inf) -> tuple[int, int] | None:
        """(h, w) of latents for pictures whose shorter side is `pixels`, at the aspect ratio of `shape`; None if only one size is possible.

        h and w have to be multiples of `multiple`, and at most `most`, as the network needs it. Raises UsageError if they are not.
        """
        return None


class VAECodec(Codec):
    """Latents z = (encoded - shift) * scale of an AutoencoderKL, an AutoencoderDC, or an AutoencoderTiny; the last two have no noise.

    `upcast`: fp16 is too small for what the autoencoder computes with, so it decodes in float32 there; bf16 has the range.
    """

    lpips_below = 0  # decoded latents are compared as they are
    stored: torch.dtype | None
    """The number type of the decoder's matrices if they are stored in half precision: it then decodes in it."""

    def __init__(self, vae: Any, upcast: bool = False) -> None:
        self.vae, self.upcast, self.stored = vae, upcast, None
        config = vae.config
        self.scale, self.shift = float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)
        self.factor = 2 ** (len(config.get("block_out_channels") or config.encoder_block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.vae.config.latent_channels)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.vae.encode(images.to(next(self.vae.parameters()).device))
        if not hasattr(found, "latent_dist"):
            mean = (found[0].float() - self.shift) * self.scale
            return mean, torch.zeros_like(mean)
        found = found.latent_dist
        return (found.mean.float() - self.shift) * self.scale, found.std.float() * self.scale

    def raw(self, x: Tensor) -> Tensor:
        x = x.to(next(self.vae.parameters()).device) / self.scale + self.shift
        if self.tiles:  # AutoencoderTiny would cut a picture of one tile too
            self.vae.use_tiling = max(x.shape[-2:]) > self.tiles
        count = max(1, AT_A_TIME // (x.shape[-1] * x.shape[-2] * self.factor**2))
        kind = x.device.type
        cast = self.upcast and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        small = cast and torch.get_autocast_dtype(kind) == torch.float16
        own = self.stored is not None and not torch.is_autocast_enabled(kind)
        with torch.autocast(kind, self.stored, enabled=not small) if small or own else nullcontext():
            parts = (self.vae.decode(part, return_dict=False)[0] for part in x.split(count))
            # each is copied before the next is made: a CUDA graph writes every answer to the same place
            return torch.cat([part.to(torch.promote_types(part.dtype, torch.float32), copy=True) for part in parts])

    def project(self, x: Tensor) -> Tensor:
        """Latents have no range."""
        return x

    def parts(self) -> dict[str, Any]:
        return {"vae": self.vae}

    def decoders(self) -> list[Any]:
        return [self.vae.decoder]

    def fresh(self) -> VAECodec:
        return type(self)(type(self.vae).from_config(self.vae.config), self.upcast)

    def cast(self, dtype: torch.dtype | None) -> None:
        self.stored = None if self.upcast and dtype == torch.float16 else dtype
        for part in self.decoders():
            store_matrices(part, self.stored)

    def tile(self, pixels: int) -> None:
        factor = 2 ** (len(self.vae.config.get("block_out_channels") or self.vae.config.encoder_block_out_channels) - 1)
        if pixels % (8 * factor):
            raise UsageError(f"tiles {pixels}: the autoencoder takes multiples of {8 * factor} pixels")
        if hasattr(self.vae, "spatial_scale_factor"):  # which AutoencoderTiny computes from its channels
            self.vae.spatial_scale_factor = factor
        sizes = {"sample_min": pixels, "sample_stride": pixels * 3 // 4, "latent_min": pixels // factor}
        named = {f"tile_{name}_{side}": size for name, size in sizes.items() for side in ("size", "height", "width")}
        known = {name: size for name, size in named.items() if hasattr(self.vae, name)}
        if not known:
            raise UsageError(f"tiles {pixels}: this diffusers' {type(self.vae).__name__} decodes whole pictures alone", "leave it out")
        self.tiles = pixels // factor
        self.vae.enable_tiling()
        for name, size in known.items():
            setattr(self.vae, name, size)

    def with_decoder(self, spec: str) -> VAECodec:
        """A codec with the AutoencoderTiny in a folder, or of a hub id. Says how far a picture is from that of the model's own decoder."""
        import diffusers

        folder = find(spec, ("config.json", "diffusion_pytorch_model.safetensors"), f"decoder {spec}")
        tiny = VAECodec(load_network(diffusers.AutoencoderTiny, folder))
        if (tiny.channels, tiny.factor) != (self.channels, self.factor):
            raise UsageError(f"decoder {spec}: for other latents than the model's", f"madebyollin's {TINY}")
        if tiny.vae.config.out_channels != 3:
            raise DistillError(f"decoder {spec}: pictures of {tiny.vae.config.out_channels} channels", "colour pictures are read")
        if next(self.vae.parameters()).is_meta:  # of a plan
            return tiny
        off = self.apart(tiny)
        doubt = f": is it for this model's latents? ({TINY})" if off > FAR else ""
        say(f"decoder {spec}: a test picture is {off:.1f} of 255 from that of the model's own decoder, in the mean{doubt}")
        return tiny

    @torch.no_grad()
    def apart(self, other: Codec) -> float:
        """The mean difference, of 255, of a picture decoded by this codec and another one, from this one's latents."""
        picture = render(THINGS[0], torch.full((6,), 0.5))[None]
        z, _ = self.encode(interpolate(picture, scale_factor=max(1.0, self.factor / 2)))
        return float((self.decode(z) - other.decode(z)).abs().mean()) * 127.5

    def sketched_decoder(self) -> VAECodec:
        import diffusers

        with torch.device("meta"):
            tiny = VAECodec(diffusers.AutoencoderTiny(latent_channels=self.vae.config.latent_channels))
        if (tiny.channels, tiny.factor) != (self.channels, self.factor):
            raise UsageError(f"decoder: none is known for the latents of the {type(self.vae).__name__}", "leave it out")
        return tiny

    def sized(self, pixels: int, shape: tuple[int, int, int], multiple: int, most: float = math.inf) -> tuple[int, int]:
        whole, (_, height, width) = self.factor * multiple, shape
        sides = [Fraction(pixels * side, min(height, width) * whole) for side in (height, width)]
        if any(side.denominator > 1 for side in sides):
            ratio = "" if height == width else f", in the aspect ratio of {width * self.factor}x{height * self.factor}"
            raise UsageError(f"resolution {pixels}: the autoencoder and the network make multiples of {whole} pixels{ratio}")
        height, width = (int(side) * multiple for side in sides)
        if max(height, width) > most:
            raise UsageError(f"resolution {pixels}: the network makes pictures of at most {most * self.factor:g} pixels a side")
        return height, width


class PatchedCodec(VAECodec):
    """Latents of an AutoencoderKLFlux2 as its pipeline has them: 2x2 places in one, each channel with mean 0 and deviation 1.

    Their means and variances are the running ones of the autoencoder's batch norm.
    """

    def __init__(self, vae: Any, upcast: bool = False) -> None:
        self.vae, self.upcast, self.stored, self.scale, self.shift = vae, upcast, None, 1.0, 0.0
        self.factor = 2 ** len(vae.config.block_out_channels)

    @property
    def channels(self) -> int:
        return 4 * int(self.vae.config.latent_channels)

    def _norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (C, 1, 1) of the channels."""
        norm = self.vae.bn
        std = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        return norm.running_mean.float().to(x.device)[:, None, None], std.to(x.device)[:, None, None]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (pixel_unshuffle(part, 2) for part in super().encode(images))
        middle, scale = self._norm(mean)
        return (mean - middle) / scale, std / scale

    def raw(self, x: Tensor) -> Tensor:
        middle, scale = self._norm(x)
        return super().raw(pixel_shuffle(x * scale + middle, 2))

    def with_decoder(self, spec: str) -> VAECodec:
        raise UsageError(f"decoder {spec}: none is known for the latents of the {type(self.vae).__name__}", "leave it out")

    sketched_decoder = partialmethod(with_decoder, "of a plan")

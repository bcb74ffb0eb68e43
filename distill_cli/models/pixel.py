"""New pixel models, with diffusers' UNet2DModel."""

from __future__ import annotations

import torch

from distill_cli.config import NetworkConfig
from distill_cli.data import Images
from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.schedule import EDMSchedule, NoiseSchedule
from distill_cli.errors import UsageError
from distill_cli.models.backbones import Backbone, backbone_of
from distill_cli.models.codec import Codec
from distill_cli.models.conditioners import ClassConditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler


def check_resolution(resolution: int, network: NetworkConfig) -> None:
    """Raise UsageError if the network's levels cannot halve pictures of this width evenly."""
    parts = 2 ** (len(network.channels) - 1)
    if resolution % parts:
        raise UsageError(f"resolution {resolution}: {len(network.channels)} network.channels need a multiple of {parts}")


def new(images: Images, network: NetworkConfig, schedule: NoiseSchedule, parameterisation: str, lineage: Lineage, seed: int) -> Model:
    """An untrained model of pictures like those of a set. Raises UsageError if its network cannot halve them evenly."""
    check_resolution(images.shape[-1], network)
    return create(
        resolution=images.shape[1],
        image_channels=images.shape[0],
        classes=list(images.classes),
        schedule=schedule,
        parameterisation=parameterisation,
        lineage=lineage,
        seed=seed,
        **network.model_dump(),
    )


def create(
    *,
    resolution: int,
    image_channels: int = 3,
    channels: list[int],
    attention: list[bool],
    layers: int = 1,
    groups: int = 16,
    head: int = 32,
    dropout: float = 0.0,
    classes: list[str],
    schedule: NoiseSchedule,
    parameterisation: str,
    lineage: Lineage,
    seed: int = 0,
) -> Model:
    """A model with random weights from `seed`. With classes, the null label is the one after them."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            sample_size=resolution,
            in_channels=image_channels,
            out_channels=image_channels,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            down_block_types=tuple("AttnDownBlock2D" if on else "DownBlock2D" for on in attention),
            up_block_types=tuple("AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attention)),
            norm_num_groups=groups,
            attention_head_dim=head,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=len(classes) + 1 if classes else None,
            dropout=dropout,
        )
    return of_classes(backbone_of(unet), classes, schedule, parameterisation, lineage)


def of_classes(
    backbone: Backbone, classes: list[str], schedule: NoiseSchedule, parameterisation: str, lineage: Lineage, codec: Codec = Codec()
) -> Model:
    """A teacher around an untrained network that knows these classes, and the null label after them."""
    denoiser = NetworkDenoiser(backbone, schedule, parameterisation, Scales(), schedule.time_input)
    conditioner = ClassConditioner(tuple(classes), len(classes) or None)
    return Model(denoiser, conditioner, lineage, Sampler(solver=schedule.usual_solver, steps=schedule.usual_steps), codec)


def tiny() -> Model:
    """A model with random weights, made in memory: for smoke runs."""
    return create(
        resolution=16,
        channels=[8, 16],
        attention=[False, True],
        groups=4,
        head=8,
        classes=[str(i) for i in range(10)],
        schedule=EDMSchedule(),
        parameterisation="edm",
        lineage=Lineage(name="tiny", licence="Apache-2.0", data="none: random weights"),
    )

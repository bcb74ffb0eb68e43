"""The denoising objective: trains a teacher from images (Karras et al. 2206.00364; Ho et al. 2006.11239)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distill_cli.config import TrainConfig
from distill_cli.data import Images
from distill_cli.diffusion.condition import dropped
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.losses import denoising_loss
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.schedule import EDMSchedule, NoiseSchedule, TableSchedule
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.pixel import check_resolution, create
from distill_cli.training.objective import Loss


class Denoising:
    """E[x0 | x_t] by weighted least squares; labels are dropped now and then so that the null class is learned."""

    result = "teacher"

    def __init__(self, config: TrainConfig, images: Images) -> None:
        self.config, self.images = config, images
        check_resolution(images.shape[-1], config.network)
        edm = config.prediction == "edm"
        schedule: NoiseSchedule = EDMSchedule() if edm else TableSchedule.from_config({"beta_schedule": config.beta_schedule})
        self.schedule = schedule
        self.teacher = create(
            resolution=images.shape[1],
            image_channels=images.shape[0],
            classes=images.classes,
            schedule=schedule,
            parameterisation=config.prediction,
            lineage=Lineage(name=config.data, method="denoising", data=config.data),
            seed=config.seed,
            **config.network.model_dump(),
        )
        self.networks: dict[str, nn.Module] = {"teacher": self.teacher.denoiser.train()}
        self.rates = {"teacher": config.lr}
        self.frozen: list[nn.Module] = []
        self.kept: dict[str, nn.Module] = {}
        self.identity: dict[str, Any] = {}
        self.order = Order(config.seed, len(images))

    def times(self, draws: Draws) -> torch.Tensor:
        """(B,) training times: ln sigma normal for EDM, whole times uniform over the table."""
        if isinstance(self.schedule, EDMSchedule):
            return (self.config.p_mean + self.config.p_std * draws.normal("time")).exp()
        return (draws.uniform("time") * (self.schedule.t_max + 1)).floor().float()

    def turns(self, draws: Draws) -> Iterator[Loss]:
        x, labels = self.images.batch([self.order[i] for i in draws.indices], draws)
        network = self.networks["teacher"]
        device = next(network.parameters()).device
        noise, t = draws.normal("noise", x.shape[1:]).to(device), self.times(draws).to(device)
        conditioner, uniform = self.teacher.conditioner, draws.uniform("label_dropout")
        condition = dropped(conditioner(labels.to(device)), conditioner.null, uniform, self.config.label_dropout)
        error = "velocity" if self.config.prediction == "v" else "noise"
        yield Loss("teacher", denoising_loss(network, self.schedule, x.to(device), noise, t, condition, error=error).mean())

    def model(self, network: nn.Module) -> Model:
        assert isinstance(network, NetworkDenoiser)
        return Model(network, self.teacher.conditioner, self.teacher.lineage, self.teacher.sampler)

    def advice(self, metrics: dict[str, float], done: float) -> str:
        return ""

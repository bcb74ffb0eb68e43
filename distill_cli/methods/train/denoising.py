"""The denoising objective: trains a teacher from images (Karras et al. 2206.00364; Ho et al. 2006.11239)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor, nn

from distill_cli.data import Images
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.losses import denoising_loss
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from distill_cli.diffusion.transfer import sent
from distill_cli.methods.registry import load
from distill_cli.methods.train.config import TrainConfig
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.training.examples import Examples
from distill_cli.training.objective import Call, Calls, Full, Loss, Objective


def _table(config: TrainConfig) -> NoiseSchedule:
    return TableSchedule.from_config({"beta_schedule": config.beta_schedule})


def _flow(config: TrainConfig) -> NoiseSchedule:
    return FlowSchedule(config.shift)


SCHEDULES: dict[str, Callable[[TrainConfig], NoiseSchedule]] = {"edm": lambda _: EDMSchedule(), "eps": _table, "v": _table, "flow": _flow}
"""The schedule of each prediction, for pixels."""


class TeacherObjective(Objective):
    """E[x0 | x_t] by weighted least squares; a share of the conditions is dropped, so that the null condition is learned."""

    config: TrainConfig
    schedule: NoiseSchedule
    teacher: Model

    def batch(self, draws: Draws) -> tuple[Tensor, Condition]:
        """x0 (B, C, H, W) and its condition, on the device."""
        raise NotImplementedError

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        x, condition = self.batch(draws)
        noise = sent(draws.normal("noise", x.shape[1:]), x.device)
        t = sent(self.schedule.drawn(draws, self.config.p_mean, self.config.p_std), x.device)
        errors = denoising_loss(self.network("teacher"), self.schedule, x, noise, t, condition, error=self.teacher.denoiser.error)
        yield Loss("teacher", errors.mean())

    def calls(self, step: int = 0) -> Calls:
        return Calls([Call("teacher", self.config.batch_size)])


class Denoising(TeacherObjective):
    """Of images under their classes."""

    def __init__(self, config: TrainConfig, images: Images) -> None:
        super().__init__(config, "teacher")
        self.images = images
        self.schedule = SCHEDULES[config.prediction](config)
        lineage = Lineage(name=config.data, method="denoising", data=config.data)
        self.teacher: Model = load(images.kind.new)(images, config.network, self.schedule, config.prediction, lineage, config.seed)
        self.trained["teacher"] = Full(self.teacher.denoiser.train(), config.lr)
        self.order = Order(config.seed, len(images))
        self.examples = Examples(images, self.order, self.teacher.conditioner, config.label_dropout)

    def ahead(self, step: int, draws: Draws) -> None:
        self.examples.ahead(draws)

    def batch(self, draws: Draws) -> tuple[Tensor, Condition]:
        return self.examples.batch(draws, self.device)

    def model(self, network: nn.Module, step: int) -> Model:
        assert isinstance(network, NetworkDenoiser)
        return replace(self.teacher, denoiser=network)

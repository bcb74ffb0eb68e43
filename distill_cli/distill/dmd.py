"""Distribution matching distillation (Yin et al. 2311.18828): a one-step student from a teacher and its pairs.

One step: the student's images get the difference of two denoisers as their gradient, the teacher (which alone is
guided) and the fake score, plus a regression on pairs; then the fake score learns to denoise those same images, as
they were before the student's step. Dropout is off everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from distill_cli.config import DMDConfig
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.guidance import guided
from distill_cli.diffusion.losses import denoising_loss, denoising_weight, matching_gradient, matching_loss, regression_loss
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.schedule import add_noise
from distill_cli.distill.engine import Loss
from distill_cli.errors import UsageError
from distill_cli.models.model import Lineage, Model, Sampling
from distill_cli.models.perceptual import Perceptual
from distill_cli.pairs.store import PairStore

FAKE_BEHIND = 1.15
SPREAD_LOST = 0.7


class DMD:
    """The objective; its student and fake score start as copies of the teacher."""

    result = "student"

    def __init__(self, config: DMDConfig, teacher: Model, pairs: PairStore | None) -> None:
        self.config, self.teacher, self.pairs = config, teacher, pairs
        self.schedule, self.teacher_hash = teacher.denoiser.schedule, teacher.weights_hash()
        self.sampling = teacher.with_defaults(None, None, config.guidance_scale)
        self.real = guided(teacher.denoiser, self.sampling.guidance_scale, teacher.conditioner.null)
        self.rates = {"student": config.lr}
        if config.matching_weight and config.fake_score:
            self.rates["fake"] = config.fake_lr or config.lr
        self.networks: dict[str, nn.Module] = {name: teacher.copy().denoiser.eval().requires_grad_(True) for name in self.rates}
        self.frozen: list[nn.Module] = [teacher.denoiser.eval().requires_grad_(False)]
        self.kept: dict[str, nn.Module] = {}
        self.regression_weight = 0.0
        if pairs is not None:
            self.regression_weight = 0.25 if config.regression_weight is None else config.regression_weight
            check_pairs(pairs, teacher.shape, self.teacher_hash, config.classes)
            self.order = Order(config.seed, len(pairs))
        self.distance: Callable[[Tensor, Tensor], Tensor] = partial(regression_loss, config.regression_loss)
        if self.regression_weight and config.regression_loss == "lpips":
            perceptual = Perceptual(config.lpips_weights)
            self.frozen.append(perceptual)
            self.distance = perceptual
        self.labels = teacher.conditioner.labels(len(config.classes or teacher.conditioner.classes) or 1, config.classes)

    def times(self, uniform: Tensor, low: float, high: float) -> Tensor:
        """(B,) times between shares `low` and `high` of the range, both included: of a table's times, else of t_bins."""
        bins = self.schedule.bins or self.config.t_bins
        first, last = round(low * bins), min(bins - 1, round(high * bins))
        place = (first + uniform * (last - first + 1)).floor()
        return self.schedule.at(place / max(1, bins - 1)).float()

    def generate(self, noise: Tensor, labels: Tensor) -> Tensor:
        """The student's images (B, C, H, W) from standard-normal noise: sigma_max * noise for EDM, pure noise else."""
        t = torch.full((len(noise),), self.schedule.t_max, device=noise.device)
        return self.networks["student"](self.schedule.prior_std * noise, t, self.teacher.conditioner(labels))

    def turns(self, draws: Draws) -> Iterator[Loss]:
        device = next(self.networks["student"].parameters()).device
        shape = self.teacher.shape
        count = len(draws) if self.config.matching_weight else 0
        noise = draws.normal("noise", shape)[:count]
        labels = self.labels[(draws.uniform("label") * len(self.labels)).long()][:count]
        paired = None
        if self.pairs is not None and self.regression_weight:
            paired = self.pairs.batch([self.order[i] for i in draws.indices])
            noise, labels = torch.cat([noise, paired["noise"]]), torch.cat([labels, paired["label"]])
        images = self.generate(noise.to(device), labels.to(device))
        x, condition = images[:count], self.teacher.conditioner(labels[:count].to(device))

        loss = images.new_zeros(())
        metrics: dict[str, Tensor] = {}
        if self.config.matching_weight:
            t = self.times(draws.uniform("matching_time"), self.config.t_low, self.config.t_high).to(device)
            gradient, metrics = self._match(x, draws.normal("matching_noise", shape).to(device), t, condition)
            matching = matching_loss(x, gradient)
            loss, metrics["matching_loss"] = loss + self.config.matching_weight * matching, matching
        if paired is not None:
            reference = paired["x0"].to(device)
            regression = self.distance(images[count:], reference).mean()
            loss, metrics["regression_loss"] = loss + self.regression_weight * regression, regression
            drawn = labels[count:].to(device)
            metrics |= {"spread": spread(images[count:], drawn), "pairs_spread": spread(reference, drawn)}
        yield Loss("student", loss, metrics)

        if "fake" in self.networks:
            x = x.detach()
            for turn in range(self.config.fake_steps):
                t = self.times(draws.uniform("score_time", turn), 0.0, 1.0).to(device)
                eps = draws.normal("score_noise", shape, turn).to(device)
                sigma_data = self.teacher.denoiser.scales.sigma_data
                errors = denoising_loss(self.networks["fake"], self.schedule, x, eps, t, condition, sigma_data=sigma_data)
                yield Loss("fake", errors.mean())

    @torch.no_grad()
    def _match(self, x: Tensor, noise: Tensor, t: Tensor, condition: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient at the student's images x, and how well each denoiser knows them.

        Without a fake score x stands in for its estimate, which leaves the real score's part alone (in the mean over the noise).
        """
        x = x.detach().float()
        noisy = add_noise(self.schedule, x, noise, t)
        estimates = {"real": self.real(noisy, t, condition)}
        if "fake" in self.networks:
            estimates["fake"] = self.networks["fake"](noisy, t, condition)
        weight = denoising_weight(self.schedule, t, self.teacher.denoiser.scales.sigma_data)
        errors = {f"{name}_error": (weight * (d - x).square().flatten(1).mean(1)).mean() for name, d in estimates.items()}
        return matching_gradient(x, estimates["real"], estimates.get("fake", x)), errors

    def model(self, network: nn.Module) -> Model:
        assert isinstance(network, NetworkDenoiser)
        lineage = self.teacher.lineage
        return Model(
            network,
            self.teacher.conditioner,
            Lineage(
                name=f"{lineage.name}-dmd",
                kind="student",
                method="dmd",
                teacher=lineage.name,
                teacher_hash=self.teacher_hash,
                licence=lineage.licence,
                data=lineage.data,
            ),
            Sampling(solver="few-step", steps=1),
            [self.schedule.t_max],
        )

    def advice(self, metrics: dict[str, float], done: float) -> str:
        real, fake = metrics.get("real_error", 0.0), metrics.get("fake_error", 0.0)
        if fake > FAKE_BEHIND * real > 0:
            return (
                f"the fake score has fallen behind: its error on the student's images is {fake / real:.2f} times the teacher's. "
                "Lower lr, or raise fake_steps or fake_lr"
            )
        if done > 0.25 and metrics.get("spread", 1.0) < SPREAD_LOST * metrics.get("pairs_spread", 0.0):
            share = metrics["spread"] / metrics["pairs_spread"]
            return (
                f"the student's images are collapsing: their spread inside a class is {share:.2f} times the teacher's. "
                "Lower lr, or raise regression_weight"
            )
        return ""


def spread(images: Tensor, labels: Tensor) -> Tensor:
    """How much images (B, C, H, W) of one class (B,) differ: the standard deviation of each value inside a class, averaged."""
    x = images.detach().float().flatten(1)
    same = (labels[:, None] == labels[None]).to(x)
    means = same @ x / same.sum(1, keepdim=True)
    return (x - means).square().mean(0).sqrt().mean()


def check_pairs(pairs: PairStore, shape: tuple[int, int, int], teacher_hash: str, classes: list[int] | None = None) -> None:
    """Refuse pairs of another teacher, of another resolution, or of classes that are not asked for."""
    manifest = pairs.manifest
    if tuple(manifest.shape) != shape:
        raise UsageError(f"--pairs {pairs.folder}: images of shape {tuple(manifest.shape)}, the teacher's are {shape}")
    if manifest.teacher_hash != teacher_hash:
        raise UsageError(f"--pairs {pairs.folder}: made by another teacher ({manifest.teacher})", "make pairs with this --teacher")
    others = sorted(set(manifest.classes) - set(classes if classes is not None else manifest.classes))
    if others:
        raise UsageError(f"--pairs {pairs.folder}: has class {others[0]}, which is not in classes", "make pairs of the same --classes")

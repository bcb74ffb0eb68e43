"""A classifier of noised data, p(class | x_t), whose gradient leads a denoiser (Dhariwal & Nichol 2105.05233).

Its config.json also says of which model's data it is and on which schedule it was noised, so that another is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.diffusion.condition import GUIDE, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.guidance import gradient_of
from distill_cli.diffusion.schedule import NoiseSchedule, expand
from distill_cli.errors import UsageError, printable
from distill_cli.models import classifier
from distill_cli.models.classifier import SUFFIX, Classifier, ClassifierInfo
from distill_cli.models.model import Model
from distill_cli.processes import say
from distill_cli.tensors import hash_of

WAVES = 8
"""Sines and cosines each that tell the network the noise level."""
REACH = 2.0
"""The noise level sigma / alpha at which logits begin to be scaled down, as noise hides the class."""
APART = ("grid",)
"""Fields of a schedule that change nothing about how data are noised."""


def described(schedule: NoiseSchedule) -> dict[str, Any]:
    """A schedule by its kind and its numbers; a table by a hash of its entries to a millionth."""
    out: dict[str, Any] = {"kind": type(schedule).__name__.removesuffix("Schedule").lower()}
    for each in dataclasses.fields(schedule):  # type: ignore[arg-type]
        value = getattr(schedule, each.name)
        if isinstance(value, Tensor):
            whole = (value.double() * 1e6).round().long().cpu().numpy().tobytes()
            out[each.name] = hashlib.sha256(whole).hexdigest()
        elif each.init and isinstance(value, (int, float)) and each.name not in APART and not each.name.startswith("usual"):
            out[each.name] = value
    return out


@dataclass(frozen=True)
class NoisyInfo(ClassifierInfo):
    """What config.json says; `shape` is that of the denoiser's data: pixels, latents or points. `accuracy` is the mean over all noise."""

    model: str = ""
    """The name of the model whose data and schedule it has learned."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """The schedule, as `described` says it."""


class NoisyClassifier(Classifier):
    """The layers of a Classifier; each normalisation is followed by a scale and a shift that depend on the noise level."""

    info: NoisyInfo

    def __init__(self, info: NoisyInfo) -> None:
        super().__init__(info)
        self.time = nn.Sequential(nn.Linear(2 * WAVES, info.width), nn.SiLU())
        count = sum(isinstance(layer, nn.GroupNorm) for layer in self.body)
        self.modulations = nn.ModuleList(nn.Linear(info.width, 2 * info.width) for _ in range(count))

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (B, classes) of x_t (B, C, H, W) at alpha(t), sigma(t) (B,).

        In logits of Gaussians x_t counts by alpha / sigma where noise is strong. So is it here: what a gradient adds to an estimate of x0,
        sigma^2 / alpha times it, stays bounded at all levels.
        """
        angle = torch.atan2(sigma, REACH * alpha).to(x)[:, None] * torch.arange(1, WAVES + 1, device=x.device)
        told = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        h, modulations = expand((alpha**2 / 4 + sigma**2).rsqrt(), x) * x, iter(self.modulations)
        for layer in self.body:
            h = layer(h)
            if isinstance(layer, nn.GroupNorm):
                scale, shift = next(modulations)(told)[:, :, None, None].chunk(2, 1)
                h = h * (1 + scale) + shift
        return nn.functional.linear(h.mean((2, 3)), self.head.weight) * angle[:, :1].cos() + self.head.bias


def load(name: str, flag: str = "--classifier-guidance") -> NoisyClassifier:
    """A built-in one, with or without -classifier behind its name, or that in a folder or run. Float32, frozen, on the CPU."""

    def made(stored: dict[str, Any]) -> NoisyClassifier:
        if "schedule" not in stored:
            raise UsageError(
                f"{flag} {name}: a classifier of clean pictures, guidance needs one of noised ones", "distill classifier --noisy"
            )
        schedule = {str(key): value for key, value in dict(stored["schedule"]).items()}
        schedule["kind"] = printable(str(schedule["kind"]))
        return NoisyClassifier(NoisyInfo(**{**stored, "model": printable(str(stored["model"])), "schedule": schedule}))

    short, known = name.removesuffix(SUFFIX), classifier.folders()
    noisy = [each + SUFFIX for each in known if each not in classifier.names()]
    return classifier.read(classifier.place(short if short in known else name, flag, known, noisy), made)


class ClassifierGuide:
    """The gradient of log p(class | x_t). A sample's class is its label; of prompts, each has a class in turn, by its position."""

    part = f"{GUIDE}class"

    def __init__(
        self,
        network: NoisyClassifier,
        schedule: NoiseSchedule,
        scale: float,
        name: str,
        asked: Sequence[int] | None,
        of_prompts: bool = False,
    ) -> None:
        self.network: nn.Module = network
        self.schedule, self.scale, self.name = schedule, scale, f"classifier {name}"
        self.classes = network.info.classes
        self.asked = list(asked or range(len(self.classes)))
        self.of_prompts = of_prompts

    def told(self, labels: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, classes) ones at the classes that are asked for; a row of zeros for a null label."""
        if prompts:
            labels = torch.tensor(self.asked, device=labels.device)[labels % len(self.asked)]
        return (labels[:, None] == torch.arange(len(self.classes), device=labels.device)).float()

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        wanted, t = condition.parts[self.part], t.to(x.device, torch.float32)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)

        def score(noisy: Tensor) -> Tensor:
            return (wanted * self.network(noisy.float(), alpha, sigma).log_softmax(1)).sum(1)

        return denoiser(x, t, condition), gradient_of(score, x)

    def identity(self) -> dict[str, Any]:
        classes = {"classifier_classes": ",".join(map(str, self.asked))} if self.of_prompts else {}  # of classes, labels say it
        return {"classifier_guidance": hash_of(self.network.state_dict()), "classifier_scale": self.scale, **classes}


def guide(config: Any, model: Model) -> ClassifierGuide | None:
    """The guide that a config names. Raises UsageError for a classifier that is not of this model's data, classes and schedule."""
    name = getattr(config, "classifier_guidance", None)
    if name is None:
        return None
    network, own, said = load(name), model.conditioner.classes, f"--classifier-guidance {name}"
    info = network.info
    hint = f"distill classifier --noisy --model {model.lineage.name} trains one"
    if info.shape != model.shape:
        shapes = f"of data of shape {info.shape}, those of {model.lineage.name} are {model.shape}"
        raise UsageError(f"{said}: it has learned {info.model}, {shapes}", hint)
    if own and own != info.classes:
        raise UsageError(f"{said}: its classes are {', '.join(info.classes)}; those of {model.lineage.name} {', '.join(own)}", hint)
    if info.schedule != described(model.denoiser.schedule):
        theirs = f"{info.schedule.get('kind')} of {info.model}"
        raise UsageError(f"{said}: of another noise schedule ({theirs}) than {model.lineage.name}'s", hint)
    asked = getattr(config, "classes", None)
    if asked and (beyond := [number for number in asked if not 0 <= number < len(info.classes)]):
        raise UsageError(f"--classes: no class {beyond[0]}", f"the classifier has classes 0 to {len(info.classes) - 1}")
    if info.model != model.lineage.name:
        say(f"{said}: it has learned the noised data of {info.model}, and leads {model.lineage.name}: of the same shape and schedule")
    return ClassifierGuide(network, model.denoiser.schedule, config.classifier_scale, name, asked, model.text is not None)

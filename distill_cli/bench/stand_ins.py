"""What a command reads, made of random numbers where it is not there: weights, pairs, pictures, prompts. Bench measures time alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from distill_cli import launch
from distill_cli.config import BUILTIN_SETS, PROMPT_SETS, Config, PairsConfig
from distill_cli.data.pictures import png, to_uint8
from distill_cli.data.prompts import chosen
from distill_cli.data.reading import is_pipe
from distill_cli.errors import DistillError
from distill_cli.files import write_atomic
from distill_cli.models import load, schedulers
from distill_cli.models.cost import sketched
from distill_cli.models.model import Model
from distill_cli.models.perceptual import find_weights
from distill_cli.pairs.generate import manifest_of
from distill_cli.pairs.store import MANIFEST, OURS, keep_prompts, write_shard
from distill_cli.processes import say
from distill_cli.runs import settle
from distill_cli.training.job import Job

ConfigT = TypeVar("ConfigT", bound=Config)
VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Widths of VGG-16's convolutions (Simonyan & Zisserman 1409.1556, configuration D); 0 is a pooling layer."""
BATCHES, PICTURES = 4, 4
"""Batches of random pairs; random pictures of a class."""


def fill(network: nn.Module) -> None:
    """Give a network without weights random ones, on the CPU: matrices of deviation 0.02, factors of norms 1, biases 0.

    Buffers get whole numbers in order (CLIP's places of tokens) or random ones in [0, 1) (rotary frequencies, tables of places).
    """
    network.to_empty(device="cpu").eval().requires_grad_(False)
    for name, value in network.named_parameters():
        value.normal_(0, 0.02) if value.ndim > 1 else value.fill_(float(name.endswith("weight")))
    for buffer in network.buffers():
        buffer.uniform_() if buffer.is_floating_point() else buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))


def prompted(model: Model) -> Model:
    """A text-to-image model with some prompts (their content does not change the cost); other models unchanged."""
    given = model.conditioner.chosen(PROMPT_SETS[0], "")
    return model.with_prompts(given) if given else model


@dataclass
class StandIns(Job):
    """A job that makes in `folder` what is not there; with `random` the weights of hub models too."""

    folder: Path = Path()
    random: bool = False
    made: list[str] = field(default_factory=list)
    models: dict[str, Model] = field(default_factory=dict)

    def model(self, name: str) -> Model:
        """The model called `name`: its published architecture where a hub model's weights are not here."""
        if name not in self.models:
            sketch, _ = sketched(name, self.random)
            self.models[name] = self._filled(sketch, name) if sketch is not None else load(name)
        return self.models[name]

    def _filled(self, sketch: Model, name: str) -> Model:
        self.made.append(f"weights of {name}'s published architecture")
        for network in (sketch.denoiser, *sketch.codec.parts().values(), *sketch.conditioner.parts().values()):
            fill(network)
        assert sketch.text is not None  # the sketches are of text-to-image models
        for reader in sketch.text.readers.values():
            reader.tokenizer = reader.made_tokenizer(chosen(PROMPT_SETS[0], ""))
        if sketch.scheduler is None:
            return sketch
        kind = schedulers.SOLVERS[sketch.sampler.solver]
        prediction = schedulers.PREDICTION_TYPES[sketch.denoiser.parameterisation]
        return replace(sketch, scheduler={"_class_name": kind, "prediction_type": prediction, **sketch.scheduler})

    def teacher(self, name: str, device: str) -> Model:
        model = self.model(name)
        model.denoiser.to(launch.device(device))
        return model

    def complete(self, config: ConfigT) -> ConfigT:
        """The config of a command, with what it names and what is not there; says what was made."""
        given = {key: getattr(config, key) for key in type(config).model_fields}
        changes: dict[str, Any] = {}
        prompts = given.get("prompts")
        if prompts is not None and prompts not in PROMPT_SETS and not is_pipe(prompts) and not Path(prompts).exists():
            changes["prompts"] = PROMPT_SETS[0]
            self.made.append(f"prompts of {PROMPT_SETS[0]} for {prompts}")
        if "lpips" in (given.get("regression_loss"), given.get("metric")):
            changes |= self._vgg(given["lpips_weights"])
        data = given.get("data")
        if "data" in given and given["resolution"] and data not in BUILTIN_SETS and not (data and Path(data).exists()):
            changes["data"] = self._pictures(given.get("teacher"), given["resolution"])
        config = config.model_copy(update=changes)
        pairs = given.get("pairs")
        wanted = pairs is not None or ("pairs" in given and given["regression_weight"] != 0)
        if wanted and not (pairs and (pairs / MANIFEST).is_file()):
            config = config.model_copy(update={"pairs": self._pairs(config)})
        return config

    def say(self) -> None:
        """Say in one line what was made."""
        if self.made:
            say(f"bench: random, since it is not there: {'; '.join(self.made)}")

    def _vgg(self, path: Path | None) -> dict[str, Path]:
        """Random weights of VGG-16 in torchvision's form, unless they are there."""
        try:
            find_weights(path)
            return {}
        except DistillError:
            weights: dict[str, torch.Tensor] = {}
            before, place = 3, 0
            for width in VGG:
                if width:
                    weights |= {f"features.{place}.weight": torch.randn(width, before, 3, 3) * (9 * before / 2) ** -0.5}
                    weights |= {f"features.{place}.bias": torch.zeros(width)}
                before, place = width or before, place + (2 if width else 1)  # an activation follows each convolution
            torch.save(weights, self.folder / "vgg16.pth")
            self.made.append("VGG's weights")
            return {"lpips_weights": self.folder / "vgg16.pth"}

    def _pictures(self, teacher: str | None, pixels: int) -> str:
        """A folder of random pictures, of the teacher's classes."""
        folder, classes = self.folder / "pictures", self.model(teacher).conditioner.classes if teacher else ()
        count = max(1, len(classes))
        for k in range(count):
            place = folder / f"{k:05d}" if classes else folder
            place.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(to_uint8(torch.rand(PICTURES, 3, pixels, pixels) * 2 - 1)):
                write_atomic(place / f"{number}.png", png(picture))
        self.made.append(f"{count * PICTURES} pictures of {pixels} pixels")
        return str(folder)

    def _pairs(self, config: Any) -> Path:
        """A store of random pairs of the config's teacher."""
        folder, teacher = self.folder / "pairs", prompted(self.model(config.teacher))
        options = config.model_dump(include={"teacher", "classes", "device", "precision", "batch_size"})
        manifest = manifest_of(PairsConfig(num=BATCHES * config.batch_size, steps=1, solver="ddim", **options), teacher)
        settle(folder / MANIFEST, manifest.settings(), "pairs", OURS)
        if teacher.conditioner.prompts:
            keep_prompts(folder, teacher.conditioner.prompts)
        for shard in range(manifest.shards):
            pairs = manifest.range(shard)
            labels = teacher.conditioner.labels(len(pairs), list(manifest.classes) or None, start=pairs.start)
            write_shard(folder, manifest, shard, torch.randn(len(pairs), *manifest.shape).clamp(-1, 1), labels)
        self.made.append(f"{manifest.num} pairs{f' for {config.pairs}' if config.pairs else ''}")
        return folder

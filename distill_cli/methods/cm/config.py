"""Options of `distill cm`: what the four methods share, and each one's own keys with its paper's defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_cli.config import NetworkConfig, TrainingConfig
from distill_cli.config.base import Fraction, Momentum, Name, Numbers, Place, Positive, Rate, Text, Weight
from distill_cli.config.training import OPTIMIZERS, Optimizer

Scales = Annotated[int, Field(ge=2)]
Weighting = Literal["uniform", "karras", "snr+1", "inverse-step"]


class CMConfig(TrainingConfig):
    """distill cm: consistency models (Song et al. 2303.01469 and successors)"""

    method: Literal["cd", "ct", "ict", "ect"] = Field("cd", description="distillation, training, improved training, easy tuning")
    teacher: Name | None = Field(None, description="first weights: a name of `distill models ls`, a folder or a hub id")
    data: Name | None = Field(None, description="real images: a built-in set or a folder; default the set that the teacher has learned")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the images that are never trained on")
    lr: Rate = Field(4e-4, description="learning rate")
    optimizer: Optimizer = Field("radam", description=OPTIMIZERS)
    weight_decay: Weight = Field(0.0, description="decoupled")
    clip_norm: Rate = Field(1e4, description="largest gradient norm; the papers do not clip")
    metric: Literal["huber", "l1", "l2", "lpips"] = Field("huber", description="between the estimates; the 2023 paper's best is lpips")
    huber_c: Weight | None = Field(None, description="pseudo-Huber's c; default 0.00054 sqrt(dimensions)")
    lpips_weights: Place | None = Field(None, description="lpips: torchvision's file of VGG-16; default torchvision's cache")
    lpips_pooling: Literal["max", "average"] = Field("max", description="lpips: VGG's; average in OpenAI's program")
    lpips_resize: Literal["always", "below-256"] = Field(
        "always", description="lpips: pictures that are resized to 224 pixels; below-256 in OpenAI's program"
    )
    weighting: Weighting = Field("uniform", description="of times")
    times: Text | None = Field(None, description="the student's own for several steps, as for distill sample; default ImageNet-64's two")
    label_dropout: Fraction = Field(0.1, description="share of labels replaced by the null class, so that edits can do without a class")
    dropout: Fraction = Field(0.0, description="during training, the same in student and target")

    @property
    def grid(self) -> int | None:
        """Points on which a student's times are counted, where they are its own."""
        return None

    def wrong(self) -> dict[str, bool]:
        """What may be wrong between keys, and whether it is."""
        out = {"huber_c is for metric huber alone": self.huber_c is not None and self.metric != "huber"}
        for key in ("lpips_weights", "lpips_pooling", "lpips_resize"):
            out[f"{key} is for metric lpips alone"] = self.metric != "lpips" and getattr(self, key) != type(self).model_fields[key].default
        return out

    @model_validator(mode="after")
    def _needed(self) -> CMConfig:
        if any((wrong := self.wrong()).values()):
            raise ValueError("; ".join(problem for problem, there in wrong.items() if there))
        return self


class CDConfig(CMConfig):
    """Consistency distillation (2303.01469, algorithm 2)."""

    method: Literal["cd"] = Field("cd", description="consistency distillation")
    teacher: Name = Field("digits", description="whose ODE is followed, and first weights")
    scales: Scales = Field(18, description="N, the grid's times")
    target_decay: Momentum = Field(0.95, description="what the target keeps a step")
    time_weights: Annotated[list[Weight], Numbers] | None = Field(
        None, description="how often each of the grid's N - 1 intervals is drawn, the noisiest first; default all alike"
    )
    solver: Literal["heun", "euler"] = Field("heun", description="the teacher's step")
    teacher_steps: Positive = Field(1, description="how many of them lead from one of the grid's times to the next")
    guidance_scale: Rate | None = Field(None, description="of the teacher; default the teacher's own")

    @property
    def grid(self) -> int:
        return self.scales

    def wrong(self) -> dict[str, bool]:
        weights, scales = self.time_weights, self.scales
        if weights is None:
            return super().wrong()
        return super().wrong() | {
            f"time_weights has {len(weights)} numbers, and {scales} scales have one interval less": len(weights) + 1 != scales,
            "time_weights are all 0": not sum(weights),
        }


class NewConfig(CMConfig):
    """Methods that train from images, from a teacher's weights or from new ones, on a grid that grows."""

    scales: Scales
    scales_end: Scales
    network: NetworkConfig = Field(NetworkConfig(), description="of a student without a teacher")

    def wrong(self) -> dict[str, bool]:
        return super().wrong() | {
            "network.dropout has no use here: the key dropout sets it": bool(self.network.dropout),
            "network is for a student without a teacher": bool(self.teacher) and self.network != NetworkConfig(),
            f"scales_end {self.scales_end} is below scales {self.scales}": self.scales_end < self.scales,
        }


class CTConfig(NewConfig):
    """Consistency training (2303.01469, algorithm 3)."""

    method: Literal["ct"] = Field("ct", description="consistency training")
    scales: Scales = Field(2, description="s0, the grid's times at first")
    scales_end: Scales = Field(150, description="s1, N - 1 at the end")
    target_decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.9, description="what the target keeps a step at first")
    decay_over: Literal["N", "N-1"] = Field("N", description="divisor in the decay's schedule; N-1 in OpenAI's program")


class ICTConfig(NewConfig):
    """Improved consistency training (2310.14189)."""

    method: Literal["ict"] = Field("ict", description="improved consistency training")
    scales: Scales = Field(10, description="s0, the grid's times at first")
    scales_end: Scales = Field(1280, description="s1, N - 1 at the end")
    weighting: Weighting = Field("inverse-step", description="of times")
    p_mean: float = Field(-1.1, description="mean of ln sigma")
    p_std: Rate = Field(2.0, description="standard deviation of ln sigma")


class ECTConfig(CMConfig):
    """Easy consistency tuning (2406.14548)."""

    method: Literal["ect"] = Field("ect", description="easy consistency tuning")
    teacher: Name = Field("digits", description="first weights: a name of `distill models ls`, a folder or a hub id")
    weighting: Weighting = Field("inverse-step", description="of times")
    p_mean: float = Field(-1.1, description="mean of ln sigma")
    p_std: Rate = Field(2.0, description="standard deviation of ln sigma")
    stages: Positive = Field(8, description="how often times come nearer, evenly over the run")
    q: Annotated[float, Field(gt=1)] = Field(2.0, description="how much nearer a stage")
    k: Weight = Field(8.0, description="r / t at small noise")
    b: Rate = Field(1.0, description="where small noise ends")

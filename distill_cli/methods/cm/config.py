"""Options of `distill cm`: those that the four methods share, and those of each method, with its paper's defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_cli.config import GuidesConfig, NetworkConfig, StudentConfig
from distill_cli.config.base import Fraction, Momentum, Name, Numbers, Place, Positive, Rate, Text, Weight
from distill_cli.config.training import OPTIMIZERS, Optimizer

Scales = Annotated[int, Field(ge=2)]
Weighting = Literal["uniform", "karras", "snr+1", "inverse-step"]
WEIGHTING = "how the loss is weighted over times"
TIME_WEIGHTS = "how often each of the grid's N - 1 intervals is drawn, noisiest first; default all alike"


class CMConfig(StudentConfig):
    """distill cm: consistency models (Song et al. 2303.01469 and successors)"""

    method: str = Field("cd", description="the method; --help has a line for each")
    teacher: Name | None = Field(None, description="model to start from: a name of `distill models ls`, a folder or a hub id")
    data: Name | None = Field(
        None, description="images: a built-in set, or a folder of images or of `distill pairs`; default the teacher's own set"
    )
    resolution: Positive | None = Field(None, description="image width in pixels; a folder needs it, a built-in set has its own")
    flip: bool = Field(False, description="mirror images at random")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the images that are never trained on")
    variants: Positive = Field(1, description="for a latent teacher: random versions of each image, encoded once")
    lr: Rate = Field(4e-4, description="learning rate")
    optimizer: Optimizer = Field("radam", description=OPTIMIZERS)
    weight_decay: Weight = Field(0.0, description="decoupled weight decay")
    clip_norm: Rate = Field(1e4, description="largest gradient norm; the default hardly ever clips, as the papers do not")
    metric: Literal["huber", "l1", "l2", "lpips"] = Field("huber", description="distance of the estimates; best in the 2023 paper: lpips")
    huber_c: Weight | None = Field(None, description="metric huber: c of the pseudo-Huber distance; default 0.00054 sqrt(dimensions)")
    lpips_weights: Place | None = Field(None, description="lpips: torchvision's file of VGG-16; default the one in its cache")
    lpips_pooling: Literal["max", "average"] = Field("max", description="lpips: pooling in VGG; average is OpenAI's program's")
    lpips_resize: Literal["always", "below-256"] = Field("always", description="lpips: pictures resized to 224 pixels; OpenAI: below-256")
    weighting: Weighting = Field("uniform", description=WEIGHTING)
    times: Text | None = Field(None, description="EDM: the student's times, written as for distill sample; default the paper's two")
    label_dropout: Fraction = Field(0.1, description="share of labels replaced by the null class, so that edits need no class")
    dropout: Fraction = Field(0.0, description="dropout during training, with the same mask in student and target")

    @property
    def grid(self) -> int | None:
        """Number of points on the student's own grid; None if it uses the usual one of its schedule."""
        return None

    def wrong(self) -> dict[str, bool]:
        """Possible conflicts between keys: message -> whether there is one."""
        return {"lora needs a teacher": bool(self.lora and self.teacher is None)} | {
            f"{key} is for metric={metric}": self.metric != metric
            for metric, own in (("huber", ["huber_c"]), ("lpips", ["lpips_weights", "lpips_pooling", "lpips_resize"]))
            for key in self.changed(*own)
        }

    @model_validator(mode="after")
    def _needed(self) -> CMConfig:
        if wrong := [problem for problem, there in self.wrong().items() if there]:
            raise ValueError("; ".join(wrong))
        return self


class CDConfig(CMConfig, GuidesConfig):
    """Consistency distillation (2303.01469, algorithm 2)."""

    method: Literal["cd"] = Field("cd", description="consistency distillation")
    teacher: Name = Field("digits", description="the model to distil, whose ODE is followed")
    scales: Scales = Field(18, description="number N of times on the grid")
    target_decay: Momentum = Field(0.95, description="decay of the target's average at each step")
    time_weights: Annotated[list[Weight], Numbers] | None = Field(None, description=TIME_WEIGHTS)
    solver: Literal["heun", "euler"] = Field("heun", description="the teacher's ODE solver; heun needs a schedule that ends with signal")
    teacher_steps: Positive = Field(1, description="solver steps between neighbouring times of the grid")
    guidance_scale: Rate | None = Field(None, description="guidance scale of the teacher; default its own")

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
    network: NetworkConfig = Field(NetworkConfig(), description="the network to start from where there is no teacher")

    def wrong(self) -> dict[str, bool]:
        return super().wrong() | {
            "network.dropout has no use here: the key dropout sets it": bool(self.network.dropout),
            "network is for a student without a teacher": bool(self.teacher) and self.network != NetworkConfig(),
            f"scales_end {self.scales_end} is below scales {self.scales}": self.scales_end < self.scales,
        }


class CTConfig(NewConfig):
    """Consistency training (2303.01469, algorithm 3)."""

    method: Literal["ct"] = Field("ct", description="consistency training")
    scales: Scales = Field(2, description="s0: number of discretization steps at the start")
    scales_end: Scales = Field(150, description="s1: number of discretization steps at the end")
    target_decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.9, description="mu0: decay of the target's average at the start")
    decay_over: Literal["N", "N-1"] = Field("N", description="divisor in the decay's schedule; N-1 is OpenAI's program's")


class ICTConfig(NewConfig):
    """Improved consistency training (2310.14189)."""

    method: Literal["ict"] = Field("ict", description="improved consistency training")
    scales: Scales = Field(10, description="s0: number of discretization steps at the start")
    scales_end: Scales = Field(1280, description="s1: number of discretization steps at the end")
    weighting: Weighting = Field("inverse-step", description=WEIGHTING)
    p_mean: float = Field(-1.1, description="mean of ln sigma in training")
    p_std: Rate = Field(2.0, description="standard deviation of ln sigma in training")


class ECTConfig(CMConfig):
    """Easy consistency tuning (2406.14548)."""

    method: Literal["ect"] = Field("ect", description="easy consistency tuning")
    teacher: Name = Field("digits", description="the model to tune: a name of `distill models ls`, a folder or a hub id")
    weighting: Weighting = Field("inverse-step", description=WEIGHTING)
    p_mean: float = Field(-1.1, description="mean of ln sigma in training")
    p_std: Rate = Field(2.0, description="standard deviation of ln sigma in training")
    stages: Positive = Field(8, description="number of stages; each brings the two times nearer to each other")
    q: Annotated[float, Field(gt=1)] = Field(2.0, description="factor by which a stage brings the two times nearer")
    k: Weight = Field(8.0, description="k of the sigmoid that keeps the times apart at small noise")
    b: Rate = Field(1.0, description="b of the sigmoid: the sigma on whose scale it ends")

"""Options of the commands that train."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill_cli.config.base import (
    Classes,
    Config,
    Count,
    Every,
    Fraction,
    Momentum,
    Name,
    Place,
    Positive,
    Precision,
    Rate,
    Text,
    Weight,
)
from distill_cli.config.networks import NetworkConfig, TextConfig, VAENetworkConfig

Optimizer = Literal["adamw", "radam", "muon"]
OPTIMIZERS = "radam: rectified, needs no warm-up; muon: most matrices and convolutions by orthogonal steps, the rest by NAdamW"


class TrainingConfig(Config):
    """What the engine needs for any objective."""

    steps: Positive = Field(1000, description="optimizer steps of the trained model")
    batch_size: Positive = Field(32, description="images a step, over all processes and accumulation")
    accumulate: Positive = Field(1, description="gradient accumulation: parts of a batch")
    lr: Rate = Field(1e-4, description="learning rate")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    lr_end: Fraction = Field(0.0, description="cosine: where it ends, as a share of lr")
    optimizer: Optimizer = Field("adamw", description=OPTIMIZERS)
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.999), description="of the optimizer")
    weight_decay: Weight = Field(0.01, description="decoupled")
    warmup_steps: Count = Field(0, description="steps of linear warm-up")
    clip_norm: Rate = Field(10.0, description="largest gradient norm of a network")
    ema_halflife: Count = Field(0, description="images; 0: no averaging")
    precision: Precision = Field("no", description="of the networks' arithmetic; weights stay float32")
    deterministic: bool = Field(False, description="the same run, again or resumed, is the same bits on one GPU too; slower")
    log_every: Positive = Field(50, description="steps between lines of metrics.jsonl")
    sample_every: Count = Field(500, description="steps between sample grids; 0: none")
    save_every: Every = Field(500, description="between checkpoints: steps, or a time such as 30s, 10m, 2h")
    keep: Positive = Field(2, description="newest checkpoints kept")
    keep_best: Count = Field(0, description="older checkpoints kept, those whose loss was lowest since the one before")
    on_nan: Literal["stop", "skip"] = Field("stop", description="at a gradient that is no number: end, or leave the step out")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = Field("none", description="beside metrics.jsonl; wandb offline")

    @model_validator(mode="after")
    def _parts(self) -> TrainingConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        return self


class TrainConfig(TrainingConfig):
    """distill train"""

    data: Name = Field("digits", description="a built-in set or a folder of images (subfolders are classes)")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    prediction: Literal["edm", "eps", "v"] = Field("edm", description="edm: preconditioned, ln sigma normal; eps, v: DDPM's table")
    p_mean: float = Field(-1.2, description="edm: mean of ln sigma")
    p_std: Rate = Field(1.2, description="edm: standard deviation of ln sigma")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field("linear", description="eps, v: betas over 1000 times")
    label_dropout: Fraction = Field(0.1, description="share of labels or captions replaced by the null one, so that guidance works")
    vae: Place | None = Field(None, description="a folder of `distill vae`: then a text-to-image teacher; data needs captions")
    variants: Positive = Field(32, description="vae: random versions of each picture, encoded once")
    guidance_scale: Rate = Field(3.0, description="vae: what the teacher is sampled with")
    text: TextConfig = Field(TextConfig(), description="vae: the text encoder, trained with it")
    network: NetworkConfig = NetworkConfig()

    @model_validator(mode="after")
    def _of_latents(self) -> TrainConfig:
        if self.vae is not None and self.prediction == "edm":
            raise ValueError("prediction edm is for pixels: latents need eps or v")
        given = [key for key in ("variants", "guidance_scale", "text") if getattr(self, key) != type(self).model_fields[key].default]
        if self.vae is None and given:
            raise ValueError(f"{given[0]} needs vae: the autoencoder of a text-to-image teacher")
        of_others = ("beta_schedule",) if self.prediction == "edm" else ("p_mean", "p_std")
        for key in of_others:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is not used with prediction {self.prediction}")
        return self


class VAEConfig(TrainingConfig):
    """distill vae"""

    data: Name = Field("shapes", description="a built-in set or a folder of images")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    kl_weight: Weight = Field(1e-4, description="of the latents' divergence from a standard normal, a mean over their values")
    sample_every: Literal[0] = Field(0, description="an autoencoder makes no images of its own")
    network: VAENetworkConfig = VAENetworkConfig()


class ClassifierConfig(TrainingConfig):
    """distill classifier"""

    data: Name = Field("digits", description="a built-in set, or a folder of images whose subfolders are classes")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    width: Annotated[int, Field(gt=0, multiple_of=8)] = Field(64, description="channels, and features")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="share of the images that are never trained on, for the accuracy")
    sample_every: Literal[0] = Field(0, description="a classifier makes no images")


class DMDConfig(TrainingConfig):
    """distill dmd: distribution matching distillation (Yin et al. 2311.18828)"""

    teacher: Name = Field("digits", description="a name of `distill models ls`, a folder, or a hub id")
    pairs: Place | None = Field(
        None, description="a folder of `distill pairs`, of which each step takes batch_size; without it there is no regression"
    )
    classes: Classes = Field(None, description="labels that the student learns; default all")
    prompts: Name | None = Field(None, description="of a teacher with text: as for distill pairs; default those of the pairs")
    negative_prompt: Text | None = Field(None, description="of a teacher with text; default that of the pairs")
    match_pairs: bool = Field(False, description="matching loss on the paired batch too, as DMD's runs on LAION have it")
    lr: Rate = Field(5e-5, description="learning rate of the student")
    fake_lr: Rate | None = Field(None, description="learning rate of the fake score; default lr")
    fake_steps: Positive = Field(1, description="fake-score steps a student step")
    warmup_steps: Count = Field(500, description="steps of linear warm-up, of both networks")
    matching_weight: Weight = Field(1.0, description="of the distribution-matching loss")
    fake_score: bool = Field(True, description="false is the paper's ablation: the teacher's score alone, which collapses")
    regression_loss: Literal["l2", "huber", "lpips"] = Field("l2", description="distance of the regression on pairs")
    lpips_weights: Place | None = Field(None, description="lpips: torchvision's file of VGG-16; default torchvision's cache")
    decoder: Name | None = Field(
        None, description="lpips of latents: an AutoencoderTiny, a folder or hub id; default the teacher's autoencoder"
    )
    regression_weight: Weight | None = Field(None, description="default 0.25 with pairs, 0 without")
    guidance_scale: Rate | None = Field(None, description="of the teacher alone; default that of the pairs, else the teacher's own")
    guidance_calls: Literal[1, 2] = Field(1, description="one call of twice the batch, or two of half the memory")
    t_low: Fraction = Field(0.02, description="matching times, share of the range of times")
    t_high: Fraction = Field(0.98, description="matching times, share of the range of times")
    t_bins: Positive = Field(1000, description="EDM: times a range has, from small sigma to large")

    @model_validator(mode="after")
    def _consistent(self) -> DMDConfig:
        if self.t_low >= self.t_high:
            raise ValueError(f"t_low {self.t_low} is not below t_high {self.t_high}")
        if self.regression_weight and not self.pairs:
            raise ValueError("regression_weight needs pairs: make some with `distill pairs`, or set regression_weight=0")
        if self.lpips_weights and self.regression_loss != "lpips":
            raise ValueError("lpips_weights is for regression_loss lpips alone")
        if self.decoder and self.regression_loss != "lpips":
            raise ValueError("decoder is for regression_loss lpips alone")
        if self.match_pairs and not self.pairs:
            raise ValueError("match_pairs needs pairs")
        if self.matching_weight == 0 and not (self.pairs and self.regression_weight != 0):
            raise ValueError("matching_weight 0 leaves nothing to learn from without pairs")
        return self


CM_DEFAULTS: dict[str, dict[str, Any]] = {
    "cd": {"teacher": "digits", "scales": 18, "target_decay": 0.95, "weighting": "uniform"},
    "ct": {"scales": 2, "scales_end": 150, "target_decay": 0.9, "weighting": "uniform"},
    "ict": {"scales": 10, "scales_end": 1280, "weighting": "inverse-step"},
    "ect": {"teacher": "digits", "weighting": "inverse-step", "stages": 8},
}
"""Defaults that depend on the method, as its paper has them."""
CM_KEYS = {
    "scales": ("cd", "ct", "ict"),
    "scales_end": ("ct", "ict"),
    "target_decay": ("cd", "ct"),
    "decay_over": ("ct",),
    "time_weights": ("cd",),
    "solver": ("cd",),
    "teacher_steps": ("cd",),
    "guidance_scale": ("cd",),
    "p_mean": ("ict", "ect"),
    "p_std": ("ict", "ect"),
    "stages": ("ect",),
    "q": ("ect",),
    "k": ("ect",),
    "b": ("ect",),
}
"""Keys that only some methods have."""


class CMConfig(TrainingConfig):
    """distill cm: consistency models (Song et al. 2303.01469 and successors)"""

    method: Literal["cd", "ct", "ict", "ect"] = Field("cd", description="distillation, training, improved training, easy tuning")
    teacher: Name | None = Field(None, description="cd: whose ODE is followed; all: first weights; ct, ict do without")
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
    weighting: Literal["uniform", "karras", "snr+1", "inverse-step"] | None = Field(None, description="of times; default the method's")
    scales: Annotated[int, Field(ge=2)] | None = Field(None, description="cd: N, the grid's times; ct, ict: s0, default 18, 2, 10")
    scales_end: Annotated[int, Field(ge=2)] | None = Field(None, description="ct, ict: s1, N - 1 at the end; default 150, 1280")
    target_decay: Momentum | None = Field(None, description="cd, ct: what the target keeps a step (ct: at first); default 0.95, 0.9")
    decay_over: Literal["N", "N-1"] = Field("N", description="ct: divisor in the decay's schedule; N-1 in OpenAI's program")
    time_weights: list[Weight] | None = Field(
        None, description="cd: how often each of the grid's N - 1 intervals is drawn, the noisiest first; default all alike"
    )
    solver: Literal["heun", "euler"] = Field("heun", description="cd: the teacher's step")
    teacher_steps: Positive = Field(1, description="cd: how many of them lead from one of the grid's times to the next")
    guidance_scale: Rate | None = Field(None, description="cd: of the teacher; default the teacher's own")
    p_mean: float = Field(-1.1, description="ict, ect: mean of ln sigma")
    p_std: Rate = Field(2.0, description="ict, ect: standard deviation of ln sigma")
    stages: Positive | None = Field(None, description="ect: how often times come nearer, evenly over the run; default 8")
    q: Annotated[float, Field(gt=1)] = Field(2.0, description="ect: how much nearer a stage")
    k: Weight = Field(8.0, description="ect: r / t at small noise")
    b: Rate = Field(1.0, description="ect: where small noise ends")
    times: Text | None = Field(None, description="the student's own for several steps, as for distill sample; default ImageNet-64's two")
    label_dropout: Fraction = Field(0.1, description="share of labels replaced by the null class, so that edits can do without a class")
    dropout: Fraction = Field(0.0, description="of training, the same in student and target")
    network: NetworkConfig = Field(NetworkConfig(), description="ct, ict without a teacher")

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        return CM_DEFAULTS.get(str(given.get("method", "cd")), {}) | given

    @model_validator(mode="after")
    def _needed(self) -> CMConfig:
        fields = type(self).model_fields
        others = [key for key, methods in CM_KEYS.items() if self.method not in methods and getattr(self, key) != fields[key].default]
        weights, scales = self.time_weights, self.scales
        wrong = {
            f"not for method {self.method}: {', '.join(others)}": bool(others),
            "huber_c is for metric huber alone": self.huber_c is not None and self.metric != "huber",
            "target_decay 0 has no schedule: ct needs one above 0": self.target_decay == 0 and self.method == "ct",
            "network.dropout has no use here: the key dropout sets it": bool(self.network.dropout),
            "network is for a student without a teacher": bool(self.teacher) and self.network != NetworkConfig(),
            f"scales_end {self.scales_end} is below scales {scales}": bool(self.scales_end and scales and self.scales_end < scales),
        }
        for key in ("lpips_weights", "lpips_pooling", "lpips_resize"):
            wrong[f"{key} is for metric lpips alone"] = self.metric != "lpips" and getattr(self, key) != fields[key].default
        if weights is not None and "time_weights" not in others:
            wrong[f"time_weights has {len(weights)} numbers, and {scales} scales have one interval less"] = len(weights) + 1 != scales
            wrong["time_weights are all 0"] = not sum(weights)
        if any(wrong.values()):
            raise ValueError("; ".join(problem for problem, there in wrong.items() if there))
        return self

"""Every option of every command, with its unit. An unknown key is an error. Knows no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

BUILTIN_SETS = ("digits", "shapes")
"""Sets of images that are known by name (data/images.py)."""
PROMPT_SETS = ("shapes", "shapes-held")
"""Sets of prompts that are known by name (data/prompts.py)."""
Solver = Literal["heun", "euler", "ddim", "ancestral", "few-step", "pndm", "dpm++"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def _classes(value: Any) -> Any:
    """`0-3,7` -> [0, 1, 2, 3, 7]."""
    if isinstance(value, int):
        return [value]
    if not isinstance(value, str):
        return value
    out: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{value!r} is not like 0-3,7")
        out += range(int(first), int(last or first) + 1)
    return out


def _not_empty(value: list[int] | None) -> list[int] | None:
    if value is not None and not value:
        raise ValueError("no class given")
    return value


def _no(value: Any) -> Any:
    """YAML 1.1 reads `no` as false."""
    return "no" if value is False else value


_SECONDS = {"s": 1, "m": 60, "h": 3600}


def seconds(every: int | str) -> float | None:
    """`10m` -> 600; None for a number of steps."""
    return None if isinstance(every, int) else float(every[:-1]) * _SECONDS[every[-1]]


def _every(value: Any) -> Any:
    """Steps, or a time such as 10m."""
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"(?=.*[1-9])(\d{1,9}|\d{1,9}(\.\d{1,9})?[smh])", text):
        raise ValueError(f"{value!r} is neither a number of steps nor a time such as 30s, 10m, 2h")
    return int(text) if text.isdigit() else text


Every = Annotated[int | str, BeforeValidator(_every)]
Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_no)]
Classes = Annotated[list[Count] | None, BeforeValidator(_classes), AfterValidator(_not_empty)]


class Config(BaseModel):
    """Options of one command; extra keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    out: Path | None = Field(None, description="folder of the results; default runs/NAME")
    seed: int = Field(0, ge=0, lt=2**63, description="of all noise, orders and times")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where networks run")


class GenerateConfig(Config):
    """What pairs and sample share: how images come out of a model."""

    num: Positive = Field(1000, description="images")
    classes: Classes = Field(None, description="labels in turn, such as 0-9 or 3,5; default all, balanced")
    solver: Solver | None = Field(None, description="default the model's own")
    steps: Positive | None = Field(None, description="solver steps (Heun: 2N - 1 network evaluations); default the model's own")
    guidance_scale: Rate | None = Field(None, description="uncond + scale (cond - uncond); default the model's own")
    batch_size: Positive = Field(100, description="images at a time")
    precision: Precision = Field("no", description="of the network's arithmetic")


class PairsConfig(GenerateConfig):
    """distill pairs"""

    teacher: str = Field("digits", description="a name of `distill models ls`, a folder, or a hub id")
    shard_size: Positive = Field(500, description="pairs a file")
    dtype: Literal["float32", "float16"] = Field("float16", description="of the stored images")


class SampleConfig(GenerateConfig):
    """distill sample"""

    model: str = Field("digits", description="a name of `distill models ls`, a folder, a run, or a hub id")
    format: Literal["png", "npz"] = Field("png", description="a file an image, or one samples.npz (arr_0 uint8 N,H,W,3; arr_1 labels)")
    times: str | None = Field(None, description="a student's: index:0,22 (of diffusers' 40), sigma:80,1.4, even; default its own")
    search_times: Annotated[int, Field(ge=2, le=39)] | None = Field(None, description="a student's best times for so many steps")
    classifier: str = Field("digits", description="search_times: in whose features the Fréchet distance is measured")
    grid: bool = Field(False, description="also grid.png of the first 100 images")
    scale: Positive = Field(4, description="enlargement of the grid's pictures")

    @model_validator(mode="after")
    def _one_thing(self) -> SampleConfig:
        given = [key for key in ("times", "steps", "solver", "guidance_scale", "grid") if getattr(self, key)]
        if self.search_times and given:
            raise ValueError(f"search_times finds times and makes no samples: leave {given[0]} out")
        return self


def _listed(value: Any) -> Any:
    """One name is a list of one."""
    return [value] if isinstance(value, str) else value


class EvaluateConfig(Config):
    """distill evaluate"""

    model: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)] = Field(
        ["digits"], description="models as for sample, NAME@STEPS for other steps than its own; or an npz of images"
    )
    data: str = Field("digits", description="the real images: a built-in set or a folder")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    classifier: str = Field("digits", description="whose features are measured: a built-in one, or a folder of `distill classifier`")
    num: Positive = Field(2000, description="images of each model")
    seed: int = Field(7, ge=0, lt=2**63, description="of their noise; another than the pairs', whose noise a student knows")
    classes: Classes = Field(None, description="labels in turn; default all, balanced")
    neighbours: Positive = Field(3, description="of precision and recall")
    batch_size: Positive = Field(100, description="images at a time")
    precision: Precision = Field("no", description="of the models' arithmetic")


class EditConfig(Config):
    """distill edit: a consistency student edits pictures that it was never trained to edit (Song et al. 2303.01469, section 6.3)"""

    task: Literal["inpaint", "colorize", "superres", "sdedit", "interpolate"] = Field("interpolate", description="what is done")
    model: str = Field("runs/cm", description="a consistency student: a folder, a run, or a hub id")
    input: Path | None = Field(None, description="a picture or a folder of them; interpolate takes none")
    mask: Path | None = Field(None, description="inpaint: a picture of the input's size, white where it is painted anew")
    patch: Annotated[int, Field(ge=2)] = Field(4, description="superres: pixels of the model on a pixel of the input, each way")
    times: str | None = Field(None, description="as for sample; default index:0,4,... to 36, sdedit from 20, interpolate the student's own")
    classes: Classes = Field(None, description="labels of the pictures in turn; default none where the model can do without")
    frames: Annotated[int, Field(ge=2)] = Field(10, description="interpolate: pictures from one noise to the next")
    batch_size: Positive = Field(100, description="pictures at a time")
    scale: Positive = Field(4, description="enlargement of the side-by-side picture")

    @model_validator(mode="after")
    def _needed(self) -> EditConfig:
        if (self.input is None) != (self.task == "interpolate"):
            raise ValueError(f"{self.task} {'needs' if self.input is None else 'takes no'} input")
        if (self.mask is None) == (self.task == "inpaint"):
            raise ValueError(f"{self.task} {'needs a' if self.mask is None else 'takes no'} mask")
        return self


class TrainingConfig(Config):
    """What the engine needs for any objective."""

    steps: Positive = Field(1000, description="optimizer steps of the trained model")
    batch_size: Positive = Field(32, description="images a step, over all processes and accumulation")
    accumulate: Positive = Field(1, description="gradient accumulation: parts of a batch")
    lr: Rate = Field(1e-4, description="learning rate")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    lr_end: Fraction = Field(0.0, description="cosine: where it ends, as a share of lr")
    optimizer: Literal["adamw", "radam"] = Field("adamw", description="radam: rectified, needs no warm-up")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.999), description="of the optimizer")
    weight_decay: Weight = Field(0.01, description="decoupled")
    warmup_steps: Count = Field(0, description="steps of linear warm-up")
    clip_norm: Rate = Field(10.0, description="largest gradient norm of a network")
    ema_halflife: Count = Field(0, description="images; 0: no averaging")
    precision: Precision = Field("no", description="of the networks' arithmetic; weights stay float32")
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


class NetworkConfig(BaseModel):
    """diffusers' UNet2DModel, as far as people change it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: list[Positive] = Field([32, 64, 64], min_length=1, description="of each resolution, from the finest")
    attention: list[bool] = Field([False, True, False], description="self-attention at each resolution")
    layers: Positive = Field(1, description="residual blocks a resolution")
    groups: Positive = Field(16, description="of group normalisation")
    head: Positive = Field(32, description="channels of an attention head")
    dropout: Fraction = Field(0.0, description="of training; off everywhere else")

    @model_validator(mode="after")
    def _lengths(self) -> NetworkConfig:
        if len(self.channels) != len(self.attention):
            raise ValueError(f"{len(self.channels)} channels but {len(self.attention)} attention")
        for width in self.channels:
            if width % self.groups:
                raise ValueError(f"channels {width} is not a multiple of groups {self.groups}")
        for width, attends in zip(self.channels, [*self.attention[:-1], True]):  # the middle of the network always attends
            if attends and width % self.head:
                raise ValueError(f"channels {width} with attention is not a multiple of head {self.head}")
        return self


class TextConfig(BaseModel):
    """The text encoder of a text-to-image teacher: transformers' CLIPTextModel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: Positive = Field(96, description="channels of an embedding")
    layers: Positive = Field(2, description="of the transformer")
    heads: Positive = Field(4, description="of its attention")
    length: Annotated[int, Field(ge=3)] = Field(16, description="tokens of a caption, start and end among them")

    @model_validator(mode="after")
    def _even(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class TrainConfig(TrainingConfig):
    """distill train"""

    data: str = Field("digits", description="a built-in set or a folder of images (subfolders are classes)")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    prediction: Literal["edm", "eps", "v"] = Field("edm", description="edm: preconditioned, ln sigma normal; eps, v: DDPM's table")
    p_mean: float = Field(-1.2, description="edm: mean of ln sigma")
    p_std: Rate = Field(1.2, description="edm: standard deviation of ln sigma")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field("linear", description="eps, v: betas over 1000 times")
    label_dropout: Fraction = Field(0.1, description="share of labels or captions replaced by the null one, so that guidance works")
    vae: Path | None = Field(None, description="a folder of `distill vae`: then a text-to-image teacher; data needs captions")
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
        return self


class VAENetworkConfig(BaseModel):
    """diffusers' AutoencoderKL, as far as people change it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: list[Positive] = Field([16, 32, 64, 64], min_length=1, description="of each resolution, from the finest")
    latent_channels: Positive = Field(4, description="of the latents")
    layers: Positive = Field(1, description="residual blocks a resolution")
    groups: Positive = Field(8, description="of group normalisation")

    @model_validator(mode="after")
    def _groups(self) -> VAENetworkConfig:
        for width in self.channels:
            if width % self.groups:
                raise ValueError(f"channels {width} is not a multiple of groups {self.groups}")
        return self


class VAEConfig(TrainingConfig):
    """distill vae"""

    data: str = Field("shapes", description="a built-in set or a folder of images")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    kl_weight: Weight = Field(1e-4, description="of the latents' divergence from a standard normal, a mean over their values")
    sample_every: Literal[0] = Field(0, description="an autoencoder makes no images of its own")
    network: VAENetworkConfig = VAENetworkConfig()


class ClassifierConfig(TrainingConfig):
    """distill classifier"""

    data: str = Field("digits", description="a built-in set, or a folder of images whose subfolders are classes")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    width: Annotated[int, Field(gt=0, multiple_of=8)] = Field(64, description="channels, and features")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="share of the images that are never trained on, for the accuracy")
    sample_every: Literal[0] = Field(0, description="a classifier makes no images")


class DMDConfig(TrainingConfig):
    """distill dmd: distribution matching distillation (Yin et al. 2311.18828)"""

    teacher: str = Field("digits", description="a name of `distill models ls`, a folder, or a hub id")
    pairs: Path | None = Field(
        None, description="a folder of `distill pairs`, of which each step takes batch_size; without it there is no regression"
    )
    classes: Classes = Field(None, description="labels that the student learns; default all")
    lr: Rate = Field(5e-5, description="learning rate of the student")
    fake_lr: Rate | None = Field(None, description="learning rate of the fake score; default lr")
    fake_steps: Positive = Field(1, description="fake-score steps a student step")
    warmup_steps: Count = Field(500, description="steps of linear warm-up, of both networks")
    matching_weight: Weight = Field(1.0, description="of the distribution-matching loss")
    fake_score: bool = Field(True, description="false is the paper's ablation: the teacher's score alone, which collapses")
    regression_loss: Literal["l2", "huber", "lpips"] = Field("l2", description="distance of the regression on pairs")
    lpips_weights: Path | None = Field(None, description="lpips: torchvision's file of VGG-16; default torchvision's cache")
    regression_weight: Weight | None = Field(None, description="default 0.25 with pairs, 0 without")
    guidance_scale: Rate | None = Field(None, description="of the teacher alone; default the teacher's own")
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
    "solver": ("cd",),
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
    teacher: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="cd: whose ODE is followed; all: first weights; ct, ict do without"
    )
    data: str | None = Field(None, description="real images: a built-in set or a folder; default the set that the teacher has learned")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    flip: bool = Field(False, description="mirror images at random")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the images that are never trained on")
    lr: Rate = Field(4e-4, description="learning rate")
    optimizer: Literal["adamw", "radam"] = Field("radam", description="radam: rectified, needs no warm-up")
    weight_decay: Weight = Field(0.0, description="decoupled")
    clip_norm: Rate = Field(1e4, description="largest gradient norm; the papers do not clip")
    metric: Literal["huber", "l1", "l2", "lpips"] = Field("huber", description="between the estimates; the 2023 paper's best is lpips")
    huber_c: Weight | None = Field(None, description="pseudo-Huber's c; default 0.00054 sqrt(dimensions)")
    lpips_weights: Path | None = Field(None, description="lpips: torchvision's file of VGG-16; default torchvision's cache")
    weighting: Literal["uniform", "karras", "snr+1", "inverse-step"] | None = Field(None, description="of times; default the method's")
    scales: Annotated[int, Field(ge=2)] | None = Field(None, description="cd: N, the grid's times; ct, ict: s0, default 18, 2, 10")
    scales_end: Annotated[int, Field(ge=2)] | None = Field(None, description="ct, ict: s1, N - 1 at the end; default 150, 1280")
    target_decay: Momentum | None = Field(None, description="cd, ct: what the target keeps a step (ct: at first); default 0.95, 0.9")
    solver: Literal["heun", "euler"] = Field("heun", description="cd: the teacher's step")
    guidance_scale: Rate | None = Field(None, description="cd: of the teacher; default the teacher's own")
    p_mean: float = Field(-1.1, description="ict, ect: mean of ln sigma")
    p_std: Rate = Field(2.0, description="ict, ect: standard deviation of ln sigma")
    stages: Positive | None = Field(None, description="ect: how often times come nearer, evenly over the run; default 8")
    q: Annotated[float, Field(gt=1)] = Field(2.0, description="ect: how much nearer a stage")
    k: Weight = Field(8.0, description="ect: r / t at small noise")
    b: Rate = Field(1.0, description="ect: where small noise ends")
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
        for key, methods in CM_KEYS.items():
            if self.method not in methods and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is not for method {self.method}")
        if self.huber_c is not None and self.metric != "huber":
            raise ValueError("huber_c is for metric huber alone")
        if self.target_decay == 0 and self.method == "ct":
            raise ValueError("target_decay 0 has no schedule: ct raises it as N grows")
        if self.network.dropout or (self.teacher and self.network != NetworkConfig()):
            raise ValueError("network is for a student without a teacher, and its dropout is the key dropout")
        if self.scales_end and self.scales and self.scales_end < self.scales:
            raise ValueError(f"scales_end {self.scales_end} is below scales {self.scales}")
        if self.lpips_weights and self.metric != "lpips":
            raise ValueError("lpips_weights is for metric lpips alone")
        return self


CONFIGS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "pairs": PairsConfig,
    "dmd": DMDConfig,
    "cm": CMConfig,
    "sample": SampleConfig,
    "classifier": ClassifierConfig,
    "vae": VAEConfig,
    "edit": EditConfig,
    "evaluate": EvaluateConfig,
}
"""The command that a recipe's `command` key names -> its options."""

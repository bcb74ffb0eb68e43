"""Options of the commands that train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_cli.config.base import (
    Compile,
    Config,
    Count,
    Every,
    Fraction,
    Momentum,
    Names,
    Numbers,
    Positive,
    Precision,
    Rate,
    Size,
    Weight,
)

Optimizer = Literal["adamw", "radam", "muon"]
OPTIMIZERS = "radam: rectified Adam, needs no warm-up; muon: orthogonalised steps for matrices and convolutions, NAdamW for the rest"


class TrainingConfig(Config):
    """Options that every training method shares."""

    steps: Positive = Field(1000, description="optimizer steps; of the student, where several networks are trained")
    batch_size: Positive = Field(32, description="images in a step, summed over processes and accumulation")
    accumulate: Positive = Field(1, description="gradient accumulation: parts that a batch is split into")
    lr: Rate = Field(1e-4, description="learning rate")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up")
    lr_end: Fraction = Field(0.0, description="cosine: final learning rate, as a share of lr")
    optimizer: Optimizer = Field("adamw", description=OPTIMIZERS)
    optimizer_device: Literal["same", "cpu"] = Field(
        "same", description="adamw: cpu keeps its moments in the host's memory, and steps there"
    )
    betas: Annotated[tuple[Momentum, Momentum], Numbers] = Field((0.9, 0.999), description="the optimizer's betas")
    weight_decay: Weight = Field(0.01, description="decoupled weight decay")
    warmup_steps: Count = Field(0, description="steps of linear learning-rate warm-up")
    clip_norm: Rate = Field(10.0, description="largest gradient norm of a network; larger gradients are scaled down")
    ema_halflife: Count = Field(0, description="half-life of the weights' average, in images; 0: no average")
    ema_device: Literal["same", "cpu"] = Field("same", description="cpu keeps the weights' average in the host's memory")
    precision: Precision = Field("no", description="number type of the networks' arithmetic, no: float32; trained weights stay float32")
    deterministic: bool = Field(False, description="the same run, again or resumed, gives the same bits on one GPU too; slower")
    compile: Compile = Field("none", description="torch.compile of the denoisers: block by block, or whole; minutes before the first steps")
    channels_last: bool = Field(False, description="store pictures inside the networks with their channels last, which may be faster")
    gradient_checkpointing: bool = Field(False, description="compute activations again in the backward pass: less memory, a third slower")
    memory: Size | None = Field(
        None, description="a GPU's memory, as 24GB: a run that needs more by its plan is refused, and a plan says how to fit"
    )
    log_every: Positive = Field(50, description="steps between lines of metrics.jsonl")
    sample_every: Count = Field(500, description="steps between sample grids; 0: none")
    save_every: Every = Field(500, description="steps between checkpoints, or a time such as 30s, 10m, 2h")
    keep: Positive = Field(2, description="newest checkpoints to keep")
    keep_best: Count = Field(0, description="older checkpoints to keep besides: the best, by the lowest loss since the one before")
    on_nan: Literal["stop", "skip"] = Field("stop", description="at a gradient that is not finite: end the run, or leave the step out")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = Field("none", description="tracker beside metrics.jsonl; wandb offline")

    @model_validator(mode="after")
    def _parts(self) -> TrainingConfig:
        if self.accumulate > 1 and not self.splits(self.accumulate):
            raise ValueError(f"accumulate {self.accumulate} does not divide {self.batch()}")
        if self.optimizer_device == "cpu" and self.optimizer != "adamw":
            raise ValueError(f"optimizer_device cpu: for adamw, not {self.optimizer}")
        return self

    def splits(self, parts: int) -> bool:
        """Whether a batch can be split into `parts` equal parts."""
        return self.batch_size % parts == 0

    def batch(self) -> str:
        """What `splits` splits, as the options give it."""
        return f"batch_size {self.batch_size}"


class StudentConfig(TrainingConfig):
    """Options that every method with a teacher shares."""

    lora: Count = Field(0, description="rank of a LoRA on the frozen teacher, stored in the run's precision; 0: whole weights")
    lora_alpha: Rate | None = Field(None, description="lora: its scale is alpha / rank; default the rank")
    lora_targets: Annotated[list[str] | None, Names] = Field(
        None, description="lora: ends of the names of the layers that it changes; default the usual ones"
    )
    quantize: Literal["none", "int8"] = Field("none", description="lora: how the frozen network's matrices are stored; int8 needs torchao")
    merge: bool = Field(False, description="lora: save whole weights instead of a LoRA's file")

    health_every: Count | None = Field(
        None, description="steps between looks at the student's pictures beside the teacher's; 0: none; default 20 looks or fewer, "
        "at most 2% of the run's network evaluations"
    )  # fmt: skip
    best_by: Literal["loss", "drift", "frechet"] = Field(
        "loss", description="what ranks checkpoints: the loss, or at checkpoints' steps the pictures' drift from the teacher's, or their "
        "Fréchet distance in a built-in classifier's features"
    )  # fmt: skip
    result: Literal["last", "best"] = Field("last", description="the step that becomes the student: the last, or the best checkpoint's")

    @model_validator(mode="after")
    def _of_health(self) -> StudentConfig:
        if self.best_by != "loss" and self.health_every == 0:
            raise ValueError(f"best_by {self.best_by}: looks at pictures, and health_every is 0")
        if self.best_by != "loss" and isinstance(self.save_every, str):
            raise ValueError(f"best_by {self.best_by}: save_every {self.save_every} is a time; give steps")
        if self.result == "best" and not self.keep_best:
            raise ValueError("result best: keeps the best checkpoint: keep_best=1")
        return self

    @model_validator(mode="after")
    def _of_lora(self) -> StudentConfig:
        if not self.lora and (given := self.changed("lora_alpha", "lora_targets", "quantize", "merge")):
            raise ValueError(f"{given[0]} is for a LoRA: lora=RANK")
        if self.merge and self.quantize != "none":
            raise ValueError(f"quantize {self.quantize}: not with merge, which would save rounded weights")
        if self.lora and self.ema_device != "same":
            raise ValueError("ema_device cpu: not with lora, whose average is small and shares the base")
        return self

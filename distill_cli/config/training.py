"""Options of the commands that train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_cli.config.base import Config, Count, Every, Fraction, Momentum, Numbers, Positive, Precision, Rate, Weight

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
    betas: Annotated[tuple[Momentum, Momentum], Numbers] = Field((0.9, 0.999), description="of the optimizer")
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

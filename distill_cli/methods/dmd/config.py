"""Options of `distill dmd`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distill_cli.config import TrainingConfig
from distill_cli.config.base import Classes, Count, Fraction, Name, Place, Positive, Rate, Text, Weight


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

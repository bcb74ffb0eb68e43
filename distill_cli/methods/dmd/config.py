"""Options of `distill dmd`."""

from __future__ import annotations

from math import ceil, floor
from typing import Literal

from pydantic import Field, model_validator

from distill_cli.config import GuidesConfig, StudentConfig
from distill_cli.config.base import Classes, Count, Fraction, Name, Place, Positive, Range, Rate, Text, Texts, Weight, check_range


class DMDConfig(StudentConfig, GuidesConfig):
    """distill dmd: distribution matching distillation (Yin et al. 2311.18828)"""

    elsewhere = dict.fromkeys(("student_steps", "times", "gan", "data"), "distill dmd2: students of several steps, a discriminator")

    teacher: Name = Field("digits", description="the model to distil: a name of `distill models ls`, a folder, or a hub id")
    pairs: Place | None = Field(None, description="a folder of `distill pairs`, batch_size pairs a step; default no regression")
    classes: Classes = Field(None, description="classes that the student learns; default all")
    prompts: Name | None = Field(None, description="text-to-image: prompts as for distill pairs; default the pairs' own")
    text: Texts = "stored"
    negative_prompt: Text | None = Field(None, description="text-to-image: the teacher's negative prompt; default the pairs' own")
    match_pairs: bool = Field(False, description="apply the matching loss to the paired batch too, as in DMD's runs on LAION")
    lr: Rate = Field(5e-5, description="learning rate of the student")
    fake_lr: Rate | None = Field(None, description="learning rate of the fake score; default lr")
    fake_steps: Positive = Field(1, description="fake-score steps for each student step")
    warmup_steps: Count = Field(500, description="steps of linear learning-rate warm-up, for student and fake score")
    matching_share: Fraction = Field(
        1.0, description="with pairs: share of batch_size, whole images, matched beside them (each costs 8 passes or more, a pair 3)"
    )
    matching_weight: Weight = Field(1.0, description="weight of the distribution-matching loss")
    fake_score: bool = Field(True, description="train a fake score; without it students collapse (the paper's ablation)")
    regression_loss: Literal["l2", "huber", "lpips"] = Field(
        "l2", description="distance of the regression loss; huber pulls as hard near the target as far away: give it less weight"
    )
    lpips_weights: Place | None = Field(None, description="lpips: torchvision's file of VGG-16; default the one in its cache")
    decoder: Name | None = Field(None, description="lpips of latents: an AutoencoderTiny that decodes them; default the teacher's VAE")
    regression_weight: Weight | None = Field(None, description="weight of the regression loss; default 0.25 with pairs, 0 without")
    regression_steps: Positive | None = Field(
        None, description="steps with the regression; matching alone, after them, needs low rates; default all"
    )
    guidance_scale: Rate | None = Field(None, description="guidance scale of the teacher; default the pairs', else the teacher's own")
    guidance_range: Range | None = Field(
        None, description="LOW,HIGH: guidance scales of the teacher, each image's own, told to the student: a dial; default the pairs'"
    )
    guidance_calls: Literal[1, 2] = Field(1, description="guidance: 1 call with twice the batch, or 2 calls with half the memory")
    student_time: Rate | None = Field(
        None, description="time that the student is told at pure noise; default the last. DMD2 published 399 of 1000 for SDXL"
    )
    t_low: Fraction = Field(0.02, description="smallest matching time, as a share of the range of times")
    t_high: Fraction = Field(0.98, description="largest matching time, as a share of the range of times")
    t_bins: Positive = Field(1000, description="EDM, flow: number of times in the range, from little noise to much")

    @model_validator(mode="after")
    def _consistent(self) -> DMDConfig:
        if self.t_low >= self.t_high:
            raise ValueError(f"t_low {self.t_low} is not below t_high {self.t_high}")
        check_range(self.guidance_range, self.guidance_scale)
        if self.regression_weight and not self.pairs:
            alone = [f"{key}={none}" for key, none in (("matching_share", 1), ("regression_steps", "null")) if self.changed(key)]
            said = " ".join(["regression_weight=0", *alone])
            raise ValueError(f"regression_weight needs pairs: make some with `distill pairs`, or set {said}")
        if self.regression_loss != "lpips" and (given := self.changed("lpips_weights", "decoder")):
            raise ValueError(f"{given[0]} is for regression_loss=lpips")
        if self.text == "live" and self.pairs and self.prompts is None:
            raise ValueError("text live: the text of the pairs' prompts is stored beside them; leave it out, or give other prompts")
        if self.match_pairs and not self.pairs:
            raise ValueError("match_pairs needs pairs")
        if self.regression_steps is not None:
            if not (self.pairs and self.regression_weight != 0 and self.matching_weight):
                raise ValueError("regression_steps: needs a regression on pairs, and matching after it; without either, leave it out")
            if self.keep_best and self.best_by == "loss":
                raise ValueError("best_by loss: the loss falls where the regression ends (regression_steps): best_by=drift")
        if self.matching_share != 1 and not (self.pairs and (self.match_pairs or self.regression_weight != 0)):
            raise ValueError(f"matching_share {self.matching_share:g}: needs a regression on pairs; without one, set matching_share=1")
        if self.matching_share != 1 and self.matching_weight == 0:
            raise ValueError(f"matching_share {self.matching_share:g}: matching_weight 0 matches nothing: set matching_share=1 too")
        asked = self.batch_size * self.matching_share
        if asked < 0.5 or abs(asked - round(asked)) > 1e-3:  # 0.3333 of 12 are 4
            near = " or ".join(f"{count / self.batch_size:g}" for count in sorted({max(1, floor(asked)), ceil(asked) or 1}))
            raise ValueError(
                f"matching_share {self.matching_share:g}: of batch_size {self.batch_size} that is {asked:g} images: take {near}"
                + (", or for regression alone matching_share=1 matching_weight=0" if asked == 0 else "")
            )
        if self.matching_weight == 0 and not (self.pairs and self.regression_weight != 0):
            raise ValueError("matching_weight 0 leaves nothing to learn from without pairs")
        return self

    @property
    def regressed(self) -> int:
        """The steps with the regression, if there is one."""
        return min(self.steps, self.regression_steps or self.steps)

    @property
    def matched(self) -> int:
        """The images of a step that are matched beside the pairs."""
        return round(self.batch_size * self.matching_share) if self.matching_weight else 0

    def splits(self, parts: int) -> bool:
        return super().splits(parts) and self.matched % parts == 0

    def batch(self) -> str:
        return super().batch() + (f" and matching_share {self.matching_share:g} of it" if self.matching_share != 1 else "")

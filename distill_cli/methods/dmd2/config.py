"""Options of `distill dmd2`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_cli.config import GuidesConfig, StudentConfig
from distill_cli.config.base import Classes, Count, Fraction, Name, Numbers, Place, Positive, Rate, Text, Texts, Weight

Where = Literal["range", "stretch", "noisier"]
WHERE = (
    "range: t_low to t_high; stretch: between this step's time and the next one's, as in TDM (2503.06674); "
    "noisier: from the next step's time up to t_high (2511.22677)"
)


class DMD2Config(StudentConfig, GuidesConfig):
    """distill dmd2: improved distribution matching distillation (Yin et al. 2405.14867)"""

    elsewhere = {
        "pairs": "dmd2 needs none: init_pairs=DIR init_steps=N begins a one-step student on them, distill dmd keeps to them",
        "student_time": "times=399 makes a one-step student that is told 399",
        **dict.fromkeys(
            ("regression_weight", "regression_loss", "regression_steps"),
            "regression is a beginning here: init_pairs, init_steps, init_loss",
        ),
    }

    teacher: Name = Field("digits", description="the model to distil: a name of `distill models ls`, a folder, or a hub id")
    student: Name | None = Field(None, description="a student of the same network to begin from; default the teacher's weights")
    student_steps: Positive | None = Field(None, description="steps in which the student makes a picture; default 4, or those of times")
    times: Annotated[list[Weight], Numbers] | None = Field(
        None, description="the times of these steps, decreasing; default even ones: 999,749,499,249 for Stable Diffusion in four"
    )
    input: Literal["simulation", "data"] = Field(
        "simulation", description="what later steps get in training: simulation: the student's own x0, renoised; data: noised real images"
    )
    classes: Classes = Field(None, description="classes that the student learns; default all")
    prompts: Name | None = Field(None, description="text-to-image: prompts as for distill pairs; default those of init_pairs, else of data")
    text: Texts = "stored"
    negative_prompt: Text | None = Field(None, description="text-to-image: the teacher's negative prompt")
    data: Name | None = Field(
        None, description="real images, for gan or input=data: a built-in set, a folder of images, or for text one of `distill pairs`"
    )
    resolution: Positive | None = Field(None, description="width of the pictures in pixels; default the teacher's own")
    flip: bool = Field(False, description="mirror real images at random")
    variants: Positive = Field(1, description="for a latent teacher: random versions of each real image, encoded once")
    lr: Rate = Field(5e-5, description="learning rate of the student")
    fake_lr: Rate | None = Field(None, description="learning rate of the fake score; default lr")
    fake_steps: Positive = Field(5, description="fake-score steps for each student step, each on new images")
    warmup_steps: Count = Field(0, description="steps of linear learning-rate warm-up, for student and fake score")
    guidance_scale: Rate | None = Field(None, description="guidance scale of the teacher; default the teacher's own")
    guidance_calls: Literal[1, 2] = Field(1, description="guidance: 1 call with twice the batch, or 2 calls with half the memory")
    matching_weight: Weight = Field(1.0, description="weight of the gradient's matching part: fake score minus conditional teacher")
    matching_times: Where = Field("range", description=f"times of the matching part: {WHERE}")
    guidance_weight: Weight = Field(
        1.0, description="weight of the gradient's guidance part: (scale - 1) (unconditional - conditional teacher)"
    )
    guidance_times: Literal["same", "range", "stretch", "noisier"] = Field(
        "same", description="times of the guidance part; same: those of the matching part, with one call for both; others: a further call"
    )
    t_low: Fraction = Field(0.02, description="smallest time of both parts, as a share of the range of times")
    t_high: Fraction = Field(0.98, description="largest time of both parts, as a share of the range of times")
    t_bins: Positive = Field(1000, description="EDM, flow: number of times in the range, from little noise to much")
    gan: Literal["fake", "teacher", "none"] | None = Field(
        None,
        description="a discriminator on the features of the fake score, which learns too, or of the frozen teacher; "
        "default fake with data, else none",
    )
    gan_weight: Weight = Field(3e-3, description="gan: weight of the student's loss; DMD2: 3e-3 ImageNet-64, 1e-3 SD 1.5, 5e-3 SDXL")
    critic_weight: Weight = Field(1e-2, description="gan: weight of the discriminator's loss beside the fake score's")
    r1_weight: Weight = Field(0.0, description="gan: weight of the discriminator's R1 penalty; 2501.08316's 100 is 0.01 here")
    init_pairs: Place | None = Field(
        None, description="for one step: a folder of `distill pairs`; the student begins by regression on them"
    )
    init_steps: Count = Field(0, description="steps of regression on init_pairs before the first step of dmd2")
    init_loss: Literal["l2", "huber"] = Field("huber", description="distance of that regression")

    @property
    def count(self) -> int:
        """The number of the student's steps."""
        return self.student_steps or len(self.times or range(4))

    @property
    def discriminator(self) -> Literal["fake", "teacher", "none"]:
        """What `gan` comes to."""
        return self.gan or ("fake" if self.data and self.input == "simulation" else "none")

    def wrong(self) -> dict[str, bool]:
        """Possible conflicts between keys: message -> whether there is one."""
        times, real = self.times or [], self.discriminator != "none" or self.input == "data"
        return {
            f"t_low {self.t_low} is not below t_high {self.t_high}": self.t_low >= self.t_high,
            f"times {self.times}: they must decrease": any(a <= b for a, b in zip(times, times[1:], strict=False)),
            f"times has {len(times)} numbers, and student_steps is {self.count}": bool(times) and len(times) != self.count,
            f"gan {self.gan} needs real images: data=FOLDER": self.discriminator != "none" and not self.data,
            "input data needs real images: data=FOLDER": self.input == "data" and not self.data,
            "data has no use here: real images are for gan and input=data": bool(self.data) and not real,
            "matching_weight and guidance_weight 0 leave the student without a teacher": not (self.matching_weight or self.guidance_weight),
            "init_pairs and init_steps go together: give both or none": bool(self.init_pairs) != bool(self.init_steps),
            f"init_pairs: pairs of noise and pictures are for a student of one step, not of {self.count}": bool(self.init_pairs)
            and self.count > 1,
            "classes: not with data, whose real images are of all classes": bool(self.classes and self.data),
            "init_pairs: not with student, which has begun already": bool(self.init_pairs and self.student),
            "text live: the text of init_pairs' prompts is stored beside them; leave it out, or give other prompts": self.text == "live"
            and bool(self.init_pairs)
            and not self.prompts,
        } | {
            f"{key} is for {what}": True
            for keys, what, there in (
                (("gan_weight", "critic_weight", "r1_weight"), "a discriminator: gan=fake", self.discriminator != "none"),
                (("init_loss",), "init_pairs", bool(self.init_pairs)),
                (("flip", "variants"), "real images: data=FOLDER", bool(self.data)),
            )
            if not there
            for key in self.changed(*keys)
        }

    @model_validator(mode="after")
    def _consistent(self) -> DMD2Config:
        if wrong := [problem for problem, there in self.wrong().items() if there]:
            raise ValueError("; ".join(wrong))
        return self

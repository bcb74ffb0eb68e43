"""Options of the commands that use models: pairs, sample, trace, evaluate, edit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from distill_cli.config.base import (
    Classes,
    Compile,
    Config,
    Count,
    Name,
    Names,
    Place,
    Positive,
    Precision,
    Range,
    Rate,
    Solver,
    Text,
    check_range,
)
from distill_cli.config.guides import GuidesConfig


class GenerateConfig(GuidesConfig):
    """How images are made with a model; shared by pairs and sample."""

    num: Positive = Field(1000, description="number of images; default with prompts: one for each, or images_per_prompt")
    prompts: Name | None = Field(None, description="text-to-image: a file (lines, JSON or a table), - (standard input), or a built-in set")
    negative_prompt: Text | None = Field(None, description="text-to-image: negative prompt, from which guidance leads away")
    resolution: Positive | None = Field(None, description="latent models: pixels of the images' shorter side; default the model's own")
    classes: Classes = Field(None, description="classes of the images in turn, such as 0-9 or 3,5; default all, balanced")
    solver: Solver | None = Field(None, description="ODE solver; default the model's own")
    steps: Positive | None = Field(None, description="solver steps (Heun: 2N - 1 network evaluations); default the model's own")
    guidance_scale: Rate | None = Field(None, description="scale s of guidance: uncond + s (cond - uncond); default the model's own")
    guidance_calls: Literal[1, 2] = Field(1, description="guidance: 1 call with twice the batch, or 2 calls with half the memory")
    batch_size: Positive = Field(100, description="images in a batch; 8, unless set, from 256 pixels on")
    precision: Precision = Field("no", description="number type of the network's arithmetic; no: float32")


class BatchesConfig(GenerateConfig):
    """How many batches are made fast; shared by pairs and sample."""

    compile: Compile = Field(
        "none", description="torch.compile of what runs, denoiser and decoder: by block or whole, on a GPU as a CUDA graph; slow to begin"
    )
    channels_last: bool = Field(False, description="store pictures inside the networks with their channels last, which may be faster")


class PairsConfig(BatchesConfig):
    """distill pairs"""

    teacher: Name = Field("digits", description="the model: a name of `distill models ls`, a folder, a run, or a hub id")
    guidance_range: Range | None = Field(
        None, description="LOW,HIGH: guidance scales, each pair's own, for a student with a dial; default one scale"
    )
    shard_size: Positive = Field(500, description="pairs in a shard, which is a file")
    dtype: Literal["float32", "float16"] = Field("float16", description="number type of stored images, latents and text embeddings")

    @model_validator(mode="after")
    def _consistent(self) -> PairsConfig:
        check_range(self.guidance_range, self.guidance_scale)
        return self


class SampleConfig(BatchesConfig):
    """distill sample"""

    model: Name = Field("digits", description="the model: a name of `distill models ls`, a folder, a run, or a hub id")
    images_per_prompt: Positive = Field(1, description="images for each prompt, one after another")
    format: Literal["png", "npz"] | None = Field(
        None, description="a PNG for each image, or one samples.npz (arr_0 uint8 N,H,W,3; arr_1 labels); default png, where it can be drawn"
    )
    decoder: Name | None = Field(None, description="latent models: an AutoencoderTiny (folder or hub id) that decodes; default their own")
    tiles: Positive | None = Field(
        None, description="latent models: decode in overlapping tiles of so many pixels a side, with less memory; default whole"
    )
    times: Text | None = Field(None, description="few-step students: index:0,22 (points of the grid), sigma:80,1.4, even; default its own")
    search_times: Annotated[int, Field(ge=2)] | None = Field(None, description="only find a consistency student's best times for N steps")
    classifier: Name = Field("digits", description="search_times: the classifier in whose features the Fréchet distance is measured")
    grid: bool = Field(False, description="also write grid.png, a picture of the first 100 images")
    scale: Positive | None = Field(None, description="enlargement of images in grid.png; default to 64 pixels or more, 256 with captions")

    @model_validator(mode="after")
    def _one_thing(self) -> SampleConfig:
        given = self.changed("times", "steps", "solver", "guidance_scale", "grid", "format", "compile", "channels_last", "out")
        if self.search_times and given:
            names = " and ".join(f"--{key.replace('_', '-')}" for key in given)
            raise ValueError(f"--search-times makes no samples, so {names} {'has' if len(given) == 1 else 'have'} no use here")
        if not self.search_times and self.changed("classifier"):
            raise ValueError("classifier is used by search_times alone")
        return self


Network = Literal["classifier", "inception", "dinov2", "clip"]
Measured = Literal[
    "accuracy", "frechet", "kid", "inception-score", "precision-recall", "density-coverage", "diversity", "memorisation"
]  # fmt: skip


Models = Annotated[list[Name], BeforeValidator(lambda one: [one] if isinstance(one, str) else one), Field(min_length=1)]
"""Names of models; one flag each."""
Shown = Literal["forward", "reverse", "animation", "trajectories", "score", "map"]


class TraceConfig(GenerateConfig):
    """distill trace"""

    model: Models = Field(["digits"], description="models as for sample (NAME@STEPS: in that many steps); one flag each")
    data: Name | None = Field(None, description="real data for the forward process: a built-in set or a folder; default none")
    show: Annotated[list[Shown] | None, Names] = Field(
        None, description="forward, reverse, animation; of points also trajectories, score, map; default: all that can be shown"
    )
    num: Positive = Field(4, description="number of noises, each with files of its own; points: default 1000, all in one plot")
    every: Positive | None = Field(None, description="steps from one picture to the next; default: so many that a row has 10 pictures")
    fps: Annotated[int, Field(ge=1, le=50)] = Field(6, description="pictures a second of the animation")


class EvaluateConfig(Config):
    """distill evaluate"""

    model: Models = Field(
        ["digits"],
        description="models as for sample (NAME@STEPS: in that many steps), or finished pictures: .npz files, folders; one flag each",
    )
    data: Name = Field("digits", description="the real images: a built-in set, a folder, or an .npz of pictures or of statistics")
    resolution: Positive | None = Field(None, description="image width in pixels to which folders are cropped; default as they are")
    features: Annotated[list[Network], Names, Field(min_length=1)] = Field(
        ["classifier"], description="networks that see the pictures: classifier, inception, dinov2, clip; one, or several"
    )
    measures: Annotated[list[Measured] | None, Names] = Field(
        None,
        description="accuracy, frechet, kid, inception-score, precision-recall, density-coverage, diversity, memorisation; default: some",
    )
    attributes: Annotated[list[Name], Names] = Field(
        [], description="judges of each picture and what was asked for: shapes, or your own module:function"
    )
    inception: Place | None = Field(None, description="torch-fidelity's file of Inception's weights; default the one in torch's cache")
    dinov2: Name | None = Field(None, description="a DINOv2 of transformers: a folder or a hub id")
    kid_subsets: Positive = Field(100, description="kid: number of subsets, whose mean and standard deviation are given")
    kid_subset_size: Annotated[int, Field(ge=2)] | None = Field(
        None, description="kid: pictures in a subset; default 1000, or all where there are fewer"
    )
    bootstrap: Count = Field(10, description="frechet: number of resamples, whose standard deviation is given; 0: none")
    save_statistics: Place | None = Field(None, description="write mean and covariance of the real images' features to this .npz")
    classifier: Name = Field("digits", description="classifier whose features are used: built in, or of `distill classifier`")
    prompts: Name | None = Field(None, description="text-to-image: prompts as for sample; measured by clip, attributes, features")
    images_per_prompt: Positive = Field(1, description="images for each prompt, one after another")
    negative_prompt: Text | None = Field(None, description="text-to-image: negative prompt, from which guidance leads away")
    guidance_scale: Rate | None = Field(None, description="text-to-image: guidance scale of teachers; default each one's own")
    clip: Name | None = Field(None, description="the CLIP model (folder or hub id) that scores pictures of prompts, or sees pictures")
    num: Positive = Field(2000, description="images of each model")
    seed: int = Field(7, ge=0, lt=2**63, description="seed of the noise; not that of the pairs, whose noise a student has seen")
    classes: Classes = Field(None, description="classes of the images in turn; default all, balanced")
    neighbours: Positive = Field(3, description="precision and recall: number k of nearest neighbours")
    batch_size: Positive | None = Field(None, description="images in a batch; default 100, or 8 for text-to-image from 256 pixels on")
    precision: Precision = Field("no", description="number type of the models' arithmetic; no: float32")

    @model_validator(mode="after")
    def _of_prompts(self) -> EvaluateConfig:
        of_prompts = ["clip"] * ("clip" not in self.features) + ["images_per_prompt", "negative_prompt", "guidance_scale"]
        if self.prompts is None and (given := self.changed(*of_prompts)):
            raise ValueError(f"{given[0]} needs prompts")
        if self.prompts is not None and (given := self.changed("classifier", "classes")):
            raise ValueError(f"{given[0]} is not for prompts: they are measured by clip")
        if self.prompts is not None and "classifier" in self.features and (given := self.changed("data", "features", "measures")):
            raise ValueError(f"{given[0]} is not for prompts unless features are of inception, dinov2 or clip")
        return self


KEYS = {"inpaint": {"input", "mask"}, "colorize": {"input"}, "superres": {"input", "patch"}, "sdedit": {"input"}, "interpolate": {"frames"}}
"""The tasks, and which of the options that not all of them have each one has."""


class EditConfig(Config):
    """distill edit: a consistency student edits pictures that it was never trained to edit (Song et al. 2303.01469, section 6.3)"""

    task: Literal["inpaint", "colorize", "superres", "sdedit", "interpolate"] = Field("interpolate", description="the kind of edit")
    model: Name = Field("runs/cm", description="a consistency student: a folder, a run, or a hub id")
    input: Place | None = Field(None, description="a picture or a folder of pictures; interpolate takes none")
    mask: Place | None = Field(None, description="inpaint: a picture of the input's size, white where new content goes")
    patch: Annotated[int, Field(ge=2)] = Field(4, description="superres: factor of enlargement, in each direction")
    times: Text | None = Field(
        None, description="times as for sample; default every fourth of 40 points (sdedit: from the 20th on; interpolate: the model's own)"
    )
    classes: Classes = Field(None, description="classes of the pictures in turn; default the null class, if the student has learned one")
    frames: Annotated[int, Field(ge=2)] = Field(10, description="interpolate: number of pictures, from one noise to another")
    batch_size: Positive = Field(100, description="pictures in a batch")
    scale: Positive | None = Field(None, description="enlargement of side-by-side.png; default to 64 pixels a picture or more")

    @model_validator(mode="after")
    def _needed(self) -> EditConfig:
        own = KEYS[self.task]
        wrong = [f"{self.task} takes no {key}" for key in self.changed("input", "mask", "patch", "frames") if key not in own]
        wrong += [f"{self.task} needs {key}" for key in ("input", "mask") if key in own and getattr(self, key) is None]
        if "frames" in own and self.classes is not None and len(self.classes) > 1:
            wrong.append(f"interpolate takes one class, not {len(self.classes)}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

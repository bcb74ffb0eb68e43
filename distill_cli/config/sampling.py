"""Options of the commands that use models: pairs, sample, evaluate, edit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distill_cli.config.base import Classes, Config, Name, Place, Positive, Precision, Rate, Solver, Text


class GenerateConfig(Config):
    """How images are made with a model; shared by pairs and sample."""

    num: Positive = Field(1000, description="images to make; default with prompts: images_per_prompt for each")
    prompts: Name | None = Field(
        None, description="text-to-image: a file (lines, JSON or a table), - for standard input, or a built-in set"
    )
    negative_prompt: Text = Field("", description="text-to-image: text that guidance leads away from")
    resolution: Positive | None = Field(None, description="image width in pixels, for latent models; default the model's own")
    classes: Classes = Field(None, description="labels in turn, such as 0-9 or 3,5; default all, balanced")
    solver: Solver | None = Field(None, description="ODE solver; default the model's own")
    steps: Positive | None = Field(None, description="solver steps (Heun: 2N - 1 network evaluations); default the model's own")
    guidance_scale: Rate | None = Field(None, description="guidance: uncond + scale (cond - uncond); default the model's own")
    guidance_calls: Literal[1, 2] = Field(1, description="guidance: 1 call with twice the batch, or 2 calls with half the memory")
    batch_size: Positive = Field(100, description="images in a batch; default 8 from 256 pixels on")
    precision: Precision = Field("no", description="arithmetic of the network")


class PairsConfig(GenerateConfig):
    """distill pairs"""

    teacher: Name = Field("digits", description="a name of `distill models ls`, a folder, or a hub id")
    shard_size: Positive = Field(500, description="pairs in a file")
    dtype: Literal["float32", "float16"] = Field("float16", description="type of the stored images or latents, and of text embeddings")


class SampleConfig(GenerateConfig):
    """distill sample"""

    model: Name = Field("digits", description="a name of `distill models ls`, a folder, a run, or a hub id")
    images_per_prompt: Positive = Field(1, description="images for each prompt, one after another")
    format: Literal["png", "npz"] = Field("png", description="a PNG for each image, or one samples.npz (arr_0 uint8 N,H,W,3; arr_1 labels)")
    times: Text | None = Field(None, description="few-step students: index:0,22 (points of the grid), sigma:80,1.4, even; default its own")
    search_times: Annotated[int, Field(ge=2)] | None = Field(None, description="find a few-step student's best times for this many steps")
    classifier: Name = Field("digits", description="search_times: classifier in whose features the Fréchet distance is measured")
    grid: bool = Field(False, description="also write grid.png, the first 100 images")
    scale: Positive | None = Field(None, description="enlargement of pictures in grid.png; default to 64 pixels or more, 256 with captions")

    @model_validator(mode="after")
    def _one_thing(self) -> SampleConfig:
        unused = ("times", "steps", "solver", "guidance_scale", "grid", "format", "out") if self.search_times else ("classifier",)
        given = [key for key in unused if getattr(self, key) != type(self).model_fields[key].default]
        if self.search_times and given:
            names = " and ".join(f"--{key.replace('_', '-')}" for key in given)
            raise ValueError(f"--search-times makes no samples, so {names} {'has' if len(given) == 1 else 'have'} no use here")
        if given:
            raise ValueError("classifier is used by search_times alone")
        return self


def _listed(value: Any) -> Any:
    """Take a single name for a list of one."""
    return [value] if isinstance(value, str) else value


class EvaluateConfig(Config):
    """distill evaluate"""

    model: Annotated[list[Name], BeforeValidator(_listed), Field(min_length=1)] = Field(
        ["digits"], description="models as for sample (NAME@STEPS samples in that many steps), or .npz files of images"
    )
    data: Name = Field("digits", description="the real images: a built-in set or a folder")
    resolution: Positive | None = Field(None, description="image width in pixels; a folder needs it, a built-in set has its own")
    classifier: Name = Field("digits", description="whose features are measured: built in, or a folder of `distill classifier`")
    prompts: Name | None = Field(None, description="text-to-image: prompts as for sample; these models are measured by clip alone")
    images_per_prompt: Positive = Field(1, description="images for each prompt, one after another")
    negative_prompt: Text = Field("", description="text-to-image: text that guidance leads away from")
    guidance_scale: Rate | None = Field(None, description="text-to-image: guidance scale of the teachers; default their own")
    clip: Name | None = Field(None, description="text-to-image: the CLIP model (folder or hub id) that gives the score")
    num: Positive = Field(2000, description="images of each model")
    seed: int = Field(7, ge=0, lt=2**63, description="seed of the noise; not that of the pairs, whose noise a student has seen")
    classes: Classes = Field(None, description="labels in turn; default all, balanced")
    neighbours: Positive = Field(3, description="precision and recall: k of the k-th nearest neighbour")
    batch_size: Positive | None = Field(None, description="images in a batch; default 100, with text 8 from 256 pixels on")
    precision: Precision = Field("no", description="arithmetic of the models")

    @model_validator(mode="after")
    def _of_prompts(self) -> EvaluateConfig:
        for keys, ours in (
            (("clip", "images_per_prompt", "negative_prompt", "guidance_scale"), True),
            (("data", "classifier", "classes"), False),
        ):
            given = [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]
            if given and ours == (self.prompts is None):
                raise ValueError(f"{given[0]} needs prompts" if ours else f"{given[0]} is not for prompts: they are measured by clip")
        return self


EDIT_KEYS = {
    "input": ("inpaint", "colorize", "superres", "sdedit"),
    "mask": ("inpaint",),
    "patch": ("superres",),
    "frames": ("interpolate",),
}
"""Options that only some tasks have, and their tasks."""


class EditConfig(Config):
    """distill edit: a consistency student edits pictures that it was never trained to edit (Song et al. 2303.01469, section 6.3)"""

    task: Literal["inpaint", "colorize", "superres", "sdedit", "interpolate"] = Field("interpolate", description="the kind of edit")
    model: Name = Field("runs/cm", description="a consistency student: a folder, a run, or a hub id")
    input: Place | None = Field(None, description="a picture or a folder of pictures; interpolate takes none")
    mask: Place | None = Field(None, description="inpaint: a picture of the input's size, white where new content goes")
    patch: Annotated[int, Field(ge=2)] = Field(4, description="superres: the enlargement, in each direction")
    times: Text | None = Field(
        None, description="as for sample; default every fourth of 40 points (sdedit: from the 20th on), for interpolate the model's own"
    )
    classes: Classes = Field(None, description="labels of the pictures in turn; default: without, if the model allows")
    frames: Annotated[int, Field(ge=2)] = Field(10, description="interpolate: pictures from one noise to the next")
    batch_size: Positive = Field(100, description="pictures in a batch")
    scale: Positive | None = Field(None, description="enlargement of the side-by-side picture; default to 64 pixels a picture or more")

    @model_validator(mode="after")
    def _needed(self) -> EditConfig:
        fields = type(self).model_fields
        given = [key for key, tasks in EDIT_KEYS.items() if self.task not in tasks and getattr(self, key) != fields[key].default]
        needed = [key for key in ("input", "mask") if self.task in EDIT_KEYS[key] and getattr(self, key) is None]
        wrong = [f"{self.task} takes no {key}" for key in given] + [f"{self.task} needs {key}" for key in needed]
        if self.task == "interpolate" and self.classes is not None and len(self.classes) > 1:
            wrong.append(f"interpolate takes one class, not {len(self.classes)}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

"""Options of the commands that use models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distill_cli.config.base import (
    Classes,
    Config,
    Name,
    Place,
    Positive,
    Precision,
    Rate,
    Solver,
    Text,
)


class GenerateConfig(Config):
    """What pairs and sample share: how images come out of a model."""

    num: Positive = Field(1000, description="images; with prompts by default each once, or images_per_prompt times")
    prompts: Name | None = Field(
        None, description="of a model with text: a file of lines, JSON or a table, - for standard input, or a built-in set"
    )
    negative_prompt: Text = Field("", description="of a model with text: what guidance leads away from")
    resolution: Positive | None = Field(None, description="pixels of a latent model's pictures; default the model's own")
    classes: Classes = Field(None, description="labels in turn, such as 0-9 or 3,5; default all, balanced")
    solver: Solver | None = Field(None, description="default the model's own")
    steps: Positive | None = Field(None, description="solver steps (Heun: 2N - 1 network evaluations); default the model's own")
    guidance_scale: Rate | None = Field(None, description="uncond + scale (cond - uncond); default the model's own")
    guidance_calls: Literal[1, 2] = Field(1, description="one call of twice the batch, or two of half the memory")
    batch_size: Positive = Field(100, description="images at a time; default 8 from 256 pixels")
    precision: Precision = Field("no", description="of the network's arithmetic")


class PairsConfig(GenerateConfig):
    """distill pairs"""

    teacher: Name = Field("digits", description="a name of `distill models ls`, a folder, or a hub id")
    shard_size: Positive = Field(500, description="pairs a file")
    dtype: Literal["float32", "float16"] = Field("float16", description="of the stored images, or latents, and text embeddings")


class SampleConfig(GenerateConfig):
    """distill sample"""

    model: Name = Field("digits", description="a name of `distill models ls`, a folder, a run, or a hub id")
    images_per_prompt: Positive = Field(1, description="pictures of each prompt, one after another")
    format: Literal["png", "npz"] = Field("png", description="a file an image, or one samples.npz (arr_0 uint8 N,H,W,3; arr_1 labels)")
    times: Text | None = Field(None, description="a student's: index:0,22 (points of its grid), sigma:80,1.4, even; default its own")
    search_times: Annotated[int, Field(ge=2)] | None = Field(None, description="a student's best times for so many steps")
    classifier: Name = Field("digits", description="search_times: in whose features the Fréchet distance is measured")
    grid: bool = Field(False, description="also grid.png of the first 100 images")
    scale: Positive | None = Field(None, description="enlargement of the grid's pictures; default to 64 pixels or more, 256 with captions")

    @model_validator(mode="after")
    def _one_thing(self) -> SampleConfig:
        unused = ("times", "steps", "solver", "guidance_scale", "grid", "format", "out") if self.search_times else ("classifier",)
        given = [key for key in unused if getattr(self, key) != type(self).model_fields[key].default]
        if self.search_times and given:
            names = " and ".join(f"--{key.replace('_', '-')}" for key in given)
            raise ValueError(f"--search-times makes no samples, so {names} {'has' if len(given) == 1 else 'have'} no use here")
        if given:
            raise ValueError("classifier is for search_times: nothing else measures in its features")
        return self


def _listed(value: Any) -> Any:
    """One name is a list of one."""
    return [value] if isinstance(value, str) else value


class EvaluateConfig(Config):
    """distill evaluate"""

    model: Annotated[list[Name], BeforeValidator(_listed), Field(min_length=1)] = Field(
        ["digits"], description="models as for sample, NAME@STEPS for other steps than its own; or an npz of images"
    )
    data: Name = Field("digits", description="the real images: a built-in set or a folder")
    resolution: Positive | None = Field(None, description="pixels; default the set's own; a folder needs it")
    classifier: Name = Field("digits", description="whose features are measured: a built-in one, or a folder of `distill classifier`")
    prompts: Name | None = Field(None, description="of models with text, which are measured by clip alone: as for sample")
    images_per_prompt: Positive = Field(1, description="pictures of each prompt, one after another")
    negative_prompt: Text = Field("", description="of models with text: what guidance leads away from")
    guidance_scale: Rate | None = Field(None, description="of teachers with text; default their own")
    clip: Name | None = Field(None, description="of models with text: a CLIP model, a folder or hub id, whose score is measured")
    num: Positive = Field(2000, description="images of each model")
    seed: int = Field(7, ge=0, lt=2**63, description="of their noise; another than the pairs', whose noise a student knows")
    classes: Classes = Field(None, description="labels in turn; default all, balanced")
    neighbours: Positive = Field(3, description="of precision and recall")
    batch_size: Positive | None = Field(None, description="images at a time; default 100, with text 8 from 256 pixels")
    precision: Precision = Field("no", description="of the models' arithmetic")

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
"""The tasks of the options that not every edit has."""


class EditConfig(Config):
    """distill edit: a consistency student edits pictures that it was never trained to edit (Song et al. 2303.01469, section 6.3)"""

    task: Literal["inpaint", "colorize", "superres", "sdedit", "interpolate"] = Field("interpolate", description="what is done")
    model: Name = Field("runs/cm", description="a consistency student: a folder, a run, or a hub id")
    input: Place | None = Field(None, description="a picture or a folder of them; interpolate takes none")
    mask: Place | None = Field(None, description="inpaint: a picture of the input's size, white where it is painted anew")
    patch: Annotated[int, Field(ge=2)] = Field(4, description="superres: pixels of the model on a pixel of the input, each way")
    times: Text | None = Field(
        None, description="as for sample; default every fourth of 40 points, sdedit from the 20th, interpolate its own"
    )
    classes: Classes = Field(None, description="labels of the pictures in turn; default none where the model can do without")
    frames: Annotated[int, Field(ge=2)] = Field(10, description="interpolate: pictures from one noise to the next")
    batch_size: Positive = Field(100, description="pictures at a time")
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

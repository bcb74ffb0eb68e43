"""The CLIP score (Hessel et al. 2104.08718) of text-to-image models: how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill_cli import launch
from distill_cli.config import PROMPT_SETS, EvaluateConfig, SampleConfig
from distill_cli.data.kinds import PICTURES
from distill_cli.data.pictures import to_uint8
from distill_cli.data.prompts import open_prompts
from distill_cli.errors import UsageError
from distill_cli.evaluate.attributes import judge, judged
from distill_cli.evaluate.measures import share
from distill_cli.evaluate.networks import CLIP
from distill_cli.evaluate.page import SPREAD, Strip
from distill_cli.evaluate.pictures import Against
from distill_cli.evaluate.report import (
    SAMPLED,
    Columns,
    Evaluation,
    markdown,
    opened,
    reference_images,
    resampled,
    samples_of,
    shared,
    split,
    worst_of,
)
from distill_cli.evaluate.sources import Pictures, Source
from distill_cli.models import clip as clip_models
from distill_cli.models import load
from distill_cli.models.model import LARGE, Model
from distill_cli.runs import versions
from distill_cli.sample import batch

SHOWN, PART = 16, 32
COLUMNS: Columns = {"CLIP score": ("clip_score", ".2f")}
USUAL = "shapes-clip"
"""The built-in CLIP model of the built-in prompts."""


def evaluate(config: EvaluateConfig, say_read: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Sample the prompts with each model in `config.model`, and write the report and picture.png; returns the report.

    Finished pictures, of any program, are in the order of the prompts. `say_read` is called with what was read, before sampling. Processes
    share the work. Images stay on disk, one model is in memory.
    """
    if config.clip is None and config.prompts in PROMPT_SETS and USUAL in clip_models.names():
        config = config.model_copy(update={"clip": USUAL})
    assert config.prompts is not None
    against = config.features != ["classifier"]
    if config.clip is None and not config.attributes and not against:
        raise UsageError("--prompts: pictures of prompts are measured by a CLIP model: none given", "clip=FOLDER or a hub id")
    prompts = open_prompts(config.prompts)
    count = count_of(config, len(prompts))
    where = launch.device(config.device)
    clip = None if config.clip is None else CLIP(config.clip, where)
    for name in config.attributes:
        judge(name)
    there = bool(config.changed("data"))
    reference = Against(config, reference_images(config) if there else None, there) if against else None
    if "diversity" in (config.measures or ()) and config.images_per_prompt < 2:
        raise UsageError("measures diversity: one image for each prompt", "images_per_prompt=N, N from 2 on")
    # errors of any model come before sampling
    finished = [opened(spec, PICTURES, config.resolution) for spec in config.model]
    said = []
    for spec, source in zip(config.model, finished, strict=True):
        if source is None:
            model = prepared(spec, config, prompts)[0]
            shape, images, about = PICTURES.written(model.shape), count, f"{spec} ({model.about})"
        else:
            shape, images, about = source.shape, len(source), source.about
        said.append(about)
        if reference is not None:
            reference.refuse(spec, images, shape)
    say_read(prompts, *([reference.read] if reference else []), *said)
    folder = Evaluation(config)
    if reference is not None:
        reference.begin()
    columns: Columns = COLUMNS if clip else {}
    rows: list[dict[str, Any]] = []
    pictures: list[tuple[str, Any]] = []
    worst: list[Strip] = []
    for k, (spec, source) in enumerate(zip(config.model, finished, strict=True)):
        cost = {"network_evaluations": None, "images_per_second": None}
        if source is None:
            source, cost = sampled(config, folder, k, prompts, count)
        else:
            folder.cost(spec, cost)
        which = torch.tensor([i // config.images_per_prompt % len(prompts) for i in range(len(source))])
        row: dict[str, Any] = {"model": spec, "images": len(source), **cost}
        if clip is not None:
            part = partial(scores, clip, source, which, prompts)
            (found,) = shared(len(source), PART, part, where)
            row["clip_score"], row["clip_score" + SPREAD] = share(found)
        values, more, lowest = judged(config.attributes, source, lambda i, which=which: prompts[int(which[i])], where)  # type: ignore[misc]
        row, columns = row | values, columns | more
        lowest = [*([("CLIP score", found)] if clip else []), *lowest]
        worst += worst_of(spec, source, lowest, lambda i, which=which: prompts[int(which[i])])  # type: ignore[misc]
        if reference is not None:
            source.labels = which
            row, columns = row | reference.measure(source), columns | reference.columns
        rows.append(row)
        shown = to_uint8(source.batch(range(min(len(source), SHOWN))))
        title = f": CLIP score {row['clip_score']:.2f}" if clip else ""
        pictures.append((f"{spec}{title}", shown))
    if reference is not None:
        rows += resampled(reference, rows, SAMPLED | columns)[0]
    warnings = [] if reference is None else [text for row in rows for text in reference.warnings(row, rows)]
    report: dict[str, Any] = {
        "prompts": config.prompts,
        "clip": config.clip,
        "seed": config.seed,
        "rows": rows,
        "warnings": warnings,
        "versions": versions(),
    }
    report |= {"columns": columns} | ({} if reference is None else {"reference": reference.text, "features": reference.about})
    said = [prompts[int(which[i])] for i in range(len(shown))]
    folder.finish(report, table(report), pictures, columns=8, scale=max(1, 64 // shown.shape[1]), captions=said, worst=worst)
    return report


def scores(clip: CLIP, source: Source, which: Tensor, prompts: Sequence[str], part: range) -> tuple[Tensor]:
    """(B,) the CLIP scores of pictures `part`; picture i has prompt `which[i]`."""
    return (clip.scores(to_uint8(source.batch(part)), [prompts[int(which[i])] for i in part]),)


def sampled(config: EvaluateConfig, folder: Evaluation, k: int, prompts: Sequence[str], count: int) -> tuple[Source, dict[str, Any]]:
    """The pictures that the k-th model makes of the prompts, and what they cost."""
    spec = config.model[k]
    model, steps, scale = prepared(spec, config, prompts)
    options = config.model_dump(include={"seed", "device", "precision", "prompts", "images_per_prompt", "resolution"}) | {"num": count}
    size = config.batch_size or (100 if model.pixels < LARGE else 8)
    negative, samples = model.conditioner.negative, samples_of(folder.folder, k, spec)
    asked = SampleConfig(model=spec, steps=steps, guidance_scale=scale, batch_size=size, negative_prompt=negative, **options)
    cost = folder.cost(spec, batch.sample(asked, model, samples))
    return Pictures(samples, "--model"), cost


def prepared(spec: str, config: EvaluateConfig, prompts: Sequence[str]) -> tuple[Model, int | None, float | None]:
    """A model with the prompts, its steps and guidance scale. What a student has built in it is not asked for: its scale is None."""
    name, steps = split(spec)
    model = load(name, steps)
    student = model.sampler.guidance != "outside"
    model = model.with_prompts(prompts, None if student else config.negative_prompt, config.images_per_prompt)
    if config.resolution is not None:
        model = model.with_resolution(config.resolution)
    scale = None if model.sampler.guidance == "inside" else config.guidance_scale
    model.with_defaults(None, steps, scale)
    return model, steps, scale


def count_of(config: EvaluateConfig, prompts: int) -> int:
    """Images for each model: the number asked for, else images_per_prompt for each prompt."""
    return config.num if "num" in config.model_fields_set else prompts * config.images_per_prompt


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, followed by what was measured and any warnings."""
    score = f"CLIP score: 100 max(cos, 0) by {report['clip']}, prompts" if report["clip"] else "Prompts"
    about = [f"{score} {report['prompts']}, seed {report['seed']}."]
    if "reference" in report:
        about.append(f"Reference: {report['reference']}. {report['features']}.")
    warnings = [f"Warning: {warning}." for warning in report["warnings"]]
    return "\n".join([*markdown(SAMPLED | report["columns"], report["rows"]), "", " ".join(about), *warnings])

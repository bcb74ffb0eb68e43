"""The CLIP score (Hessel et al. 2104.08718) of text-to-image models: how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from distill_cli import launch
from distill_cli.config import EvaluateConfig, SampleConfig
from distill_cli.data.prompts import open_prompts
from distill_cli.errors import UsageError
from distill_cli.evaluate.networks import CLIP
from distill_cli.evaluate.report import SAMPLED, Evaluation, markdown, samples_of, shared, split
from distill_cli.models import load
from distill_cli.models.model import LARGE, Model
from distill_cli.runs import versions
from distill_cli.sample import batch

SHOWN, PART = 16, 32
COLUMNS = SAMPLED | {"CLIP score": ("clip_score", ".2f")}


def evaluate(config: EvaluateConfig, say_read: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Sample the prompts with each model in `config.model`, and write report.json, report.md and picture.png; returns the report.

    `say_read` is called with what was read, before sampling. Processes share the work. Images stay on disk, one model is in memory.
    """
    assert config.prompts is not None
    if config.clip is None:
        raise UsageError("--prompts: pictures of prompts are measured by a CLIP model: none given", "clip=FOLDER or a hub id")
    prompts = open_prompts(config.prompts)
    count = count_of(config, len(prompts))
    where = launch.device(config.device)
    clip = CLIP(config.clip, where)
    # errors of any model come before sampling
    said = [f"{spec} ({prepared(spec, config, prompts)[0].about})" for spec in config.model]
    say_read(prompts, *said)
    folder = Evaluation(config)
    options = config.model_dump(include={"seed", "device", "precision", "prompts", "images_per_prompt", "resolution"}) | {"num": count}
    rows, pictures = [], []
    for k, spec in enumerate(config.model):
        model, steps, scale = prepared(spec, config, prompts)
        size = config.batch_size or (100 if model.pixels < LARGE else 8)
        negative, samples = model.conditioner.negative, samples_of(folder.folder, k, spec)
        asked = SampleConfig(model=spec, steps=steps, guidance_scale=scale, batch_size=size, negative_prompt=negative, **options)
        cost = folder.cost(spec, batch.sample(asked, model, samples))

        def scores(part: range, samples: Path = samples) -> tuple[Tensor]:
            return (clip.scores(pictures_of(samples, part), [prompts[i // config.images_per_prompt % len(prompts)] for i in part]),)

        rows.append({"model": spec, "images": count, **cost, "clip_score": shared(count, PART, scores, where)[0].mean().item()})
        shown = pictures_of(samples, range(min(count, SHOWN)))
        pictures.append((f"{spec}: CLIP score {rows[-1]['clip_score']:.2f}", shown))
        del model  # frees memory for the next one
    report = {"prompts": config.prompts, "clip": config.clip, "seed": config.seed, "rows": rows, "warnings": [], "versions": versions()}
    folder.finish(report, table(report), pictures, columns=8, scale=max(1, 64 // shown.shape[1]))
    return report


def prepared(spec: str, config: EvaluateConfig, prompts: Sequence[str]) -> tuple[Model, int | None, float | None]:
    """A model with the prompts, its steps and guidance scale. A student has guidance and negative prompt built in: its scale is None."""
    name, steps = split(spec)
    model = load(name, steps)
    student = model.sampler.guidance != "outside"
    model = model.with_prompts(prompts, None if student else config.negative_prompt, config.images_per_prompt)
    if config.resolution is not None:
        model = model.with_resolution(config.resolution)
    scale = None if student else config.guidance_scale
    model.with_defaults(None, steps, scale)
    return model, steps, scale


def count_of(config: EvaluateConfig, prompts: int) -> int:
    """Images for each model: the number asked for, else images_per_prompt for each prompt."""
    return config.num if "num" in config.model_fields_set else prompts * config.images_per_prompt


def pictures_of(folder: Path, part: range) -> np.ndarray:
    """Images `part` (B, H, W, 3) uint8 from a folder of samples."""
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png").convert("RGB")) for i in part])


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    about = f"CLIP score: 100 max(cos, 0) by {report['clip']}, prompts {report['prompts']}, seed {report['seed']}."
    return "\n".join([*markdown(COLUMNS, report["rows"]), "", about])

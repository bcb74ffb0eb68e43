"""The CLIP score (Hessel et al. 2104.08718) of text-to-image models: how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill_cli import launch
from distill_cli.config import EvaluateConfig, SampleConfig
from distill_cli.data.prompts import open_prompts
from distill_cli.errors import DistillError, UsageError, reason
from distill_cli.evaluate.report import SAMPLED, Evaluation, markdown, samples_of, shared, split
from distill_cli.models import load
from distill_cli.models.model import LARGE, Model
from distill_cli.models.parts import load_network
from distill_cli.models.sources.hub import find
from distill_cli.runs import versions
from distill_cli.sample import batch

SHOWN, PART = 16, 32
CLIP_FILES = ("*.json", "merges.txt", "model.safetensors")
COLUMNS = {"CLIP score": ("clip_score", ".2f")}
WORST = 8
"""Pictures with the lowest scores that the page shows of each model."""


class CLIP:
    """transformers' CLIPModel and its processor, from a folder or a hub id, which is downloaded on first use."""

    def __init__(self, name: str, where: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        folder = find(name, CLIP_FILES, f"clip {name}")
        self.model = load_network(CLIPModel, folder, "model").to(where)
        try:
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many types for a missing folder or network
            hint = "a folder, or a hub id such as openai/clip-vit-large-patch14"
            raise DistillError(f"clip {name}: no CLIP model ({reason(error)})", hint) from error

    @torch.no_grad()
    def scores(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """(B,) 100 max(cos, 0) between uint8 images (B, H, W, 3) and their prompts, truncated to the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        given = self.processor(
            text=list(prompts), images=list(images), return_tensors="pt", padding="max_length", max_length=length, truncation=True
        ).to(self.model.device)
        made = self.model(**given)
        cosines = torch.nn.functional.cosine_similarity(made.image_embeds.float(), made.text_embeds.float(), dim=1)
        return 100 * cosines.clamp(min=0).cpu()


def evaluate(config: EvaluateConfig, say_read: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Sample the prompts with each model in `config.model`, and write the report and picture.png; returns the report.

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
    rows, pictures, worst = [], [], []

    def prompts_of(places: Iterable[int]) -> list[str]:
        return [prompts[i // config.images_per_prompt % len(prompts)] for i in places]

    for k, spec in enumerate(config.model):
        model, steps, scale = prepared(spec, config, prompts)
        size = config.batch_size or (100 if model.pixels < LARGE else 8)
        negative, samples = model.conditioner.negative, samples_of(folder.folder, k, spec)
        asked = SampleConfig(model=spec, steps=steps, guidance_scale=scale, batch_size=size, negative_prompt=negative, **options)
        cost = folder.cost(spec, batch.sample(asked, model, samples))

        def scores(part: range, samples: Path = samples) -> tuple[Tensor]:
            return (clip.scores(pictures_of(samples, part), prompts_of(part)),)

        (found,) = shared(count, PART, scores, where)
        rows.append({"model": spec, "images": count, **cost, "clip_score": found.mean().item()})
        lowest = found.argsort(stable=True)[:WORST].tolist()
        captions = [f"{found[i]:.2f}: {prompt}" for i, prompt in zip(lowest, prompts_of(lowest), strict=True)]
        worst.append((spec, pictures_of(samples, lowest), captions))
        shown = pictures_of(samples, range(min(count, SHOWN)))
        pictures.append((f"{spec}: CLIP score {rows[-1]['clip_score']:.2f}", shown))
        del model  # frees memory for the next one
    report = {"prompts": config.prompts, "clip": config.clip, "seed": config.seed, "columns": COLUMNS, "rows": rows}
    report |= {"warnings": [], "versions": versions()}
    said = prompts_of(range(len(shown)))
    folder.finish(report, table(report), pictures, columns=8, scale=max(1, 64 // shown.shape[1]), captions=said, worst=worst)
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


def pictures_of(folder: Path, places: Iterable[int]) -> np.ndarray:
    """Images `places` (B, H, W, 3) uint8 from a folder of samples."""
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png").convert("RGB")) for i in places])


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    about = f"CLIP score: 100 max(cos, 0) by {report['clip']}, prompts {report['prompts']}, seed {report['seed']}."
    return "\n".join([*markdown(SAMPLED | COLUMNS, report["rows"]), "", about])

"""How well pictures fit their prompts: the CLIP score (Hessel et al. 2104.08718) of models that make pictures of text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_cli import launch, processes
from distill_cli.config import EvaluateConfig, SampleConfig
from distill_cli.data.pictures import save_comparison
from distill_cli.data.prompts import open_prompts
from distill_cli.errors import DistillError, UsageError
from distill_cli.evaluate.report import split
from distill_cli.files import remove_temporaries, write_atomic
from distill_cli.models import load
from distill_cli.runs import settle, versions
from distill_cli.sample import batch

SHOWN, PART = 16, 32
COLUMNS = ("model", "images", "evaluations", "images/s", "CLIP score")


class CLIP:
    """transformers' CLIPModel and its processor, from a folder or by hub id; nothing is downloaded but on first use."""

    def __init__(self, name: str, where: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self.model = CLIPModel.from_pretrained(name, use_safetensors=True).eval().to(where)
            self.processor = CLIPProcessor.from_pretrained(name)
        except Exception as error:  # transformers raises many kinds for a missing folder, and without a network
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DistillError(
                f"clip {name}: no CLIP model ({reason})", "a folder, or a hub id such as openai/clip-vit-base-patch16"
            ) from error

    @torch.no_grad()
    def scores(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """(B,) 100 max(cos, 0) between uint8 images (B, H, W, 3) and their prompts, cut at the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        given = self.processor(
            text=list(prompts), images=list(images), return_tensors="pt", padding="max_length", max_length=length, truncation=True
        ).to(self.model.device)
        made = self.model(**given)
        cosines = torch.nn.functional.cosine_similarity(made.image_embeds.float(), made.text_embeds.float(), dim=1)
        return 100 * cosines.clamp(min=0).cpu()


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Sample the prompts with what `config.model` lists, and write report.json, report.md and picture.png; returns the report."""
    assert config.out is not None
    assert config.prompts is not None
    if config.clip is None:
        raise UsageError("--prompts: pictures of prompts are measured by a CLIP model: none given", "clip=FOLDER or a hub id")
    prompts = open_prompts(config.prompts)
    models = []
    for spec in config.model:
        name, steps = split(spec)
        models.append((spec, load(name).with_prompts(prompts, "", config.images_per_prompt), steps))
    clip = CLIP(config.clip, launch.device(config.device))
    settle(config.out / "evaluation.json", config.model_dump(mode="json", exclude={"out", "device"}), "an evaluation")
    remove_temporaries(config.out)
    count = len(prompts) * config.images_per_prompt
    rows, pictures = [], []
    for k, (spec, model, steps) in enumerate(models):
        folder = config.out / "samples" / f"{k}-{re.sub(r'[^A-Za-z0-9_.@-]+', '_', spec)}"
        options = config.model_dump(include={"seed", "device", "batch_size", "precision", "prompts", "images_per_prompt"})
        made = batch.sample(SampleConfig(model=spec, steps=steps, num=count, format="npz", **options), model, folder)
        launch.all_of([0], launch.device(config.device))  # the last one has joined the parts by now
        images, _ = batch.read_npz(folder / "samples.npz")
        ranges = [range(first, min(count, first + PART)) for first in range(0, count, PART)]
        mine = []
        for j in processes.mine(len(ranges)):
            part = ranges[j]
            texts = [prompts[i // config.images_per_prompt] for i in part]
            mine.append((j, clip.scores(images[part.start : part.stop], texts)))
        scores = torch.cat([part for _, part in sorted(launch.all_of(mine, launch.device(config.device)), key=lambda each: each[0])])
        numbers = {"network_evaluations": made["network_evaluations"], "images_per_second": made["images_per_second"]}
        rows.append({"model": spec, "images": count, **numbers, "clip_score": scores.mean().item()})
        pictures.append((f"{spec}: CLIP score {rows[-1]['clip_score']:.2f}", images[:SHOWN]))
    report = {"prompts": config.prompts, "clip": config.clip, "seed": config.seed, "rows": rows, "warnings": [], "versions": versions()}
    if processes.rank() == 0:
        write_atomic(config.out / "report.json", json.dumps(report, indent=2) + "\n")
        write_atomic(config.out / "report.md", table(report) + "\n")
        save_comparison(pictures, config.out / "picture.png", columns=8, scale=max(1, 64 // images.shape[1]))
    return report


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in report["rows"]:
        rate = "" if row["images_per_second"] is None else f"{row['images_per_second']:.1f}"
        lines.append(f"| {row['model']} | {row['images']} | {row['network_evaluations']} | {rate} | {row['clip_score']:.2f} |")
    return "\n".join([*lines, "", f"CLIP score: 100 max(cos, 0) by {report['clip']}, prompts {report['prompts']}, seed {report['seed']}."])

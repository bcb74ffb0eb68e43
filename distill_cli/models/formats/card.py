"""The README.md of a model's folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distill_cli.models import header
from distill_cli.models.formats import comfyui
from distill_cli.models.model import Model
from distill_cli.models.sources.catalog import HUB


@dataclass(frozen=True)
class InDiffusers:
    """How plain diffusers samples a folder."""

    snippet: str = ""
    """Python that makes a picture from FOLDER; '' if no pipeline can."""
    differs: str = ""
    """Why the picture differs from `distill sample`'s for the same noise; '' if it does not."""
    scale: str = ""
    """The guidance scale as the pipeline counts it, in words; '' where it counts as we do."""
    less: float = 0.0
    """By how much the pipeline counts a guidance scale less than we do."""
    called: Mapping[str, Any] = field(default_factory=dict)
    """What else the pipeline is told."""
    base: str = ""
    """The model that an adapter (LoRA) is loaded onto: a hub id, a name or a folder; '' for whole weights."""

    @property
    def said(self) -> str:
        """The comparison in one line."""
        return f"not as distill samples it: {self.differs}" if self.differs else "as distill samples it"


def with_lora(there: InDiffusers, base: str, scheduler: str) -> InDiffusers:
    """How plain diffusers samples a LoRA for `base`, when `there` is how it samples the same model with whole weights.

    FOLDER holds the LoRA, and the configuration of a scheduler of class `scheduler`.
    """
    place = hub_id(base)
    if not (header.HUB_ID.fullmatch(place) or (Path(place).is_absolute() and Path(place).is_dir())):
        place = "BASE"
    lines = [] if place != "BASE" else [f"# BASE: distill export {shlex.quote(base)} --to folder --out BASE"]
    for line in there.snippet.splitlines():
        if line.startswith("from diffusers import "):
            line = f"from diffusers import {', '.join(sorted({scheduler, line.removeprefix('from diffusers import ')}))}"
        lines.append(line)
        if line.startswith("pipeline = "):
            own = f'pipeline.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")'
            lines[-1:] = [line.replace('"FOLDER"', json.dumps(place)), own, 'pipeline.load_lora_weights("FOLDER")']
    snippet = "".join(f"{line}\n" for line in lines)
    return replace(there, snippet=snippet, base=base)


def hub_id(name: str) -> str:
    """A model's id on the hub, by our name for it; any other name as it is."""
    return HUB[name].id if name in HUB else name


def header_of(model: Model, there: InDiffusers) -> str:
    """The card's YAML header."""
    lineage = model.lineage
    base = hub_id(there.base or lineage.teacher)
    known = bool(header.HUB_ID.fullmatch(base))
    tags = ["distill", "few-step" * (lineage.kind == "student"), lineage.method, "lora" * bool(there.base)]
    made = "text-to-image" if model.conditioner.takes == "prompts" else "unconditional-image-generation"
    return header.written(
        {
            **header.licence(lineage.licence),
            "base_model": base if known else "",
            "base_model_relation": ("adapter" if there.base else "finetune") if known else "",
            "library_name": "diffusers" if there.snippet else "",
            "pipeline_tag": made if model.codec.kind.drawn else "",
            "tags": [tag for tag in tags if tag],
        }
    )


def card(model: Model, there: InDiffusers) -> str:
    """The README.md of a model's folder: its header, what it is, how it is sampled here and elsewhere, the recipe that made it."""
    lineage, sampler, conditioner, schedule = model.lineage, model.sampler, model.conditioner, model.denoiser.schedule
    times = ", ".join(f"{time:.4g}" for time in sampler.times)
    rows = {
        "kind": f"{lineage.kind}{f', by {lineage.method}' if lineage.method else ''}",
        "teacher": f"{lineage.teacher} (weights {lineage.teacher_hash[:12]})" if lineage.teacher else "",
        "licence": lineage.licence,
        "data": lineage.data,
        "images": f"{model.codec.kind.size(model.picture)}, of {conditioner.summary}",
        "sampling": f"{sampler.solver}, {sampler.steps} step{'s' * (sampler.steps > 1)}, guidance scale {sampler.dial}"
        f"{f' ({there.scale})' if there.scale else ''}",
        "times": f"{'sigma' if schedule.grid else 't'} {times}" if times else "",
        "grid": f"{schedule.grid} points, on which --times counts" if times and schedule.grid else "",
        "in diffusers": there.said,
        "in ComfyUI": comfyui.settings(model),
    }
    if conditioner.learned is not None:
        rows["learned"] = f"the classes {', '.join(map(str, conditioner.learned))} alone"
    table = "\n".join(f"| {key} | {value.replace('|', '&#124;')} |" for key, value in rows.items() if value)
    how = f"Sample with `distill sample --model FOLDER{' --prompts FILE' * (conditioner.takes == 'prompts')}`"
    how += f", or in diffusers:\n\n```python\n{there.snippet}```" if there.snippet else "."
    shown = model.recipe.replace("```", "'''")  # foreign text cannot end the block
    recipe = f"\n\nThe recipe that made it:\n\n```yaml\n{shown}```" if model.recipe else ""
    return f"{header_of(model, there)}\n# {lineage.name}\n\n| | |\n|---|---|\n{table}\n\nMade by distill. {how}{recipe}\n"

"""The cost of a model before it runs: its networks without weights, and the arithmetic of one evaluation."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from distill_cli.models.conditioners import Conditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.sources import lora_files
from distill_cli.models.sources.catalog import HUB
from distill_cli.models.sources.hub import short_name, to_download
from distill_cli.models.sources.names import split

RATE = 150e12
"""FLOP/s that plans assume: about half of an A100's data sheet in bf16. A guess, not a measurement."""


def sketch(name: str) -> Model:
    """A hub model for plans: its published architecture on the meta device, without weights or vocabulary."""
    model: Model = import_module(f"distill_cli.models.{HUB[name].module}").sketch(name)
    return replace(model, lineage=Lineage(name=name, licence=HUB[name].licence))


def sketched(name: str, wanted: bool) -> tuple[Model | None, dict[str, str]]:
    """The sketch of a hub model that is not downloaded yet, if `wanted`, and the plan's line about the download."""
    base, loras = split(name)
    known = short_name(base) if wanted else ""
    download = to_download(base) if known else ""
    return (lora_files.on(sketch(known), loras), {"download": download}) if download else (None, {})


def counted(call: Any) -> int:
    """FLOP of a call on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def evaluation(model: Model) -> int:
    """FLOP of one network evaluation for one image: multiplications and additions in matrix products."""
    return counted(lambda: model.backbone.fresh()(torch.empty(1, *model.shape), torch.ones(1), model.example(1, "meta")))


def decoding(model: Model) -> int:
    """FLOP of decoding one image."""
    return counted(lambda: model.codec.fresh().raw(torch.empty(1, *model.shape)))


def text_cost(conditioner: Conditioner, text: str, prompts: int, images: int) -> dict[str, str]:
    """A plan's line about the text of a method that draws `images` prompts a step, of so many: on disk, or on the GPU and in each step."""
    each, parts = conditioner.embedding * 2, conditioner.parts()
    if not each:
        return {}
    if text == "live":
        weights = sum(value.numel() * value.element_size() for part in parts.values() for value in part.parameters())
        kept = f"{' and '.join(parts)} on the GPU ({amount(weights, 'B')}), evaluated on {images} prompts a step, ahead of it"
        return {"text embeddings": f"live: none on disk; {kept}"}
    total = f": {amount(each * prompts, 'B')} of disk for {prompts:,} prompts, if all differ" if prompts else ""
    return {"text embeddings": f"{each / 1e3:.0f} kB a prompt in fp16, of all prompts, before the first step{total}"}


def time_of(flop: float) -> str:
    """FLOP in the words of a plan."""
    return f"{amount(flop)}, {flop / RATE / 3600:,.3g} GPU-hours at {amount(RATE)}/s (a guess at an A100 in bf16)"


def amount(number: float, unit: str = "FLOP") -> str:
    """FLOP or bytes, three digits with their unit."""
    number = float(f"{max(number, 1):.3g}")
    exponent = max(1, min(6, int(math.log10(number) // 3)))
    return f"{number / 1000**exponent:.3g} {' kMGTPE'[exponent]}{unit}"

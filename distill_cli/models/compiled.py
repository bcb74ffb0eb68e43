"""torch.compile for denoisers' networks, in place: names in state dicts stay, and a copy of a compiled network is not compiled.

And the networks of a model before its first batch, in the layout of the options, compiled or not.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill_cli import launch, processes
from distill_cli.config import BatchesConfig, TrainingConfig
from distill_cli.config.base import Compile
from distill_cli.errors import UsageError
from distill_cli.models.backbones import Backbone

if TYPE_CHECKING:
    from distill_cli.models.model import Model, Sampling

BACKEND = "inductor"
COMPILERS = {"cpu": ("CXX", "g++", "c++", "clang++"), "cuda": ("CC", "cc", "gcc", "clang")}
"""Per device: the variable that names a compiler, and compilers that are looked for."""
GRAPHS = 4096
"""Graphs that torch may compile of one function: each block, number of images, and kind of gradient has its own."""


def backbones(network: nn.Module) -> list[Backbone]:
    """The backbones in a network."""
    return [part for part in network.modules() if isinstance(part, Backbone)]


def check(where: torch.device) -> None:
    """Raise UsageError if torch cannot compile for a device here."""
    variable, *usual = COMPILERS[where.type]
    if BACKEND == "inductor" and not any(map(shutil.which, (os.environ.get(variable, ""), *usual))):
        raise UsageError(f"compile: no compiler found ({', '.join(usual)}), and torch needs one", "install one, or leave compile out")
    if where.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UsageError("compile: Triton is not installed, and torch needs it on a GPU", "pip install triton, or leave compile out")


def compile_parts(parts: Iterable[nn.Module], **options: Any) -> Counter[str]:
    """Compile modules in place. Shapes are fixed, so what a shape is computed with does not depend on what came before."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = GRAPHS
    counted: Counter[str] = Counter()
    for part in parts:
        if part._compiled_call_impl is not None:  # a network that several share
            continue
        part.compile(backend=BACKEND, dynamic=False, **options)
        counted[type(part).__name__] += 1
    return counted


def compile_network(network: nn.Module, how: Compile, **options: Any) -> Counter[str]:
    """Compile the backbones in a network, whole or block by block. Returns the number of compiled modules by class."""
    found = backbones(network) if how != "none" else []
    if how == "whole":
        return compile_parts((backbone.net for backbone in found), **options)
    return compile_parts((part for each in found for part in each.net.modules() if type(part).__name__ in each.blocks), **options)


def lay_out(config: BatchesConfig | TrainingConfig, *networks: nn.Module) -> None:
    """Store networks' weights in the memory format of the options; pictures inside follow."""
    if config.channels_last:
        for network in networks:
            network.to(memory_format=torch.channels_last)


def uncompile(network: nn.Module) -> None:
    """Have a network run as written again."""
    for part in network.modules():
        part._compiled_call_impl = None


def said(counted: Counter[str]) -> str:
    """Compiled modules in words."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counted.items()))


COMPILING, SPARED = 60.0, 0.04
"""Seconds that compiling took, and seconds of launches that a call was spared by it: Stable Diffusion 1.5's UNet, an H200
(docs/benchmarks.md)."""


def pays_from(batch_size: int, sampling: Sampling) -> int:
    """The number of pictures, sampled in batches, from which on compiling takes less time than it spares."""
    calls = sampling.evaluations // (2 if sampling.combines and sampling.guidance_calls == 1 else 1)
    return math.ceil(COMPILING / (SPARED * calls)) * batch_size


def plan(how: str, batch_size: int, sampling: Sampling) -> dict[str, str]:
    """From how many pictures on compiling pays, for --dry-run."""
    if how == "none":
        return {}
    pays = pays_from(batch_size, sampling)
    return {"compile": f"{how}, pays from about {pays:,} images a process on, in batches of one size (an H200's figures for sd15)"}


def graph(how: Compile, where: torch.device) -> dict[str, str]:
    """Options by which a network that makes pictures runs as a CUDA graph."""
    return {"mode": "reduce-overhead"} if how == "whole" and where.type == "cuda" else {}


def compile_model(how: Compile, model: Model, where: torch.device, decodes: bool = True) -> None:
    """Compile a model's denoiser, and its decoder if it `decodes`, and say so. Whole networks run as CUDA graphs on a GPU."""
    if how == "none":
        return
    check(where)
    counted = compile_network(model.denoiser, how, **graph(how, where))
    if decodes:  # a graph writes each answer over the last one, and tiles are kept until all are there
        counted += compile_parts(model.codec.decoders(), **({} if model.codec.tiles else graph(how, where)))
    if counted:  # else it was compiled before
        processes.say(f"compile {how}: {said(counted)}; each number of images in a batch is compiled once")


def prepare(config: BatchesConfig, model: Model, where: torch.device, decodes: bool = True) -> None:
    """Have a model ready for its batches: on its device, in the types and the layout of the options, compiled or not."""
    model.ready(where, launch.HALF.get(config.precision), decodes)
    lay_out(config, model.denoiser, *(model.codec.decoders() if decodes else ()))
    compile_model(config.compile, model, where, decodes)

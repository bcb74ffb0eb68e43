"""torch.compile for denoisers' networks, in place: names in state dicts stay, and a copy of a compiled network is not compiled."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from distill_cli.config.base import Compile
from distill_cli.errors import UsageError
from distill_cli.models.backbones import Backbone

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


def uncompile(network: nn.Module) -> None:
    """Have a network run as written again."""
    for part in network.modules():
        part._compiled_call_impl = None


def said(counted: Counter[str]) -> str:
    """Compiled modules in words."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counted.items()))

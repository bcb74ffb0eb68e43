"""Classes of diffusers and transformers that came after the oldest versions that this package works with."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from distill_cli.errors import DistillError


def class_of(kind: str, library: str, since: str) -> Any:
    """A library's class by its name. Raises DistillError if the installed version is older than `since`, which has it."""
    module = import_module(library)
    if not hasattr(module, kind):
        has = f"{kind} came with {library} {since}, and {module.__version__} is installed"
        raise DistillError(has, f"pip install --upgrade {library}")
    return getattr(module, kind)

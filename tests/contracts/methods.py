"""The methods that contracts are held against: the registry's, by name. Nothing else is known of a method than its config's fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Method:
    """A method by its name, the command that trains it, what the command line says to choose it, and its config's class."""

    name: str
    command: str
    config: type[BaseModel]
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(self.config.model_fields)


def listed() -> dict[str, Method]:
    """Every method, by name."""
    from distill_cli import config

    methods = [
        Method("train", "train", config.TrainConfig),
        Method("vae", "vae", config.VAEConfig),
        Method("classifier", "classifier", config.ClassifierConfig),
        Method("dmd", "dmd", config.DMDConfig),
        *(Method(name, "cm", config.CMConfig, {"method": name}) for name in ("cd", "ct", "ict", "ect")),
    ]
    return {method.name: method for method in methods}


def class_of(spec: str) -> type[BaseModel]:
    """The class that "module:Class" names."""
    module, _, name = spec.partition(":")
    found: type[BaseModel] = getattr(import_module(module), name)
    return found

"""The methods that contracts are held against: the registry's, by name. Nothing else is known of a method than its config's fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
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
    """Every method, by name; of a command that has several the key `method` names one."""
    if find_spec("distill_cli.methods.registry") is None:
        return stub()
    registry = import_module("distill_cli.methods.registry")
    commands = [method.command for method in registry.METHODS]
    return {
        each.name: Method(each.name, each.command, class_of(each.config), {"method": each.name} if commands.count(each.command) > 1 else {})
        for each in registry.METHODS
    }


def class_of(spec: str) -> type[BaseModel]:
    """The class that "room.module:Class" names, of the folder of methods."""
    module, _, name = spec.partition(":")
    found: type[BaseModel] = getattr(import_module(f"distill_cli.methods.{module}"), name)
    return found


def stub() -> dict[str, Method]:
    """The methods of the time before there was a registry."""
    from distill_cli import config

    methods = [
        Method("train", "train", config.TrainConfig),
        Method("dmd", "dmd", config.DMDConfig),
        *(Method(name, "cm", config.CMConfig, {"method": name}) for name in ("cd", "ct", "ict", "ect")),
        Method("vae", "vae", config.VAEConfig),
        Method("classifier", "classifier", config.ClassifierConfig),
    ]
    return {method.name: method for method in methods}

"""The methods that contracts are held against: the registry's, by name. Nothing else is known of a method than its config's fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from distill_cli.methods.registry import METHODS, load


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
    commands = [method.command for method in METHODS]
    return {
        each.name: Method(
            each.name, each.command, load(f"methods.{each.config}"), {"method": each.name} if commands.count(each.command) > 1 else {}
        )
        for each in METHODS
    }

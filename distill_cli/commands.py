"""Every command that a recipe may name, and the classes of its options. Knows no torch.

A command with several methods is the union of their classes: the key `method` chooses one.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from distill_cli.methods.registry import COMMON, METHODS, Method, load

if TYPE_CHECKING:
    from distill_cli.config import Config

_OTHERS = {"pairs": "PairsConfig", "sample": "SampleConfig", "trace": "TraceConfig", "edit": "EditConfig", "evaluate": "EvaluateConfig"}
"""Commands that train nothing -> their class in `config`."""
TRAINING = tuple(dict.fromkeys(method.command for method in METHODS))
COMMANDS = (*TRAINING, *_OTHERS)


def methods(command: str) -> list[Method]:
    return [method for method in METHODS if method.command == command]


@cache
def kinds(command: str) -> dict[str, type[Config]]:
    """The methods of a command -> their options, the default one first; of a command that trains nothing one, under its own name."""
    if command in _OTHERS:
        return {command: load(f"config:{_OTHERS[command]}")}
    return {method.name: load(f"methods.{method.config}") for method in methods(command)}


@cache
def config_of(command: str) -> type[Config]:
    """The class of a command's options; of several methods the one that they all derive from."""
    first, *others = kinds(command).values()
    return next(shared for shared in first.__mro__ if all(issubclass(other, shared) for other in others))


def instead(command: str, key: str) -> str:
    """What a command has in place of another command's key, as a hint; '' if nothing is said."""
    return next((kind.elsewhere[key] for kind in kinds(command).values() if key in kind.elsewhere), "")


def method_of(config: Config) -> Method:
    """The method whose options these are."""
    return next(method for method in METHODS if kinds(method.command)[method.name] is type(config))


def command_of(config: type[Config]) -> str:
    """The command that a class of options belongs to."""
    return next(name for name in COMMANDS if config is config_of(name) or config in kinds(name).values())


SHOWN = {
    "pairs": ("teacher", "num", "out", "solver", "steps", "classes", "prompts", "negative_prompt", "guidance_scale", "classifier_guidance",
              "classifier_scale", "clip_guidance", "clip_scale", "batch_size", "shard_size", "dtype", "seed", "device"),
    "sample": ("model", "num", "out", "classes", "prompts", "negative_prompt", "images_per_prompt", "solver", "steps", "times",
               "search_times", "classifier", "guidance_scale", "classifier_guidance", "classifier_scale", "clip_guidance", "clip_scale",
               "batch_size", "format", "grid", "precision", "seed", "device"),
    "trace": ("model", "data", "show", "num", "every", "fps", "out", "classes", "prompts", "solver", "steps", "guidance_scale", "seed",
              "device"),
    "edit": ("model", "input", "mask", "patch", "times", "classes", "out", "seed", "device"),
    "evaluate": ("model", "data", "resolution", "features", "measures", "classifier", "save_statistics", "num", "prompts", "clip",
                 "attributes", "out", "batch_size", "precision", "seed", "device"),
}  # fmt: skip


def shown(command: str) -> set[str]:
    """Keys of a command that its `--help` shows."""
    return {*SHOWN.get(command, COMMON), *(flag for method in methods(command) for flag in method.flags)}

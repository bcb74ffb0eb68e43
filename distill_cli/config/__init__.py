"""Every option of every command, with its unit. An unknown key is an error. Imports no torch."""

from __future__ import annotations

from distill_cli.config.base import BUILTIN_SETS, PROMPT_SETS, Classes, Config, Every, Precision, seconds
from distill_cli.config.networks import NetworkConfig, TextConfig, VAENetworkConfig
from distill_cli.config.sampling import EditConfig, EvaluateConfig, GenerateConfig, PairsConfig, SampleConfig
from distill_cli.config.training import CM_DEFAULTS, CM_KEYS, ClassifierConfig, CMConfig, DMDConfig, TrainConfig, TrainingConfig, VAEConfig

__all__ = [
    "BUILTIN_SETS",
    "PROMPT_SETS",
    "Classes",
    "Config",
    "Every",
    "Precision",
    "seconds",
    "NetworkConfig",
    "TextConfig",
    "VAENetworkConfig",
    "EditConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "PairsConfig",
    "SampleConfig",
    "CM_DEFAULTS",
    "CM_KEYS",
    "ClassifierConfig",
    "CMConfig",
    "DMDConfig",
    "TrainConfig",
    "TrainingConfig",
    "VAEConfig",
    "CONFIGS",
]

CONFIGS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "pairs": PairsConfig,
    "dmd": DMDConfig,
    "cm": CMConfig,
    "sample": SampleConfig,
    "classifier": ClassifierConfig,
    "vae": VAEConfig,
    "edit": EditConfig,
    "evaluate": EvaluateConfig,
}
"""Commands by the name that a recipe's `command` key holds, each with its options."""

"""What options of several commands share, and those of the commands that use models. An unknown key is an error. Knows no torch."""

from distill_cli.config.base import BUILTIN_SETS, PROMPT_SETS, Classes, Config, Every, Precision, seconds
from distill_cli.config.guides import GuidesConfig
from distill_cli.config.networks import CLIPNetworkConfig, NetworkConfig, TextConfig, VAENetworkConfig
from distill_cli.config.sampling import BatchesConfig, EditConfig, EvaluateConfig, GenerateConfig, PairsConfig, SampleConfig, TraceConfig
from distill_cli.config.training import StudentConfig, TrainingConfig

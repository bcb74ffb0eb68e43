"""All training methods, one line each. Imports no torch and no method: names are resolved when they are needed.

A new method is a folder beside this file (config.py without torch, objective.py) and one line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Method:
    """A method: `distill COMMAND`, or `distill COMMAND --method NAME` for a command of several methods."""

    name: str
    command: str
    summary: str
    config: str
    """The class of its options, as "module:Class" inside this package."""
    objective: str
    """The function that opens it, as "module:function" inside this package."""
    flags: tuple[str, ...] = ()
    """Keys that `--help` shows besides COMMON; `--help-all` shows all."""


COMMON = ("out", "steps", "batch_size", "lr", "precision", "memory", "seed", "device")
IMAGES = ("data", "resolution")
GUIDED = ("guidance_scale", "classifier_guidance", "classifier_scale", "clip_guidance", "clip_scale")
"""Flags of a teacher's guidance."""
_DMD = (
    "teacher",
    "lora",
    "pairs",
    "guidance_range",
    "prompts",
    "negative_prompt",
    "fake_lr",
    "fake_steps",
    "regression_loss",
    "regression_weight",
    "regression_steps",
    *GUIDED,
)
_DMD2 = (
    "teacher",
    "lora",
    "student",
    "student_steps",
    "prompts",
    "negative_prompt",
    *IMAGES,
    "fake_lr",
    "fake_steps",
    *GUIDED,
    "gan",
    "init_pairs",
    "init_steps",
)
_CM = ("method", "teacher", "lora", *IMAGES, "metric")

# fmt: off
METHODS = (
    Method("train", "train", "Train a teacher from images.", "train.config:TrainConfig", "train.objective:open", IMAGES),
    Method("dmd", "dmd", "Distil a one-step student by distribution matching.", "dmd.config:DMDConfig", "dmd.objective:open", _DMD),
    Method("dmd2", "dmd2", "Distil a student of few steps by distribution matching, without pairs.", "dmd2.config:DMD2Config",
           "dmd2.objective:open", _DMD2),
    Method("cd", "cm", "Distil a consistency model, a student of one or a few steps.", "cm.config:CDConfig", "cm.objective:cd",
           (*_CM, *GUIDED)),
    Method("ct", "cm", "Train a consistency model from images alone.", "cm.config:CTConfig", "cm.objective:ct", _CM),
    Method("ict", "cm", "Train a consistency model by the improved techniques.", "cm.config:ICTConfig", "cm.objective:ict", _CM),
    Method("ect", "cm", "Tune a teacher into a consistency model.", "cm.config:ECTConfig", "cm.objective:ect", _CM),
    Method("lcm", "cm", "Distil a latent consistency model: few steps, guidance built in or told.", "lcm.config:LCMConfig",
           "lcm.objective:lcm", (*_CM, *GUIDED, "guidance_range", "student_steps")),
    Method("pd", "pd", "Distil a student of few steps by halving them round by round.", "pd.config:PDConfig", "pd.objective:open",
           ("teacher", "lora", *IMAGES, "first_steps", "last_steps", *GUIDED, "guidance_range")),
    Method("vae", "vae", "Train the autoencoder of a latent model.", "vae.config:VAEConfig", "vae.objective:open", IMAGES),
    Method("classifier", "classifier", "Train the classifier in whose features `distill evaluate` measures.",
           "classifier.config:ClassifierConfig", "classifier.objective:open", (*IMAGES, "noisy", "model")),
    Method("clip", "clip", "Train a CLIP model, which scores pictures by their captions.", "clip.config:CLIPConfig", "clip.objective:open",
           ("data",)),
)
# fmt: on


def load(name: str) -> Any:
    """The object that "module:attribute" names inside this package."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"distill_cli.{module}"), attribute)

"""Before the first step a result is saved and read back, so that no run finds at its end that it cannot be saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill_cli.errors import DistillError, reason
from distill_cli.files import os_errors, scratch
from distill_cli.models import classifier, clip, formats, load, noisy_classifier, noisy_clip
from distill_cli.models.autoencoder import Autoencoder
from distill_cli.models.classifier import Classifier
from distill_cli.models.clip import Clip
from distill_cli.models.model import Model
from distill_cli.models.noisy_classifier import NoisyClassifier
from distill_cli.models.noisy_clip import NoisyClip
from distill_cli.models.parts import unfilled
from distill_cli.models.stable_diffusion import load_vae

READERS: dict[type, Callable[[Any], Any]] = {
    Model: load, Autoencoder: load_vae, Classifier: classifier.load, NoisyClassifier: noisy_classifier.load, Clip: clip.load,
    NoisyClip: noisy_clip.load,
}  # fmt: skip
"""The loader of each kind of result."""


def save(result: Any, folder: Path) -> None:
    """Write a run's result: a model by its format, anything else by its own `save`."""
    if isinstance(result, Model):
        formats.save(result, folder)
    else:
        result.save(folder)


def check_space(folder: Path, networks: Iterable[nn.Module], trained: Iterable[nn.Module]) -> None:
    """Raise DistillError if the disk of `folder` has no room for a checkpoint: these networks, and two moments of the trained ones."""
    kept = sum(value.numel() * value.element_size() for network in networks for value in network.state_dict().values())
    needed = kept + sum(2 * p.numel() * p.element_size() for network in trained for p in network.parameters())
    with os_errors(folder):
        room = shutil.disk_usage(folder)
    if room.total and room.free < needed:  # some file systems report 0
        said = f"{folder}: {room.free / 1e6:.1f} MB are free, a checkpoint takes {needed / 1e6:.1f}"
        raise DistillError(said, f"free some space, then --resume {folder}")


def unmeasured(model: Callable[[nn.Module], Any], network: nn.Module) -> Any:
    """The result that `model` makes of a network; for autoencoders and classifiers without measurements on pictures."""
    return network if isinstance(network, (Autoencoder, Classifier)) else model(network)


def rehearse(model: Callable[[nn.Module], Any], network: nn.Module, recipe: str, place: Path) -> None:
    """Save what `model` makes of a network beside `place`, read it again, and delete it; raises DistillError where any of it fails."""
    try:
        with scratch(place) as folder, torch.random.fork_rng(devices=[]):
            made = unmeasured(model, network)
            reader = READERS.get(type(made))
            if reader is None:
                return
            if isinstance(made, Model):
                made.recipe = recipe
            save(made, folder)
            with unfilled():
                if isinstance(made, Model) and formats.lora.fits(made):
                    formats.lora.read(folder, made)  # without a second base beside the first
                else:
                    reader(str(folder))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # diffusers, transformers, safetensors and json raise errors of many classes
        said, hint = (error.message, error.hint) if isinstance(error, DistillError) else (reason(error), "")
        then = f"{hint or 'fix this'}; then --resume {place.parent}"
        raise DistillError(f"{place}: could not be saved and read again ({said})", then) from error

"""The families of models. A new one is one entry of FAMILIES: what a method may be given, by the key of its config that takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Made:
    """A folder that is made once a session by `make(place)` and given by its path; equal ones are made once."""

    name: str
    make: Callable[[Path], None]


@dataclass(frozen=True)
class Family:
    """`options` are values of config keys: a method gets those that its config has.

    `pairs` are the options of `distill pairs` for this teacher, None where it makes none.
    """

    options: dict[str, Any]
    pairs: dict[str, Any] | None = field(default_factory=lambda: dict(steps=3))


BETAS = {"eps": {"beta_schedule": "linear"}, "v": {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}}


def pixels(prediction: str) -> Made:
    """A folder of a pixel model with random weights; that of v alone knows classes."""

    def make(place: Path) -> None:
        from distill_cli.diffusion.schedule import FlowSchedule, TableSchedule
        from distill_cli.models import formats, pixel
        from distill_cli.models.lineage import Lineage

        model = pixel.create(
            resolution=16, channels=[8, 16], attention=[False, True], groups=4, head=8,
            classes=[str(i) for i in range(10)] if prediction == "v" else [],
            schedule=TableSchedule.from_config(BETAS[prediction]) if prediction in BETAS else FlowSchedule(2.0),
            parameterisation=prediction, lineage=Lineage(name=place.name, data="digits"), seed=1,
        )  # fmt: skip
        formats.save(model, place)

    return Made(f"tiny-{prediction}", make)


def moons(place: Path) -> None:
    """A folder of a model of points with random weights."""
    from distill_cli.config import NetworkConfig
    from distill_cli.data import open_images
    from distill_cli.diffusion.schedule import EDMSchedule
    from distill_cli.models import formats, plane
    from distill_cli.models.lineage import Lineage

    network, lineage = NetworkConfig(channels=[32, 32]), Lineage(name=place.name, data="moons")
    formats.save(plane.new(open_images("moons"), network, EDMSchedule(), "edm", lineage, 1), place)


def saved(name: str) -> Made:
    """A folder of a model that is made in memory, which plain diffusers reads as a LoRA's base."""

    def make(place: Path) -> None:
        from distill_cli.models import formats, load

        formats.save(load(name), place)

    return Made(f"{name}-base", make)


def autoencoder(place: Path) -> None:
    """The autoencoder of tiny-sd, as `distill vae` writes one."""
    from distill_cli.models import load
    from distill_cli.models.autoencoder import Autoencoder

    vae = load("tiny-sd").parts()["vae"]
    Autoencoder(vae).save(place)


def prompts(place: Path) -> None:
    place.write_text("a red circle\na small blue square\na green triangle\n")


FAMILIES = {
    "tiny": Family(dict(teacher="tiny", data="digits", prediction="edm")),
    "tiny-eps": Family(dict(teacher=pixels("eps"), data="digits", prediction="eps")),
    "tiny-v": Family(dict(teacher=pixels("v"), data="digits", prediction="v")),
    "tiny-flow": Family(dict(teacher=pixels("flow"), data="digits", prediction="flow")),
    "moons": Family(
        dict(teacher=Made("tiny-moons", moons), data="moons", prediction="edm", network=dict(channels=[32, 32], dropout=0.1)),
    ),
    "tiny-sd": Family(
        dict(
            teacher="tiny-sd", data="shapes", prediction="eps", vae=Made("autoencoder", autoencoder), variants=1,
            prompts=Made("prompts.txt", prompts), text=dict(width=16, layers=1, heads=2),
        ),
        pairs=dict(steps=3, prompts=Made("prompts.txt", prompts)),
    ),
    "tiny-sd3": Family(
        dict(
            teacher="tiny-sd3", data="shapes", prediction="flow", vae=Made("autoencoder", autoencoder), variants=1,
            prompts=Made("prompts.txt", prompts), text=dict(width=16, layers=1, heads=2),
        ),
        pairs=dict(steps=3, prompts=Made("prompts.txt", prompts)),
    ),
    "tiny-sdxl": Family(
        dict(
            teacher="tiny-sdxl", data="shapes", prediction="eps", vae=Made("autoencoder", autoencoder), variants=1,
            prompts=Made("prompts.txt", prompts), text=dict(width=16, layers=1, heads=2),
        ),
        pairs=dict(steps=3, prompts=Made("prompts.txt", prompts)),
    ),
}  # fmt: skip
TRANSFORMERS = {"tiny-sana": "sana", "tiny-lumina2": "lumina2", "tiny-z-image": "z_image", "tiny-klein": "klein"}
"""The tiny models of models/family.py's families, and the file of each in distill_cli/models."""
for name in TRANSFORMERS:
    FAMILIES[name] = replace(FAMILIES["tiny-sd3"], options={**FAMILIES["tiny-sd3"].options, "teacher": name})
for name in ("tiny-sd", "tiny-sd3", "tiny-sdxl", "tiny-z-image", "tiny-klein"):  # tests/models/test_families.py tries all
    own = FAMILIES[name]
    FAMILIES[f"{name}-lora"] = replace(own, options={**own.options, "teacher": saved(name), "lora": 2, "dropout": 0.0})
DIAL = dict(guidance_range=(1, 4))
own = FAMILIES["tiny-sdxl"]
FAMILIES["tiny-sdxl"] = Family({**own.options, **DIAL}, {**(own.pairs or {}), **DIAL})  # in the methods that have one


def lacking(family: str) -> str:
    """What the installed diffusers or transformers lacks for a family; '' if it has all."""
    from importlib import import_module

    from distill_cli.errors import DistillError

    module = TRANSFORMERS.get(family.removesuffix("-lora"))
    try:
        for part in ("pipeline", "text_encoder", "vae", "transformer") if module else ():
            import_module(f"distill_cli.models.{module}").FAMILY.class_of(part)
    except DistillError as error:
        return error.message
    return ""

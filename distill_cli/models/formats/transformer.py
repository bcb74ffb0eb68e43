"""Pipelines of the families of models/family.py: a transformer on latents, an autoencoder, one language model that reads the prompt.

A student is sampled in plain diffusers with its own list of sigmas, so its scheduler shifts nothing.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill_cli.errors import DistillError
from distill_cli.models import flow_matching, klein, lumina2, sana, z_image
from distill_cli.models.checks import check_latents, check_vae
from distill_cli.models.family import Family
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.formats.extra import read_extra
from distill_cli.models.formats.stable_diffusion import licence_of
from distill_cli.models.language import load_reader, named
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.parts import check_named, load_network, quiet, read_json
from distill_cli.models.sources.hub import PARTS as WEIGHTS

SNIPPET = """{seed}from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("FOLDER")
{seeded}pipeline(prompt="PROMPT", height={height}, width={width}, {steps}, guidance_scale={scale:g}{called}).images[0].save("picture.png")
"""
BESIDE = ("scheduler", "tokenizer")
"""Parts of a folder that are no networks."""


@dataclass(frozen=True, eq=False)
class TransformerFormat:
    """The pipeline folders of a family."""

    family: Family

    @property
    def PIPELINES(self) -> tuple[str, ...]:  # noqa: N802 - as of a module
        return self.family.pipelines

    def reads(self, index: dict[str, Any]) -> bool:
        return index.get("_class_name") in self.family.pipelines

    def fits(self, model: Model) -> bool:
        return type(model.net).__name__ == self.family.transformer

    def scheduler_of(self, model: Model) -> Any:
        return flow_matching.scheduler_of(model)

    def save(self, model: Model, folder: Path, dtype: torch.dtype) -> None:
        """Write the folder. A square size becomes the transformer's own, if it has one; any other stands in distill.json."""
        quiet()
        own: Any = model.backbone
        if model.size is not None and len(set(model.size)) == 1 and "sample_size" in model.net.config and own.resizes:
            model.net.register_to_config(sample_size=model.size[0])
        kinds = self.family.kinds
        text = model.text
        assert text is not None
        index = {
            "_class_name": self.family.pipelines[0],
            **{part: ["transformers" if part == "text_encoder" else "diffusers", kind] for part, kind in kinds.items()},
            **{name: ["transformers", named(tokenizer)] for name, tokenizer in text.tokenizers().items()},
            **dict.fromkeys(self.family.distilled, False),
        }

        def parts(temporary: Path) -> None:
            shared.write_parts(model, temporary, kinds, dtype)

        shared.write(model, folder, index, self.scheduler_of(model), parts, self.in_diffusers(model))

    def in_diffusers(self, model: Model) -> InDiffusers:
        """The pipeline uses the folder's scheduler, and a student's sigmas. Its guidance scale may count otherwise than ours."""
        sampler, family = model.sampler, self.family
        times = sampler.times_for(model.denoiser.schedule, sampler.solver, sampler.steps).tolist()
        height, width = (side * model.codec.factor for side in model.shape[1:])
        snippet = SNIPPET.format(
            **flow_matching.seeding(model),
            pipeline=family.pipelines[0],
            height=height,
            width=width,
            steps=f"sigmas={times}" if sampler.times else f"num_inference_steps={sampler.steps}",
            scale=sampler.guidance_scale - family.less,
            called="".join(f", {key}={value}" for key, value in family.called.items()),
        )
        counted = f"{sampler.guidance_scale - family.less:g} as {family.pipelines[0]} counts it" if family.less else ""
        return InDiffusers(snippet, flow_matching.differs(model, family.multistep), counted, family.less, family.called)

    def load(self, folder: Path, name: str) -> Model:
        """The model in a folder, in float32, evaluation mode, on the CPU. Without distill.json it has the pipeline's defaults."""
        family, index = self.family, read_json(folder / "model_index.json")
        there = {part: entry[1] for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]}
        family.class_of("pipeline")
        for part, kind in family.kinds.items():
            if there.get(part) != kind:
                hint = f"a {family.pipelines[0]} has all of {', '.join(family.kinds)}"
                raise DistillError(f"{folder}: its {part} is {there.get(part) or 'missing'}, not {kind}", hint)
        for key in family.distilled:
            if index.get(key):
                raise DistillError(f"{folder}: {key} is {json.dumps(index[key])}: a distilled model", "a teacher is the base of its family")
        path = folder / "scheduler" / "scheduler_config.json"
        config = read_json(path)
        schedule = flow_matching.schedule_of(config, str(path), family.moving, family.multistep)
        check_named(index, "scheduler", config["_class_name"], path)
        networks: dict[str, Any] = {}
        for part in family.kinds:
            kind = family.class_of(part)
            if part == "transformer":  # published autoencoders say more than their class takes
                check_options(kind, folder / part / "config.json")
            networks[part] = load_network(kind, folder / part, WEIGHTS[part], half=part == "text_encoder")
        places = networks["transformer"].config.get("axes_lens")
        if places and places[0] < family.wording.length + 2:
            knows = f"{folder / 'transformer'}: axes_lens begins with {places[0]}"
            raise DistillError(knows, f"a text has up to {family.wording.length} tokens, and each wants a place")
        check_vae(networks["vae"], str(folder / "vae"), family.numbers)
        reader = load_reader(folder / "tokenizer", networks["text_encoder"], family.wording, family.tokenizers)
        model = family.assemble(networks, reader, Lineage(name=name, licence=licence_of(folder)), schedule)
        model.denoiser.eval().requires_grad_(False)
        model.sampler = model.sampler.model_copy(update={"solver": flow_matching.solver_of(config)})
        if extra := read_extra(folder, schedule, ("flow",), (flow_matching.TIME_INPUT,)):
            model.lineage, model.sampler, model.recipe = extra.lineage, extra.sampler, extra.recipe
            model = model.with_size(extra.size)
        elif family.turbo and family.turbo[0] == schedule.shift:
            model.notes += (f"its shift is that of {family.turbo[1]}, which is distilled and no teacher",)
        model.notes += tuple(f"{part} is left out" for part in there if part not in (*family.kinds, *BESIDE))
        check_latents(model, folder)
        return model


def check_options(kind: Any, path: Path) -> None:
    """Raise DistillError if a network's configuration is of another class, or asks for what the installed class does not know."""
    import diffusers

    config, known = read_json(path), inspect.signature(kind.__init__).parameters
    if config.get("_class_name") != kind.__name__:
        raise DistillError(
            f"{path}: _class_name is {json.dumps(config.get('_class_name'))}, not {kind.__name__}", "is it of another model?"
        )
    for key, value in config.items():
        if not key.startswith("_") and key not in known and value not in (None, False):
            unknown = f"{key} is {json.dumps(value)}, which is no option of {kind.__name__} in diffusers {diffusers.__version__}"
            raise DistillError(f"{path}: {unknown}", "is it of another version of the model, or of diffusers?")


FAMILIES: tuple[Family, ...] = (sana.FAMILY, lumina2.FAMILY, z_image.FAMILY, klein.FAMILY)
"""One line a family."""
TRANSFORMERS = tuple(map(TransformerFormat, FAMILIES))

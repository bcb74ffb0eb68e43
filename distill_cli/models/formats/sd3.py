"""Stable Diffusion 3 and 3.5 as StableDiffusion3Pipeline: a transformer on latents, an autoencoder, two CLIP text encoders, T5 or none.

A student is sampled in plain diffusers with its own list of sigmas, so its scheduler shifts nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill_cli.diffusion.shift import Shift
from distill_cli.errors import DistillError
from distill_cli.models import flow_matching, sd3
from distill_cli.models.checks import check_latents, check_vae
from distill_cli.models.formats import folder as shared
from distill_cli.models.formats.card import InDiffusers
from distill_cli.models.formats.extra import read_extra
from distill_cli.models.formats.stable_diffusion import licence_of
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.parts import check_named, load_network, quiet, read_json
from distill_cli.models.sources.hub import PARTS as WEIGHTS
from distill_cli.models.text import Reader, load_fast_tokenizer, load_tokenizer

PIPELINES = ("StableDiffusion3Pipeline",)
T5 = {"text_encoder_3": "T5EncoderModel"}
PARTS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "vae": "AutoencoderKL",
    "transformer": "SD3Transformer2DModel",
}
"""Networks of every folder, the largest last, to keep the peak of memory low; T5 may be absent."""
SNIPPET = """{seed}from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("FOLDER"{without})
{seeded}pipeline("PROMPT", {size}{steps}, guidance_scale={scale:g}).images[0].save("picture.png")
"""

scheduler_of = flow_matching.scheduler_of


def reads(index: dict[str, Any]) -> bool:
    """Whether model_index.json names this pipeline."""
    return index.get("_class_name") in PIPELINES


def fits(model: Model) -> bool:
    """Whether the model's network is this pipeline's."""
    return type(model.net).__name__ == PARTS["transformer"]


def save(model: Model, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder. A square size becomes the transformer's own; another one stands in distill.json and in the card."""
    quiet()
    if model.size is not None and len(set(model.size)) == 1:
        model.net.register_to_config(sample_size=model.size[0])
    networks, absent = model.parts(), [None, None]
    kinds = {**PARTS, **T5}
    libraries = {name: "transformers" if name.startswith("text_encoder") else "diffusers" for name in kinds}
    index = {
        "_class_name": PIPELINES[0],
        **{name: [libraries[name], kind] if name in networks else absent for name, kind in kinds.items()},
        **{name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")},
        "tokenizer_3": ["transformers", "T5TokenizerFast"] if "text_encoder_3" in networks else absent,
        "image_encoder": absent,
        "feature_extractor": absent,
    }

    def parts(temporary: Path) -> None:
        shared.write_parts(model, temporary, kinds, dtype)

    shared.write(model, folder, index, scheduler_of(model), parts, in_diffusers(model))


def in_diffusers(model: Model) -> InDiffusers:
    """The pipeline uses the folder's scheduler; a student's sigmas are given to it.

    It gives FlowMatchLCMScheduler no generator, so the noise between several steps is torch's own.
    """
    sampler = model.sampler
    times = sampler.times_for(model.denoiser.schedule, sampler.solver, sampler.steps).tolist()
    snippet = SNIPPET.format(
        **flow_matching.seeding(model),
        without="" if "text_encoder_3" in model.parts() else ", text_encoder_3=None, tokenizer_3=None",
        size=shared.asked_size(model),
        steps=f"sigmas={times}" if sampler.times else f"num_inference_steps={sampler.steps}",
        scale=sampler.guidance_scale,
    )
    return InDiffusers(snippet, flow_matching.differs(model))


def load(folder: Path, name: str) -> Model:
    """The model in a folder, in float32, evaluation mode, on the CPU. Without distill.json it has the defaults of diffusers' pipeline."""
    import diffusers
    import transformers

    index = read_json(folder / "model_index.json")
    there = {part: entry[1] if isinstance(entry, list) and len(entry) == 2 else None for part, entry in index.items()}
    kinds = {**PARTS, **(T5 if there.get("text_encoder_3") else {})}
    for part, kind in kinds.items():
        if there.get(part) != kind:
            hint = "both CLIP encoders make the pooled text; T5 alone (text_encoder_3) may be absent"
            raise DistillError(f"{folder}: its {part} is {there.get(part) or 'missing'}, not {kind}", hint)
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    schedule = flow_matching.schedule_of(config, str(path), Shift())
    check_named(index, "scheduler", config["_class_name"], path)
    clip = [load_tokenizer(folder / part) for part in ("tokenizer", "tokenizer_2")]
    tokenizers = [*clip, *([load_fast_tokenizer(folder / "tokenizer_3", ("T5Tokenizer",))] if "text_encoder_3" in kinds else [])]
    made: dict[str, Any] = {}
    for part, kind in sorted(kinds.items(), key=lambda item: list(PARTS).index(item[0]) if item[0] in PARTS else -1):
        library = transformers if part.startswith("text_encoder") else diffusers
        made[part] = load_network(getattr(library, kind), folder / part, WEIGHTS[part])
    check_vae(made["vae"], str(folder / "vae"), ("scaling_factor", "shift_factor"))
    lengths = [int(clip[0].model_max_length)] * 2 + [sd3.T5_TOKENS]  # the pipeline takes the first tokenizer's for both
    parts = [part for part in (*PARTS, *T5) if part in made and part.startswith("text_encoder")]
    readers = {part: Reader(words, made[part], count) for part, words, count in zip(parts, tokenizers, lengths, strict=False)}
    check_text(readers, made["transformer"].config.joint_attention_dim, folder)
    model = sd3.assemble(made["transformer"], made["vae"], readers, Lineage(name=name, licence=licence_of(folder)), schedule)
    model.denoiser.eval().requires_grad_(False)
    size = None
    if extra := read_extra(folder, schedule, ("flow",), (flow_matching.TIME_INPUT,)):
        model.lineage, model.sampler, model.recipe, size = extra.lineage, extra.sampler, extra.recipe, extra.size
    model = model.with_size(size)
    if "text_encoder_3" not in kinds:
        model.notes += ("no T5: its place is zeros, as in diffusers",)
    if there.get("image_encoder"):
        model.notes += ("image_encoder is left out",)
    check_latents(model, folder)
    return model


def check_text(readers: dict[str, Reader], width: int, folder: Path) -> None:
    """Raise DistillError for text encoders that read fewer tokens than they get, or make other widths than the transformer reads."""
    clips = [reader.encoder.config for part, reader in readers.items() if part not in T5]
    for config, (part, reader) in zip(clips, readers.items(), strict=False):
        if config.max_position_embeddings < reader.length:
            knows = f"{folder / part}: it reads {config.max_position_embeddings} tokens"
            raise DistillError(f"{knows}, {folder / 'tokenizer'} makes {reader.length} (model_max_length)")
    joined = sum(config.hidden_size for config in clips)
    t5 = readers["text_encoder_3"].encoder.config.d_model if "text_encoder_3" in readers else width
    if joined > width or t5 != width:
        made = f"the CLIP encoders make {joined}, T5 {t5}" if "text_encoder_3" in readers else f"the CLIP encoders make {joined}"
        raise DistillError(f"{folder / 'transformer'}: reads text of width {width}, {made}")

"""Families of text-to-image transformers by flow matching that read one language model: what differs between them is data.

`Family` says what a pipeline's folder holds and how the pipeline calls it; models/formats/transformer.py reads and writes every one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.schedule import FlowSchedule
from distill_cli.diffusion.shift import Shift
from distill_cli.models.backbones import Backbone
from distill_cli.models.codec import VAECodec
from distill_cli.models.installed import class_of
from distill_cli.models.language import MASK, LanguagePrompts, LanguageReader, Wording, make_tokenizer
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler
from distill_cli.models.sd3 import VAE

FLUX_VAE: dict[str, Any] = VAE | dict(scaling_factor=0.3611, shift_factor=0.1159)
"""FLUX.1's autoencoder, which other families have too."""
TINY_VAE: dict[str, Any] = FLUX_VAE | dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64)


class Transformer(Backbone):
    """The adapter of a family's transformer: on latents (B, C, H, W), its time is 1000 t, text and mask its condition."""

    part = "transformer"
    inputs = frozenset({"encoder_hidden_states", MASK})
    resizes: bool = True
    """Whether its configuration's sample_size may become a student's: not where positions are made by it."""
    stack: ClassVar[str] = "transformer_blocks"
    """Its repeated blocks, in the middle of which a discriminator reads."""

    @property
    def multiple(self) -> int:
        return int(self.net.config.get("patch_size", 2))

    @property
    def width(self) -> int:
        """Numbers in a token."""
        return int(self.net.config.num_attention_heads * self.net.config.attention_head_dim)

    def middle(self) -> tuple[nn.Module, int]:
        blocks = getattr(self.net, self.stack)
        return blocks[(len(blocks) - 1) // 2], self.width


@dataclass(frozen=True, eq=False)
class Family:
    """A family. Its networks are loaded in the order text encoder, autoencoder, transformer."""

    pipelines: tuple[str, ...]
    """Pipeline classes that a folder may name; the first is written."""
    since: Mapping[str, str]
    """The versions of diffusers and of transformers that have all of its classes from then on."""
    text_encoder: str
    vae: str
    transformer: str
    """The classes of its networks."""
    backbone: type[Transformer]
    tokenizers: tuple[str, ...]
    """Classes of its tokenizer."""
    wording: Wording
    sampler: Sampler
    """The defaults of the pipeline, with guidance as uncond + scale (cond - uncond)."""
    shift: float
    """That of its published scheduler."""
    codec: type[VAECodec] = VAECodec
    numbers: tuple[str, ...] = ("scaling_factor", "shift_factor")
    """Options of the autoencoder's configuration by which latents are scaled and moved."""
    moving: Shift | None = field(default_factory=Shift)
    """How the pipeline shifts by size, if its scheduler asks for it; None if it cannot."""
    dynamic: bool = False
    """Whether its published scheduler asks for it."""
    ends: Literal["training", "steps"] = "steps"
    """Where times end: "steps" if the pipeline itself gives the scheduler `sigmas` from 1 to 1/N, "training" if only the number N."""
    multistep: bool = False
    """Whether its scheduler may be DPM-Solver++ instead of Euler's steps."""
    less: float = 0.0
    """What the pipeline's own guidance scale is smaller by."""
    called: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline, of teachers and students."""
    turbo: tuple[float, str] | None = None
    """The shift of a distilled member whose folder is like its base's, and its name: a folder with this shift is read with a note."""
    distilled: tuple[str, ...] = ()
    """Keys of model_index.json that are true in distilled members of the family, which are no teachers."""

    @property
    def kinds(self) -> dict[str, str]:
        """The classes of its networks, by their names in the pipeline."""
        return {"text_encoder": self.text_encoder, "vae": self.vae, "transformer": self.transformer}

    def class_of(self, part: str) -> Any:
        """The class of a network, or of the `pipeline`. Raises DistillError if the installed library is older than it."""
        library = "transformers" if part == "text_encoder" else "diffusers"
        return class_of(self.kinds.get(part, self.pipelines[0]), library, self.since[library])

    def assemble(self, networks: Mapping[str, Any], reader: LanguageReader, lineage: Lineage, schedule: FlowSchedule) -> Model:
        """A teacher of these networks."""
        backbone = self.backbone(networks["transformer"])
        denoiser = NetworkDenoiser(backbone, replace(schedule, ends=self.ends), "flow", time_input="1000 t")
        vae = networks["vae"]
        codec = self.codec(vae, upcast=bool(vae.config.get("force_upcast")))
        return Model(denoiser, LanguagePrompts(reader), lineage, self.sampler, codec).with_size(None)

    def scheduled(self) -> FlowSchedule:
        """The schedule of the published folder."""
        if self.dynamic and self.moving:
            return FlowSchedule(1.0).moved(self.moving)
        return FlowSchedule(self.shift)

    def tiny(self, name: str, text: Mapping[str, Any], vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> Model:
        """A model of these configurations with random weights of a fixed seed, made in memory."""
        from distill_cli.data.shapes import TRAINED

        self.class_of("pipeline")
        tokenizer = make_tokenizer([thing.caption for thing in TRAINED], 4096)
        made: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            for seed, (part, config) in enumerate({"text_encoder": text, "vae": vae, "transformer": transformer}.items()):
                torch.manual_seed(seed)
                kind = self.class_of(part)
                options = kind.config_class(vocab_size=len(tokenizer), **config) if part == "text_encoder" else None
                made[part] = (kind(options) if options else kind(**config)).eval().requires_grad_(False)
        reader = LanguageReader(tokenizer, made["text_encoder"], self.wording.length, self.wording)
        return self.assemble(made, reader, Lineage(name=name, licence="Apache-2.0", data="shapes"), self.scheduled())

    def sketch(self, name: str, text: Mapping[str, Any], vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> Model:
        """The architecture of these configurations on the meta device, without weights or vocabulary."""
        with torch.device("meta"):
            encoder = self.class_of("text_encoder")
            made: dict[str, Any] = {"text_encoder": encoder(encoder.config_class(**text)).bfloat16()}  # as they are published
            made |= {part: self.class_of(part)(**config) for part, config in {"vae": vae, "transformer": transformer}.items()}
        reader = LanguageReader(SimpleNamespace(), made["text_encoder"], self.wording.length, self.wording)
        return self.assemble(made, reader, Lineage(name=name), self.scheduled())

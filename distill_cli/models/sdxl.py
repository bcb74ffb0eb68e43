"""Stable Diffusion XL (Podell et al. 2307.01952): the network's adapter, its text and sizes, a tiny model, and the architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distill_cli.config import TextConfig, VAENetworkConfig
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.schedule import TableSchedule
from distill_cli.diffusion.transfer import sent
from distill_cli.models.backbones import UNMET, UNet2DCondition
from distill_cli.models.codec import VAECodec
from distill_cli.models.conditioners import PromptConditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler
from distill_cli.models.schedulers import STABLE_DIFFUSION
from distill_cli.models.sd3 import CLIPS
from distill_cli.models.stable_diffusion import VAE
from distill_cli.models.text import Reader, create_encoder, make_tokenizer

POOLED, SIZES = "text_embeds", "time_ids"
"""Parts of a condition: the pooled text (B, W), and six numbers (B, 6): original height and width, crop's top and left, target's."""
SAMPLER = Sampler(solver="euler", steps=50, guidance_scale=5.0)
"""The defaults of diffusers' pipeline, with the scheduler of the published folder."""
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    **STABLE_DIFFUSION,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "clip_sample": False,
}


class SDXLUNet(UNet2DCondition):
    """A UNet2DConditionModel with addition_embed_type "text_time": it is told the pooled text and six sizes (section 2.2)."""

    unmet = {key: what for key, what in UNMET.items() if key != "addition_embed_type"}

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.inputs |= {POOLED, SIZES}

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Any]:
        added = {name: parts.pop(name) for name in (POOLED, SIZES)}
        return {**parts, "added_cond_kwargs": added}


class SDXLPrompts(PromptConditioner):
    """Prompts through two CLIP encoders: the last states but one of both side by side, and the second's pooled text.

    Conditions say sizes too: by default those of whole pictures of the size that is made, as diffusers' pipeline does. Where no negative
    prompt is given, the null condition has zeros for the text if `zeros`, or else the empty prompt.
    """

    def __init__(self, readers: Mapping[str, Reader], zeros: bool) -> None:
        first, second = (reader.encoder.config for reader in readers.values())
        self.usual = self.negative = None if zeros else ""
        self.sizes: tuple[int, ...] = (0,) * 6
        self.framing: tuple[int, ...] | None = None
        length = next(iter(readers.values())).length
        self._reads(readers, {self.part: (length, first.hidden_size + second.hidden_size), POOLED: (second.projection_dim,)})

    def encoded(self, prompts: Sequence[str]) -> Condition:
        answers = [each.encoder(sent(each.tokens(prompts), each.place), output_hidden_states=True) for each in self.readers.values()]
        return Condition({self.part: torch.cat([answer.hidden_states[-2] for answer in answers], -1), POOLED: answers[1][0]})

    def sized(self, height: int, width: int) -> SDXLPrompts:
        out = copy.copy(self)
        out.sizes = (height, width, 0, 0, height, width)
        return out

    def framed(self, original: tuple[int, int], crop: tuple[int, int] = (0, 0), target: tuple[int, int] | None = None) -> SDXLPrompts:
        """The conditioner that says other sizes than those of the pictures made: (height, width), and the crop's (top, left), in pixels.

        Without `target` it is the size of the pictures. The same goes for the null condition, as in diffusers' pipeline.
        """
        out = copy.copy(self)
        out.framing = (*original, *crop, *(target or ()))
        return out

    @property
    def said(self) -> tuple[int, ...]:
        """The six sizes that conditions say."""
        framing = self.framing or ()
        return framing + self.sizes[len(framing) :]

    def _with_sizes(self, condition: Condition) -> Condition:
        like = condition.parts[POOLED]
        return condition.plus(SIZES, torch.tensor(self.said, dtype=torch.float32, device=like.device).expand(len(like), -1))

    def of(self, labels: Tensor) -> Condition:
        return self._with_sizes(super().of(labels))

    @property
    def null(self) -> Condition:
        return self._with_sizes(super().null)

    def example(self, count: int, device: str | torch.device) -> Condition:
        return self._with_sizes(super().example(count, device))


def codec_of(vae: Any) -> VAECodec:
    """The codec of an autoencoder, which may say that it wants float32 (`force_upcast`)."""
    return VAECodec(vae, upcast=bool(vae.config.force_upcast))


def assemble(unet: Any, vae: Any, readers: Mapping[str, Reader], lineage: Lineage) -> Model:
    """A teacher of these networks, with the schedule and the null prompt of the published folder."""
    denoiser = NetworkDenoiser(SDXLUNet(unet), TableSchedule.from_config(SCHEDULER), "eps", Scales(), "t")
    return Model(denoiser, SDXLPrompts(readers, zeros=True), lineage, SAMPLER, codec_of(vae), dict(SCHEDULER)).with_size(None)


def tiny() -> Model:
    """Stable Diffusion XL's parts, 64x64 pictures, with random weights, made in memory: for smoke runs."""
    import diffusers

    from distill_cli.data.shapes import TRAINED
    from distill_cli.models import autoencoder

    tokenizer = make_tokenizer((thing.caption for thing in TRAINED), 16)
    vae = autoencoder.create(64, 3, VAENetworkConfig(channels=[8, 8, 8, 8], groups=4), 0).vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=0.13025)
    first = create_encoder(TextConfig(width=12, layers=2, heads=2), tokenizer, 0)
    second = create_encoder(TextConfig(width=16, layers=2, heads=2), tokenizer, 1, "CLIPTextModelWithProjection")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            **NETWORK | dict(
                sample_size=8, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=28,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2), attention_head_dim=(2, 2), addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64,
            ),
        )  # fmt: skip
    encoders = {"text_encoder": first, "text_encoder_2": second}
    readers = {name: Reader(tokenizer, encoder.eval().requires_grad_(False), 16) for name, encoder in encoders.items()}
    return assemble(unet, vae, readers, Lineage(name="tiny-sdxl", licence="Apache-2.0", data="shapes"))


NETWORK: dict[str, Any] = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


def sketch(name: str) -> Model:
    """The architecture on the meta device, without weights or vocabulary."""
    import diffusers
    import transformers

    kinds = {"text_encoder": transformers.CLIPTextModel, "text_encoder_2": transformers.CLIPTextModelWithProjection}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**NETWORK)
        vae = diffusers.AutoencoderKL(**VAE, sample_size=1024, scaling_factor=0.13025)
        encoders = {part: kind(transformers.CLIPTextConfig(**CLIPS[part])) for part, kind in kinds.items()}
    readers = {part: Reader(SimpleNamespace(), encoder, 77) for part, encoder in encoders.items()}
    return assemble(unet, vae, readers, Lineage(name=name))

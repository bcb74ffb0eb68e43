"""Stable Diffusion 3 and 3.5 (Esser et al. 2403.03206): the transformer's adapter, its text, a tiny model, and architectures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from distill_cli.config import TextConfig, VAENetworkConfig
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.schedule import FlowSchedule
from distill_cli.models.backbones import Backbone
from distill_cli.models.codec import VAECodec
from distill_cli.models.conditioners import PromptConditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler
from distill_cli.models.text import Reader, create_encoder, make_tokenizer

T5_TOKENS = 256
"""Tokens that T5 reads: the default of diffusers' pipeline."""
SAMPLER = Sampler(solver="euler", steps=28, guidance_scale=7.0)
"""The defaults of diffusers' pipeline."""
SHIFT = 3.0


class SD3Transformer(Backbone):
    """diffusers' SD3Transformer2DModel on latents (B, C, H, W); its time is 1000 t."""

    part = "transformer"
    comfyui = "ModelSamplingSD3"
    inputs = frozenset({"encoder_hidden_states", "pooled_projections"})
    blocks = ("JointTransformerBlock",)
    lora = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    widths: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_states": "joint_attention_dim",
        "pooled_projections": "pooled_projection_dim",
    }

    @property
    def multiple(self) -> int:
        return int(self.net.config.patch_size)

    @property
    def most(self) -> float:
        """Positions are cut out of a table."""
        return self.net.config.patch_size * (self.net.config.pos_embed_max_size or float("inf"))

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.net(x, timestep=time, **condition.parts, return_dict=False)[0]

    def middle(self) -> tuple[nn.Module, int]:
        return self.net.transformer_blocks[(len(self.net.transformer_blocks) - 1) // 2], self.net.inner_dim

    def features(self, answer: Any, x: Tensor, condition: Condition) -> Tensor:
        """The tokens of the picture; the block answers with those of the text before them."""
        return answer[1]


class SD3Prompts(PromptConditioner):
    """Prompts through two CLIP encoders and T5, which may be absent.

    The last states but one of both CLIPs, side by side and padded to `width`, then T5's states: without T5 zeros, as in diffusers.
    The pooled projections of both CLIPs, side by side.
    """

    pooled = "pooled_projections"

    def __init__(self, readers: Mapping[str, Reader], width: int) -> None:
        self.clips, self.t5 = [readers["text_encoder"], readers["text_encoder_2"]], readers.get("text_encoder_3")
        self.width = width
        tokens = self.clips[0].length + T5_TOKENS
        self._reads(readers, {self.part: (tokens, width), self.pooled: (sum(each.encoder.config.projection_dim for each in self.clips),)})

    def encoded(self, prompts: Sequence[str]) -> Condition:
        answers = [each.encoder(each.tokens(prompts).to(each.place), output_hidden_states=True) for each in self.clips]
        clip = torch.cat([answer.hidden_states[-2] for answer in answers], -1)
        clip = pad(clip, (0, self.width - clip.shape[-1]))
        if self.t5 is None:
            t5 = clip.new_zeros(len(clip), T5_TOKENS, self.width)
        else:
            t5 = self.t5.encoder(self.t5.tokens(prompts).to(self.t5.place))[0]
        return Condition({self.part: torch.cat([clip, t5], -2), self.pooled: torch.cat([answer[0] for answer in answers], -1)})


def assemble(transformer: Any, vae: Any, readers: Mapping[str, Reader], lineage: Lineage, schedule: FlowSchedule) -> Model:
    """A teacher of these networks."""
    denoiser = NetworkDenoiser(SD3Transformer(transformer), schedule, "flow", time_input="1000 t")
    return Model(denoiser, SD3Prompts(readers, transformer.config.joint_attention_dim), lineage, SAMPLER, VAECodec(vae))


def tiny() -> Model:
    """Stable Diffusion 3's parts without T5, 64x64 pictures, with random weights, made in memory: for smoke runs."""
    import diffusers

    from distill_cli.data.shapes import TRAINED
    from distill_cli.models import autoencoder

    tokenizer = make_tokenizer((thing.caption for thing in TRAINED), 16)
    vae = (
        autoencoder.create(64, 3, VAENetworkConfig(channels=[8, 8, 8, 8], groups=4, latent_channels=16), 0).vae.eval().requires_grad_(False)
    )
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    texts = {"text_encoder": TextConfig(width=12, layers=2, heads=2), "text_encoder_2": TextConfig(width=16, layers=2, heads=2)}
    encoders = {
        name: create_encoder(text, tokenizer, seed, "CLIPTextModelWithProjection") for seed, (name, text) in enumerate(texts.items())
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=28,
            pos_embed_max_size=16,
        )
    readers = {name: Reader(tokenizer, encoder.eval().requires_grad_(False), 16) for name, encoder in encoders.items()}
    return assemble(transformer, vae, readers, Lineage(name="tiny-sd3", licence="Apache-2.0", data="shapes"), FlowSchedule(SHIFT))


TRANSFORMER: dict[str, Any] = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd3-medium": dict(TRANSFORMER, pos_embed_max_size=192),
    "sd35-large": dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"),
    "sd35-medium": dict(TRANSFORMER, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
}
CLIPS: dict[str, dict[str, Any]] = {
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768),
    "text_encoder_2": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280),
}
T5: dict[str, Any] = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
    sample_size=1024,
)


def sketch(name: str) -> Model:
    """The architecture of `name` on the meta device, T5 among its parts, without weights or vocabulary."""
    import diffusers
    import transformers

    with torch.device("meta"):
        transformer = diffusers.SD3Transformer2DModel(**TRANSFORMERS[name])
        vae = diffusers.AutoencoderKL(**VAE)
        encoders: dict[str, Any] = {
            part: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)) for part, config in CLIPS.items()
        }
        encoders["text_encoder_3"] = transformers.T5EncoderModel(transformers.T5Config(**T5))
    lengths = dict.fromkeys(CLIPS, 77) | {"text_encoder_3": T5_TOKENS}
    readers = {part: Reader(SimpleNamespace(), encoder, lengths[part]) for part, encoder in encoders.items()}
    return assemble(transformer, vae, readers, Lineage(name=name), FlowSchedule(SHIFT))

"""The networks of the published EDM checkpoints, built from diffusers' blocks.

One class covers the three architectures of Karras et al. 2022 (2206.00364, appendix F.6): DDPM++ and NCSN++ (Song et
al. 2011.13456) and ADM (Dhariwal & Nichol 2105.05233). It is an ordinary diffusers model: from_pretrained,
save_pretrained, `network(c_in x, ln(sigma) / 4, class_labels=labels)`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

FIR = (1, 3, 3, 1)


def groups(channels: int) -> int:
    """Groups of group normalisation: 32, fewer where a group would have under four channels."""
    return min(32, channels // 4)


class Block(nn.Module):
    """A residual block, with self-attention after it where `heads` is given."""

    def __init__(self, into: int, out: int, embedding: int, *, adm: bool, fir: bool, dropout: float, heads: int, sample: str) -> None:
        super().__init__()
        eps, scale = (1e-5, 1.0) if adm else (1e-6, math.sqrt(2))
        self.resnet = ResnetBlock2D(
            in_channels=into,
            out_channels=out,
            temb_channels=embedding,
            groups=groups(into),
            groups_out=groups(out),
            eps=eps,
            dropout=dropout,
            skip_time_act=True,
            time_embedding_norm="scale_shift" if adm else "default",
            kernel="fir" if fir else None,
            output_scale_factor=scale,
            use_in_shortcut=into != out or (bool(sample) and not adm),
            up=sample == "up",
            down=sample == "down",
        )
        self.attention = None
        if heads:
            self.attention = Attention(
                out,
                heads=heads,
                dim_head=out // heads,
                norm_num_groups=groups(out),
                eps=eps,
                bias=True,
                residual_connection=True,
                rescale_output_factor=scale,
                upcast_softmax=True,
                _from_deprecated_attn_block=True,
            )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnet(x, embedding)
        return x if self.attention is None else self.attention(x)


class EDMUNet(ModelMixin, ConfigMixin):
    """ADM where `adm` is set, else DDPM++; NCSN++ has `fourier`, `residual` and `fir` set and noise_mult 2.

    fourier: random Fourier features of the noise level. residual: the input, downsampled, is added at every resolution.
    fir: resampling by [1, 3, 3, 1] instead of averages and copies. embedding_mult, noise_mult: widths of the embedding and
    of the noise features over model_channels. Blocks are named as in the published files, such as enc["16x16_block0"].
    `num_class_embeds` counts the classes and the null class, which is the last label.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 3,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        num_blocks: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        embedding_mult: int = 4,
        noise_mult: int = 1,
        adm: bool = False,
        fourier: bool = False,
        residual: bool = False,
        fir: bool = False,
        num_class_embeds: int | None = None,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        embedding, width = embedding_mult * model_channels, noise_mult * model_channels
        last = len(channel_mult) - 1

        def block(into: int, out: int, attend: bool = False, sample: str = "") -> Block:
            heads = (out // 64 if adm else 1) if attend else 0
            return Block(into, out, embedding, adm=adm, fir=fir, dropout=dropout, heads=heads, sample=sample)

        if fourier:
            self.register_buffer("frequencies", torch.zeros(width // 2))
        self.map_layer0, self.map_layer1 = nn.Linear(width, embedding), nn.Linear(embedding, embedding)
        if num_class_embeds:
            self.map_label = nn.Linear(num_class_embeds - 1, embedding if adm else width, bias=not adm)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        out = model_channels * (channel_mult[0] if adm else 1)
        self.conv_in = nn.Conv2d(in_channels, out, 3, padding=1)
        skips = [out]
        for level, mult in enumerate(channel_mult):
            size = sample_size >> level
            if level:
                self.enc[f"{size}x{size}_down"] = block(out, out, sample="down")
                if residual:
                    before = in_channels if level == 1 else model_channels * channel_mult[level - 2]
                    self.enc[f"{size}x{size}_aux_residual"] = FirDownsample2D(before, out, use_conv=True, fir_kernel=FIR if fir else (1, 1))
                skips.append(out)
            for k in range(num_blocks):
                self.enc[f"{size}x{size}_block{k}"] = block(out, model_channels * mult, size in attention_resolutions)
                out = model_channels * mult
                skips.append(out)
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = sample_size >> level
            if level == last:
                self.dec[f"{size}x{size}_in0"] = block(out, out, True)
                self.dec[f"{size}x{size}_in1"] = block(out, out)
            else:
                self.dec[f"{size}x{size}_up"] = block(out, out, sample="up")
            for k in range(num_blocks + 1):
                attend = size in attention_resolutions and (adm or k == num_blocks)
                self.dec[f"{size}x{size}_block{k}"] = block(out + skips.pop(), model_channels * mult, attend)
                out = model_channels * mult
        self.norm_out = nn.GroupNorm(groups(out), out, eps=1e-5 if adm else 1e-6)
        self.conv_out = nn.Conv2d(out, in_channels, 3, padding=1)

    def embed(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """(B, embedding_mult model_channels) from c_noise (B,) and labels (B,)."""
        config: Any = self.config
        adm = config.adm
        half = self.map_layer0.in_features // 2
        if config.fourier:
            frequencies = 2 * math.pi * self.frequencies.to(noise)
        else:
            steps = torch.arange(half, dtype=noise.dtype, device=noise.device)
            frequencies = 10000 ** (-steps / (half - (0 if adm else 1)))
        angles = noise[:, None] * frequencies
        pair = (angles.cos(), angles.sin()) if adm else (angles.sin(), angles.cos())
        x = torch.cat(pair, 1).to(self.map_layer0.weight.dtype)
        label = 0.0
        if config.num_class_embeds:
            known = config.num_class_embeds - 1
            labels = torch.full((len(noise),), known, device=noise.device) if labels is None else labels
            one_hot = F.one_hot(labels, known + 1)[:, :known].to(x)
            label = self.map_label(one_hot if adm else one_hot * math.sqrt(known))
        if not adm:
            x = x + label
        x = self.map_layer1(F.silu(self.map_layer0(x)))
        return F.silu(x + label if adm else x)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = False) -> tuple[Tensor]:
        """sample (B, C, H, W), timestep c_noise (B,) or a scalar, class_labels (B,) -> the raw prediction (B, C, H, W)."""
        noise = torch.as_tensor(timestep, device=sample.device)
        noise = noise.to(torch.promote_types(sample.dtype, torch.float32)).expand(len(sample))
        embedding = self.embed(noise, class_labels)
        aux = sample
        x = self.conv_in(sample)
        skips = [x]
        for name, module in self.enc.items():
            if name.endswith("aux_residual"):  # NCSN++ feeds the downsampled input in at every resolution
                x = skips[-1] = aux = (x + module(aux)) / math.sqrt(2)
            else:
                x = module(x, embedding)
                skips.append(x)
        for name, module in self.dec.items():
            x = module(torch.cat([x, skips.pop()], 1) if "_block" in name else x, embedding)
        return (self.conv_out(F.silu(self.norm_out(x))),)

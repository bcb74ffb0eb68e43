"""diffusers' networks as a denoiser calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.diffusion.condition import Condition


class TimeFeatures(nn.Module):
    """diffusers' sines and cosines of the time, computed in float64: at 250 ln sigma float32 is wrong in the fifth digit."""

    def __init__(self, channels: int, flip: bool, shift: float) -> None:
        super().__init__()
        self.count, self.flip, self.shift = channels // 2, flip, shift

    def forward(self, time: Tensor) -> Tensor:
        steps = torch.arange(self.count, dtype=torch.float64, device=time.device)
        angles = time.double()[:, None] * 10000 ** (-steps / (self.count - self.shift))
        pair = (angles.cos(), angles.sin()) if self.flip else (angles.sin(), angles.cos())
        return torch.cat(pair, 1).to(torch.promote_types(time.dtype, torch.float32))


class UNet(nn.Module):
    """diffusers' UNet2DModel, UNet2DConditionModel, or EDMUNet, as `network(x, time, condition)`."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        config = unet.config
        self.takes = "encoder_hidden_states" if getattr(config, "cross_attention_dim", None) else "class_labels"
        sines = self.takes == "class_labels" and getattr(config, "time_embedding_type", "") == "positional"
        if sines and config.block_out_channels[0] % 2 == 0:
            unet.time_proj = TimeFeatures(config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.unet(x, time, **condition.parts, return_dict=False)[0]

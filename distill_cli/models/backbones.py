"""Backbones: one adapter for each class of networks, called alike by denoisers."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill_cli.diffusion.condition import GUIDANCE_SCALE, Condition
from distill_cli.errors import DistillError, UsageError
from distill_cli.tensors import store_matrices

UNMET = {
    "addition_embed_type": "further conditions beside the text, such as SDXL's sizes",
    "class_embed_type": "a class condition of another kind than labels",
    "encoder_hid_dim_type": "text projected by a layer of another kind",
    "class_embeddings_concat": "class conditions beside the text",
}

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv")
"""The layers of a UNet's attention, residual blocks and resampling, as in the LoRA of Luo et al. 2311.05556."""


class Backbone(nn.Module):
    """A network of one family: `backbone(x, time, condition)` is its raw prediction, (B, C, H, W) from x (B, C, H, W) and time (B,).

    `time` is t as the denoiser's row of TIME_INPUTS gives it. A family with another scale or sign of time converts it in `forward`, where
    it also packs and unpacks data that are not (B, C, H, W). The network is registered under `part`: checkpoints have `unet.…`.
    """

    part: str = "unet"
    """Its name in a diffusers pipeline."""
    inputs: frozenset[str] = frozenset({"class_labels"})
    """The parts of a condition that the network takes."""
    blocks: ClassVar[tuple[str, ...]] = ()
    """Classes of its repeated blocks, which are compiled each for itself."""
    unmet: ClassVar[Mapping[str, str]] = UNMET
    """Options of a network's configuration that ask for inputs which are not supported, and what each wants."""
    widths: ClassVar[Mapping[str, str]] = {}
    """Parts of a condition, and the option of the network's configuration that says the width of each."""
    lora: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of the layers that a LoRA usually changes; a network need not have all of them."""
    usual: int | None = None
    """The width of its data where its configuration says no sample_size: that of the pipeline."""
    halves: bool = False
    """Whether it may answer with twice the channels, of which the first half is the prediction."""
    comfyui: ClassVar[str | None] = None
    """ComfyUI's node that shifts times in flow matching; '' if its schedulers take others, None if it reads no such student."""
    dial: ClassVar[bool] = False
    """Whether there is a place for a guidance scale as a further input (`told`)."""
    weight_type: torch.dtype | None = None
    """The number type of its weights if they are stored in half precision: all calls then run in it."""
    quantized: bool = False
    """Whether its matrices are stored as integers, which autocast does not know: what comes in gets the type of the other weights."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.add_module(self.part, net)

    @property
    def net(self) -> Any:
        return getattr(self, self.part)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) for which the network was made."""
        size: Any = self.net.config.get("sample_size", self.usual)
        height, width = (size, size) if isinstance(size, int) else size
        return self.net.config.in_channels, height, width

    @property
    def multiple(self) -> int:
        """H and W have to be multiples of this."""
        return 2 ** (len(self.net.config.block_out_channels) - 1)

    @property
    def most(self) -> float:
        """The largest H and W."""
        return math.inf

    def tokens(self, shape: tuple[int, int, int]) -> int:
        """Of how many tokens a pipeline takes data of `shape` (C, H, W) to be, where it shifts times by that."""
        return shape[1] * shape[2] // self.multiple**2

    def __call__(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        if self.quantized and self.weight_type is None:
            given = condition.map(lambda part: part.float() if part.is_floating_point() else part)
            with torch.autocast(x.device.type, enabled=False):
                return super().__call__(x.float(), time, given)
        if self.weight_type is None or torch.is_autocast_enabled(x.device.type):
            return super().__call__(x, time, condition)
        with torch.autocast(x.device.type, self.weight_type):
            return super().__call__(x, time, condition)

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.net(x, time, **condition.parts, return_dict=False)[0]

    def middle(self) -> tuple[nn.Module, int]:
        """The layer whose answer a discriminator reads, half-way through the network, and the answer's width."""
        raise UsageError(f"gan: no layer of a {type(self.net).__name__} is known for a discriminator", "gan=none")

    def features(self, answer: Any, x: Tensor, condition: Condition) -> Tensor:
        """The answer of that layer as (B, N, width): N places of pictures (B, width, H, W), or tokens. `x`, `condition`: what was asked."""
        return answer.flatten(2).mT if answer.ndim == 4 else answer

    def cast(self, dtype: torch.dtype | None) -> None:
        """Store the network's matrices in half precision (tensors.store_matrices); None: in float32."""
        if dtype == self.weight_type or self.quantized:
            return
        store_matrices(self.net, dtype)
        self.weight_type = dtype

    def quantize(self) -> None:
        """Store the matrices of linear layers as 8-bit integers with a scale a row, by torchao. Raises UsageError without it."""
        if self.quantized:
            return
        if importlib.util.find_spec("torchao") is None:
            raise UsageError("quantize int8: torchao is not installed", "pip install 'distill-cli[lowmem]'")
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import warns of its own calls
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(self.net, Int8WeightOnlyConfig())
        self.quantized = True

    def checkpointing(self) -> None:
        """Compute activations again in the backward pass."""
        self.net.enable_gradient_checkpointing()

    def weights(self) -> dict[str, Tensor]:
        """The network's own weights by its own names, also where peft has put adapters beside them."""
        return {name.replace(".base_layer.", "."): value for name, value in self.net.state_dict().items() if ".lora_" not in name}

    def fresh(self, **changes: Any) -> Backbone:
        """A new network of the same configuration, but for `changes`: on the meta device it costs nothing."""
        return type(self)(type(self.net).from_config(self.net.config, **changes))

    def tensors(self) -> dict[str, Tensor]:
        """The LoRA that lies on the network, under peft's names (models/lora.py); {} if there is none."""
        return {}

    def merged(self) -> Backbone:
        """The network with the LoRA that lies on it added to its weights; itself if there is none."""
        return self

    def told(self) -> Backbone:
        """The network with a guidance scale as a further input, not heeded yet. Raises UsageError for networks without a place for it."""
        raise UsageError(
            f"guidance_range: a {type(self.net).__name__} cannot be told a guidance scale", "guidance_scale=S fixes one inside"
        )

    def check(self, where: str) -> None:
        """Raise DistillError if the configuration asks for unsupported inputs, or gives outputs of another shape."""
        config = self.net.config
        for key, wanted in self.unmet.items():
            if config.get(key):
                asks = f"{key} is {json.dumps(config[key])}: the network wants {wanted}"
                raise DistillError(f"{where}: {asks}", "such models are not read yet")
        size, given = config.get("sample_size", self.usual), config["in_channels"]
        if size is None:
            unknown = "does not say its sample_size, so how large its pictures are is not known"
            raise DistillError(f"{where}: {unknown}", "add it to config.json")
        sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size,)
        if not all(type(side) is int and side > 0 for side in sides):
            raise DistillError(f"{where}: sample_size is {json.dumps(size)}, a whole number above 0 or two of them are expected")
        made = config.get("out_channels") or given
        if made != given and not (self.halves and made == 2 * given):
            why = ": its variance is learned too, which is not read" if made == 2 * given else ""
            hint = "the network must have as many output as input channels"
            raise DistillError(f"{where}: {given} channels go in and {made} come out{why}", hint)


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


def middle_block(net: Any) -> tuple[nn.Module, int]:
    """The block between the halves of a diffusers UNet, where its answer is smallest, and the width of that."""
    if net.mid_block is None:
        raise UsageError("gan: the network has no middle block, which a discriminator reads", "gan=none")
    return net.mid_block, net.config.block_out_channels[-1]


class UNet2D(Backbone):
    """diffusers' UNet2DModel: pixels, with or without classes."""

    blocks = ("ResnetBlock2D", "Attention")
    lora = LAYERS

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        config = net.config
        if config.time_embedding_type == "positional" and config.block_out_channels[0] % 2 == 0:
            net.time_proj = TimeFeatures(config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)

    def middle(self) -> tuple[nn.Module, int]:
        return middle_block(self.net)


def embedded(scale: Tensor, width: int) -> Tensor:
    """(B, width) sines and cosines of 1000 w, as latent consistency models are told w = scale - 1 (Luo et al. 2310.04378), in float64."""
    steps = torch.arange(width // 2, dtype=torch.float64, device=scale.device)
    angles = 1000 * (scale.double()[:, None] - 1) * 10000 ** (-steps / (width // 2 - 1))
    return torch.cat([angles.sin(), angles.cos()], 1)


class UNet2DCondition(Backbone):
    """diffusers' UNet2DConditionModel, the text-conditioned network of Stable Diffusion. With `time_cond_proj_dim` it is told a scale."""

    comfyui = "ModelSamplingSD3"
    WIDTH = 256
    """The width of the scale's embedding in published latent consistency models."""
    dial = True
    blocks = ("ResnetBlock2D", "BasicTransformerBlock")
    lora = (*LAYERS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
    widths: ClassVar[Mapping[str, str]] = {"encoder_hidden_states": "cross_attention_dim"}
    unmet = UNMET | {"num_class_embeds": "class labels beside the text"}

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.inputs = frozenset({"encoder_hidden_states", *([GUIDANCE_SCALE] if net.config.time_cond_proj_dim else [])})

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        parts, width = dict(condition.parts), self.net.config.time_cond_proj_dim
        if width:
            parts["timestep_cond"] = embedded(parts.pop(GUIDANCE_SCALE), width).to(x.dtype)
        return self.net(x, time, **self.arguments(parts), return_dict=False)[0]

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Any]:
        """The network's arguments for the parts of a condition."""
        return parts

    def middle(self) -> tuple[nn.Module, int]:
        return middle_block(self.net)

    def told(self) -> Backbone:
        """Its weights of the embedding begin at zero."""
        if self.net.config.time_cond_proj_dim:
            return self
        with torch.device(next(self.parameters()).device), torch.random.fork_rng(devices=[]):
            out = self.fresh(time_cond_proj_dim=self.WIDTH)
        new = out.net.time_embedding.cond_proj.weight
        nn.init.zeros_(new)
        out.load_state_dict({**self.state_dict(), f"{self.part}.time_embedding.cond_proj.weight": new})
        return out


class EDM(Backbone):
    """NVlabs' networks (models/edm.py)."""

    blocks = ("Block",)
    lora = LAYERS

    @property
    def multiple(self) -> int:
        return 2 ** (len(self.net.config.channel_mult) - 1)

    def middle(self) -> tuple[nn.Module, int]:
        """The last block of the encoder."""
        config = self.net.config
        return list(self.net.enc.values())[-1], config.model_channels * config.channel_mult[-1]


BACKBONES: dict[str, type[Backbone]] = {"UNet2DModel": UNet2D, "UNet2DConditionModel": UNet2DCondition, "EDMUNet": EDM}
"""The backbones, by the name of the network's class."""


def backbone_of(net: Any) -> Backbone:
    """The backbone of a network. Raises KeyError for an unknown class."""
    return BACKBONES[type(net).__name__](net)

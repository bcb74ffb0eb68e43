"""Names of LoRA tensors in the layouts of diffusers, peft and kohya's scripts, which ComfyUI reads too.

All follow from the names of a model's layers, so a file's key has exactly one layer, or none. kohya's scripts name the layers of Stable
Diffusion 1 and 2 as diffusers does, and those of XL as the original layout; ComfyUI and diffusers read both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from distill_cli.models.original import replaced, unet_names
from distill_cli.models.parts import plain

Half = Literal["down", "up", "alpha"]
HALVES: dict[str, Half] = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up", "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",
}  # fmt: skip
"""Ends of keys: peft, three forms of diffusers before 2024, kohya. `down` (A) is (rank, in), `up` (B) is (out, rank)."""
KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
"""What kohya's names of a part's layers begin with; te1 where there are two encoders."""
OLD = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v",
       "out_proj": "to_out"}  # fmt: skip
"""Projections of attention, and their names in diffusers' files of 2023."""


class Layer(NamedTuple):
    """A layer that a LoRA changes: a part of a pipeline, and the module's name inside of it."""

    part: str
    module: str


def kohya_name(layer: Layer, names: Mapping[str, str] | None = None) -> str:
    """The layer's name in kohya's layout; `names` are those of the original layout (`unet_names`), if it goes by them."""
    module = layer.module if names is None else replaced(layer.module, names)
    return KOHYA[layer.part][0] + module.replace(".", "_")


def layers_of(parts: Mapping[str, Any]) -> dict[str, Layer]:
    """The linear layers and convolutions of a model's networks, by all names that files have for them."""
    out: dict[str, Layer] = {}
    for part, network in parts.items():
        names = unet_names(network.config) if part == "unet" and isinstance(network.config.get("layers_per_block"), int) else {}
        for module, layer in network.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            own = {module} if not part.startswith("text_encoder") else {plain(module), f"text_model.{plain(module)}"}
            place = Layer(part, module)
            for name in own:
                out[f"{part}.{name}"] = place
                for last, old in OLD.items():
                    if name.endswith(f".{last}"):
                        head = f"{part}.{name.removesuffix(last)}"
                        out |= {f"{head}{old}": place, f"{head}processor.{old}": place}
            for beginning in KOHYA.get(part, ()):
                out |= dict.fromkeys((beginning + name.replace(".", "_") for name in own), place)
            if names:
                out[kohya_name(place, names)] = place
    return out


def split(key: str) -> tuple[str, Half] | None:
    """The name of a layer and the half of its LoRA that a key holds; None for a key that is no LoRA's."""
    end = next((end for end in HALVES if key.endswith(end)), None)
    return None if end is None else (key.removesuffix(end), HALVES[end])

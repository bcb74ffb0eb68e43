"""OpenAI's UNet of consistency_models (Song et al. 2303.01469): its layout in diffusers, and facts that its files lack."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill_cli.errors import DistillError

OPENAI = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut", "norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0",
}  # fmt: skip
PUBLISHED_BY_OPENAI = {
    **dict.fromkeys(("edm_imagenet64_ema", "cd_imagenet64_l2", "cd_imagenet64_lpips", "ct_imagenet64"), 64),
    **dict.fromkeys(("edm_bedroom256_ema", "cd_bedroom256_l2", "cd_bedroom256_lpips", "ct_bedroom256"), 256),
    **dict.fromkeys(("edm_cat256_ema", "cd_cat256_l2", "cd_cat256_lpips", "ct_cat256"), 256),
}
"""Resolutions of OpenAI's files by name. Their attention heads have 64 channels; edm_ are teachers, cd_ and ct_ students."""


def blocks(value: Tensor, heads: int) -> list[Tensor]:
    """q, k, v from OpenAI's attention, where they are three blocks."""
    return list(value.chunk(3))


def openai_network(tensors: Mapping[str, Tensor], size: int, head: int = 64) -> tuple[Any, Callable[[str], str]]:
    """A UNet2DModel like OpenAI's scale-shift ResNet UNet, and the places of the file's tensors in it, all from the shapes."""
    import diffusers

    def count(section: str) -> int:
        found = {int(name.split(".")[1]) for name in tensors if name.startswith(f"{section}.")}
        if found != set(range(len(found))):
            raise DistillError(f"{section} are not numbered from 0")
        return len(found)

    def has(name: str) -> bool:
        return f"{name}.weight" in tensors

    entries = count("input_blocks")
    if count("output_blocks") != entries or not has("input_blocks.0.0"):
        raise DistillError("the blocks do not add up to OpenAI's UNet")
    # a level of the output ends with a residual block that resamples
    ups = [i for i in range(entries) for k in (1, 2) if has(f"output_blocks.{i}.{k}.in_layers.0")]
    residual = ups[0] if ups else entries - 1
    levels = entries // (residual + 1)
    first = [1 + level * (residual + 1) for level in range(levels)]  # the first input block of each level
    widths = [tensors[f"input_blocks.{i}.0.out_layers.0.weight"].shape[0] for i in first]
    attention = [has(f"input_blocks.{i}.1.qkv") for i in first]
    if any(on and width % head for on, width in zip(attention, widths, strict=True)) or widths[-1] % head:
        raise DistillError(f"attention of {widths[-1]} channels has no heads of {head}", "--head-channels gives their width")
    labels = tensors.get("label_emb.weight")
    scale_shift = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
    with torch.device("meta"):
        network = diffusers.UNet2DModel(
            sample_size=size,
            in_channels=tensors["input_blocks.0.0.weight"].shape[1],
            out_channels=tensors["out.2.weight"].shape[0],
            block_out_channels=tuple(widths),
            layers_per_block=residual,
            down_block_types=tuple("AttnDownBlock2D" if on else "ResnetDownsampleBlock2D" for on in attention),
            up_block_types=tuple("AttnUpBlock2D" if on else "ResnetUpsampleBlock2D" for on in reversed(attention)),
            downsample_type="resnet",
            upsample_type="resnet",
            attention_head_dim=head,
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift" if scale_shift else "default",
            num_class_embeds=len(labels) if labels is not None else None,
        )
    fixed = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0", "middle_block.2": "mid_block.resnets.1",
    }  # fmt: skip
    for level in range(levels):
        for k in range(residual):
            fixed[f"input_blocks.{first[level] + k}.0"] = f"down_blocks.{level}.resnets.{k}"
            fixed[f"input_blocks.{first[level] + k}.1"] = f"down_blocks.{level}.attentions.{k}"
        fixed[f"input_blocks.{first[level] + residual}.0"] = f"down_blocks.{level}.downsamplers.0"
        for k in range(residual + 1):
            i = level * (residual + 1) + k
            attends = attention[levels - 1 - level]
            fixed[f"output_blocks.{i}.0"] = f"up_blocks.{level}.resnets.{k}"
            fixed[f"output_blocks.{i}.1"] = f"up_blocks.{level}.{f'attentions.{k}' if attends else 'upsamplers.0'}"
            fixed[f"output_blocks.{i}.2"] = f"up_blocks.{level}.upsamplers.0"

    def rename(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        parts = stem.split(".")
        for cut in range(len(parts), 0, -1):
            module = fixed.get(".".join(parts[:cut]))
            if module:
                rest = ".".join(parts[cut:])
                return ".".join(part for part in (module, OPENAI.get(rest, rest), kind) if part)
        return name

    return network, rename


def settle_openai(name: str, size: int | None, head: int | None, kind: str | None) -> tuple[int, int, bool, tuple[str, ...]]:
    """Resolution, head width and kind (student or not) of an OpenAI file, and which of these are assumed.

    The file holds none of them. Given values win; then those of a published file's name; then hints in another name, or the values
    of most published files, which count as assumed.
    """
    word = re.match(r"(edm|cd|ct)_", name)
    numbers = set(re.findall(r"(?<!\d)(?:64|128|256|512)(?!\d)", name))
    assumed = []
    if name not in PUBLISHED_BY_OPENAI:
        if kind is None:
            what = "a student" if word and word[1] != "edm" else "a teacher"
            assumed.append(f"{what}{f' by its name {word[0]}' if word else ''} (--kind)")
        if size is None:
            assumed.append(f"{next(iter(numbers))} pixels by the number in its name" if len(numbers) == 1 else "64 pixels")
            assumed[-1] += " (--resolution)"
        if head is None:
            assumed.append("64 channels an attention head (--head-channels)")
    size = size or PUBLISHED_BY_OPENAI.get(name) or (int(next(iter(numbers))) if len(numbers) == 1 else 64)
    student = kind == "student" if kind else bool(word and word[1] != "edm")
    return size, head or 64, student, tuple(assumed)

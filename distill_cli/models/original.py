"""The original layout of Stable Diffusion 1, 2 and XL, as CompVis and Stability AI publish it: one file for all networks.

The names follow from the network's configuration. diffusers' own converters read them back on tags before anything is written, so a
network that the layout cannot hold is refused, by the name of its first tensor without a place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill_cli.errors import DistillError
from distill_cli.models.parts import plain, quiet

NETWORK, VAE = "model.diffusion_model.", "first_stage_model."
OUTER = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
OPEN_CLIP_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias", "text_projection.weight": "text_projection",
}  # fmt: skip


def replaced(name: str, table: Mapping[str, str]) -> str:
    """`name` with its longest beginning that is a key of `table` replaced; unchanged if there is none."""
    best = max((key for key in table if f"{name}.".startswith(f"{key}.")), key=len, default="")
    return table[best] + name[len(best) :] if best else name


def unet_names(config: Any) -> dict[str, str]:
    """Beginnings of the names in a UNet2DConditionModel, and those in the original layout. Raises DistillError for uneven levels."""
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    if not isinstance(layers, int):
        raise DistillError(f"layers_per_block is {list(layers)}: the original layout has levels of equally many layers")
    out = dict(OUTER)
    for i in range(levels):
        first, crossed = i * (layers + 1), "CrossAttn" in config.up_block_types[i]
        out[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{first + layers + 1}.0.op"
        out[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{1 + crossed}.conv"
        for side, original, count, begin in (("down", "input", layers, first + 1), ("up", "output", layers + 1, first)):
            for j in range(count):
                out[f"{side}_blocks.{i}.resnets.{j}"] = f"{original}_blocks.{begin + j}.0"
                out[f"{side}_blocks.{i}.attentions.{j}"] = f"{original}_blocks.{begin + j}.1"
    resnets = {name: place for name, place in out.items() if ".resnets." in name}
    return out | {f"{name}.{own}": f"{place}.{theirs}" for name, place in resnets.items() for own, theirs in RESNET.items()}


def _unet(network: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = unet_names(network.config)
    return {NETWORK + replaced(name, names): value for name, value in state.items()}


def _vae(network: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An AutoencoderKL's tensors: the decoder's levels are counted from its end, projections of attention are 1x1 convolutions."""
    levels, layers = len(network.config.block_out_channels), network.config.layers_per_block
    names: dict[str, str] = {}
    for i in range(levels):
        up = levels - 1 - i
        names |= {f"encoder.down_blocks.{i}.resnets.{j}": f"encoder.down.{i}.block.{j}" for j in range(layers)}
        names |= {f"decoder.up_blocks.{i}.resnets.{j}": f"decoder.up.{up}.block.{j}" for j in range(layers + 1)}
        names[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        names[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    for side in ("encoder", "decoder"):
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        names |= {f"{side}.mid_block.resnets.{j}": f"{side}.mid.block_{j + 1}" for j in (0, 1)}
        attention = f"{side}.mid_block.attentions.0"
        names |= {f"{attention}.{own}": f"{side}.mid.attn_1.{theirs}" for own, theirs in VAE_ATTENTION.items()}
    names |= {f"{name}.conv_shortcut": f"{place}.nin_shortcut" for name, place in names.items() if ".resnets." in name}
    square = {name for name, value in state.items() if ".attentions." in name and value.ndim == 2}
    return {VAE + replaced(name, names): value[:, :, None, None] if name in square else value for name, value in state.items()}


def _clip(network: Any, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text encoder of OpenAI's CLIP, which the original layout has under transformers' names."""
    return {f"{prefix}text_model.{plain(name)}": value for name, value in state.items() if not name.endswith("position_ids")}


def _open_clip(network: Any, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text encoder of OpenCLIP: queries, keys and values are one tensor, and the projection is multiplied from the other side."""
    out = {}
    for name, value in ((plain(name), value) for name, value in state.items() if not name.endswith("position_ids")):
        if name in OPEN_CLIP_OUTER:
            out[prefix + OPEN_CLIP_OUTER[name]] = value.T if name == "text_projection.weight" else value
            continue
        _, _, layer, inner = name.split(".", 3)  # encoder.layers.N.…
        place = f"{prefix}transformer.resblocks.{layer}."
        if inner.startswith(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")):
            fused = f"{place}attn.in_proj_{inner.rsplit('.')[-1]}"
            if fused not in out:
                given = {plain(key): each for key, each in state.items() if f".layers.{layer}.self_attn" in key}
                out[fused] = torch.cat([given[name.replace(inner.split(".")[1], f"{letter}_proj")] for letter in "qkv"])
        else:
            out[place + replaced(inner, OPEN_CLIP)] = value
    return out


def _texts(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """How the text encoders of a pipeline with these parts are written, each with the beginning of its names."""
    if "text_encoder_2" in parts:
        return {
            "text_encoder": (_clip, "conditioner.embedders.0.transformer."),
            "text_encoder_2": (_open_clip, "conditioner.embedders.1.model."),
        }
    open_clip = parts["text_encoder"].config.hidden_act == "gelu"  # OpenAI's has an approximation
    return {"text_encoder": (_open_clip, "cond_stage_model.model.") if open_clip else (_clip, "cond_stage_model.transformer.")}


def state_of(parts: Mapping[str, Any], states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file, from the state dicts of the networks `unet`, `vae`, `text_encoder` and, for XL, `text_encoder_2`."""
    out = {**_unet(parts["unet"], states["unet"]), **_vae(parts["vae"], states["vae"])}
    for part, (write, prefix) in _texts(parts).items():
        out |= write(parts[part], states[part], prefix)
    return out


def original(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The networks' tensors in the original layout. Raises DistillError if diffusers' converters would read them back otherwise."""
    from diffusers.loaders import single_file_utils as theirs

    quiet()
    states = {part: dict(network.state_dict()) for part, network in parts.items()}
    tags = {  # each tensor a number of its own, in its shape, which takes no memory
        part: {name: torch.tensor(k, dtype=torch.int16).expand(value.shape) for k, (name, value) in enumerate(state.items())}
        for part, state in states.items()
    }
    made, texts = state_of(parts, tags), _texts(parts)
    read: dict[str, Callable[[], Mapping[str, Tensor]]] = {
        "unet": partial(theirs.convert_ldm_unet_checkpoint, made, parts["unet"].config),
        "vae": partial(theirs.convert_ldm_vae_checkpoint, made, parts["vae"].config),
        **{part: partial(_text_back, theirs, parts[part], made, *texts[part]) for part in texts},
    }
    for part, back in read.items():
        try:
            found = {plain(name): value for name, value in back().items() if isinstance(value, Tensor)}
        except (KeyError, IndexError, AttributeError, TypeError):
            found = {}
        for name, tag in tags[part].items():
            there = found.get(plain(name))
            if not name.endswith("position_ids") and (there is None or there.shape != tag.shape or not torch.equal(there, tag)):
                raise DistillError(f"{part}: {name} has no place in the original layout", "folder is the target that holds any model")
    return state_of(parts, states)


def _text_back(theirs: Any, network: Any, made: Mapping[str, Tensor], write: Any, prefix: str) -> dict[str, Tensor]:
    """What diffusers reads as a text encoder's tensors."""
    given = {name: value for name, value in made.items() if name.startswith(prefix)}
    return theirs.convert_ldm_clip_checkpoint(given) if write is _clip else theirs.convert_open_clip_checkpoint(network, given, prefix)

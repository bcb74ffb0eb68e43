"""Small models in the layout of Stable Diffusion's first publishers, one file for all parts: what `single_file` reads."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
TOP = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
       "time_embedding.linear_2": "time_embed.2",
       "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_names(levels, layers, attends):
    """diffusers' prefixes of blocks -> the original's, for a UNet of so many levels and layers a level."""
    out = dict(TOP)
    place = 1
    for i in range(levels):
        for j in range(layers):
            out[f"down_blocks.{i}.resnets.{j}"], out[f"down_blocks.{i}.attentions.{j}"] = (
                f"input_blocks.{place}.0",
                f"input_blocks.{place}.1",
            )
            place += 1
        if i < levels - 1:
            out[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    out |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    place = 0
    for i in range(levels):
        for j in range(layers + 1):
            out[f"up_blocks.{i}.resnets.{j}"], out[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{place}.0", f"output_blocks.{place}.1"
            if j == layers and i < levels - 1:
                out[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{place}.{2 if attends[levels - 1 - i] else 1}.conv"
            place += 1
    return out


def vae_names(levels, layers):
    out = {}
    for i in range(levels):
        for j in range(layers):
            out[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        out[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        for j in range(layers + 1):
            out[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{levels - 1 - i}.block.{j}"
        out[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{levels - 1 - i}.upsample.conv"
    for side in ("encoder", "decoder"):
        for j in (0, 1):
            out[f"{side}.mid_block.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        out[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        out[f"{side}.conv_norm_out"] = f"{side}.norm_out"
    return out


def renamed(name, prefixes, inner):
    """`name` with the longest prefix of `prefixes`, and what stands in a block, renamed."""
    best = max((p for p in prefixes if name.startswith(f"{p}.")), key=len, default="")
    head, rest = (prefixes[best], name[len(best) + 1 :]) if best else ("", name)
    for old, new in inner(best).items():
        rest = re.sub(rf"^{re.escape(old)}\.", f"{new}.", rest)
    return f"{head}.{rest}" if head else rest


OPEN = {"text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final", "layer_norm1": "ln_1",
        "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
        "text_model.encoder.layers": "transformer.resblocks"}  # fmt: skip


def open_clip(weights):
    """transformers' CLIPTextModelWithProjection as OpenCLIP writes it: query, key and value in one, the projection turned round."""
    out = {"positional_embedding": weights["text_model.embeddings.position_embedding.weight"]}
    out["text_projection"] = weights["text_projection.weight"].T.contiguous()
    for name, value in weights.items():
        if "position_embedding" in name or "text_projection" in name or ".k_proj." in name or ".v_proj." in name:
            continue
        for old, new in OPEN.items():
            name = name.replace(old, new)
        if ".q_proj." in name:
            block, kind = name.split(".q_proj.")
            source = block.replace("transformer.resblocks", "text_model.encoder.layers").replace("attn", "self_attn")
            out[f"{block}.in_proj_{kind}"] = torch.cat([weights[f"{source}.{each}_proj.{kind}"] for each in "qkv"])
        else:
            out[name] = value
    return out


def write(folder: Path, path: Path, levels: int, layers: int, attends: list[bool], vae_levels: int, vae_layers: int = 1) -> None:
    """The diffusers folder as one file in the original layout."""
    state = {}
    names = unet_names(levels, layers, attends)
    for name, value in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items():
        state["model.diffusion_model." + renamed(name, names, lambda block: RESNET if "resnets" in block else {})] = value
    names = vae_names(vae_levels, vae_layers)
    for name, value in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        inner = renamed(
            name, names, lambda b: {"conv_shortcut": "nin_shortcut"} if "resnets" in b else ATTENTION if "attentions" in b else {}
        )
        square = "attn_1" in inner and inner.endswith("weight") and value.ndim == 2
        state[f"first_stage_model.{inner}"] = value[:, :, None, None].contiguous() if square else value
    second = folder / "text_encoder_2/model.safetensors"
    first = "conditioner.embedders.0.transformer." if second.exists() else "cond_stage_model.transformer."
    state |= {f"{first}{name}": value for name, value in load_file(folder / "text_encoder/model.safetensors").items()}
    if second.exists():
        state |= {f"conditioner.embedders.1.model.{name}": value for name, value in open_clip(load_file(second)).items()}
    save_file(state, path)

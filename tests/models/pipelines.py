"""Small pipelines of Stable Diffusion 1, 2 and XL, made by diffusers' own classes with random weights, and random LoRAs for them."""

import diffusers
import torch
import transformers
from torch import nn

from distill_cli.data.shapes import TRAINED
from distill_cli.models.text import make_tokenizer

SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
)


def encoder(tokenizer, width, act, kind="CLIPTextModel", projection=8):
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=projection, hidden_act=act, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def pipeline(version, prediction="epsilon", zero=False):
    """Stable Diffusion 1, 2 or 3 (XL) in miniature: 16x16 latents, 32 pixels; 2 has v prediction and OpenCLIP's text encoder."""
    torch.manual_seed(version)
    tokenizer = make_tokenizer((thing.caption for thing in TRAINED), 16)
    unet = dict(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(**SCHEDULER, prediction_type=prediction, rescale_betas_zero_snr=zero)
    parts = dict(vae=vae, scheduler=scheduler, tokenizer=tokenizer)
    if version < 3:
        act, linear = ("quick_gelu", "gelu")[version - 1], version == 2
        parts |= dict(unet=diffusers.UNet2DConditionModel(**unet, use_linear_projection=linear), text_encoder=encoder(tokenizer, 16, act))
        made = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
        )
    else:
        unet |= dict(
            cross_attention_dim=40, use_linear_projection=True, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 12,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        parts |= dict(unet=diffusers.UNet2DConditionModel(**unet), tokenizer_2=tokenizer, text_encoder=encoder(tokenizer, 16, "quick_gelu"))
        second = encoder(tokenizer, 24, "gelu", "CLIPTextModelWithProjection", 12)
        made = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=second, force_zeros_for_empty_prompt=False)
    made.set_progress_bar_config(disable=True)
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return made


def networks(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def picture(pipe, steps=2):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    out = pipe("a small red circle", height=32, width=32, num_inference_steps=steps, guidance_scale=2.0, latents=noise, output_type="np")
    return torch.from_numpy(out.images)


def adapter(network, rank, seed, targets):
    """Random LoRA of the layers whose names end in one of `targets`, in peft's layout: a (rank, in), b (out, rank), alpha = rank."""
    random, out = torch.Generator().manual_seed(seed), {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(tuple(targets)):
            outside, inside, *kernel = layer.weight.shape
            out[f"{name}.lora_A.weight"] = torch.randn(rank, inside, *kernel, generator=random) * 0.3
            out[f"{name}.lora_B.weight"] = torch.randn(outside, rank, *(1 for _ in kernel), generator=random) * 0.3
    return out

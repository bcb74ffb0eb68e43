"""Recognise what a .safetensors file holds, by its tensors' names and shapes and its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable

from distill_cli.errors import DistillError, printable
from distill_cli.tensors import Tensors

NETWORK, VAE = "model.diffusion_model.", "first_stage_model."
TEXTS = {
    "text_encoder": ("cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
"""Text encoders of Stable Diffusion 1 (CLIP), 2 (OpenCLIP) and XL (both)."""
FIRST = f"{NETWORK}input_blocks.0.0.weight"
FOLDER = "give its diffusers folder, or the checkpoint with all parts"
OTHER = "Stable Diffusion 1, 2 and XL are read"
PARTIAL = (
    (r"lora|\.(hada_w1|lokr_w1|dora_scale|alpha)", "a LoRA: changes to a model, not a model", "merge it into its model first"),
    (r"^(emb_params|string_to_param|clip_[gl]|\*|<.*)$", "an embedding of a word (textual inversion), not a model", OTHER),
    (r"^control_model\.|input_hint_block|controlnet_", "a ControlNet, not a model of pictures", OTHER),
    (r"motion_modules|temporal_transformer", "a motion module, not a model of pictures", OTHER),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter, not a model of pictures", OTHER),
    (r"time_stack|time_mixer", "Stable Video Diffusion", OTHER),
    (r"double_blocks\.\d", "Flux, or a model built like it", OTHER),
    (r"joint_blocks\.\d", "Stable Diffusion 3", OTHER),
    (r"\.channelwise\.", "Stable Cascade", OTHER),
    (r"adaln_single|adaLN_modulation|x_embedder\.|patchify_proj|caption_projection|cross_attn\.norm_k", "a diffusion transformer", OTHER),
    (r"^(edm_mean|edm_std|edm_vpred\.)", "a model with EDM's noise levels (such as Playground 2.5)", OTHER),
    (r"^conditioner\.embedders\.0\.model\.", "the refiner of Stable Diffusion XL", OTHER),
    (r"time_embed(ding)?\.cond_proj", "a network that wants a guidance scale as a condition (latent consistency)", OTHER),
    (r"noise_augmentor|embedder\.model\.visual", "Stable unCLIP, which reads pictures beside the text", OTHER),
)
"""Tensor names that identify other things than Stable Diffusion 1, 2 or XL: a pattern, what it is, a hint."""
ALONE = (
    (r"^(first_stage_model\.|(encoder|decoder)\.(conv_in|mid|down|up)|quant_conv)", "an autoencoder alone", FOLDER),
    (r"^(encoder|decoder)\.layers\.|^\d+\.conv\.", "a tiny autoencoder alone", FOLDER),
    (r"^(down_blocks|mid_block|up_blocks)\.|^input_blocks\.|^model\.diffusion_model\.", "a UNet alone", FOLDER),
    (r"^encoder\.block\.\d+\.layer", "a T5 text encoder alone", FOLDER),
    (r"^(text_model|cond_stage_model|conditioner)\.|resblocks\.\d|self_attn\.", "a text encoder alone", FOLDER),
)
"""The same, for files that lack a part."""
CHANNELS = {
    9: "an inpainting model, whose network takes a mask and a masked picture too",
    8: "a model that edits pictures by instruction (InstructPix2Pix), whose network takes the picture too",
    5: "a depth model, whose network takes a depth map too",
    7: "an upscaler, whose network takes the small picture too",
}
WIDTHS = {2048: "Stable Diffusion XL without its text encoders", 1280: "the refiner of Stable Diffusion XL"}
LABELS = {2816: "Stable Diffusion XL without its text encoders", 2560: "the refiner of Stable Diffusion XL"}
"""Networks of files without XL's second text encoder, by the widths of their text embeddings and of further conditions."""


def _first(table: Iterable[tuple[str, str, str]], names: Iterable[str]) -> tuple[str, str] | None:
    """The first row of a table whose pattern one of the tensors' names fits: what it is by that name, and the hint."""
    for pattern, what, hint in table:
        if found := next((name for name in names if re.search(pattern, name)), None):
            return f"{what}, by its tensor {printable(found, 100)}", hint
    return None


def kind_of(file: Tensors) -> tuple[str, str]:
    """What a file holds if it is not a complete Stable Diffusion 1, 2 or XL, and a hint; '' if it is."""
    shapes = file.shapes
    xl = any(name.startswith(TEXTS["text_encoder_2"]) for name in shapes)
    encoders = {"its text encoder": "text_encoder"} | ({"its second text encoder": "text_encoder_2"} if xl else {})
    labels = shapes.get(f"{NETWORK}label_emb.0.0.weight") or shapes.get("label_emb.0.0.weight")
    if labels and labels[-1] in LABELS and not xl:
        return f"{LABELS[labels[-1]]}, by its {labels[-1]} conditions beside the text", OTHER
    if found := _first(PARTIAL, shapes):
        return found
    first = shapes.get(FIRST) or shapes.get(FIRST.removeprefix(NETWORK)) or shapes.get("conv_in.weight")
    last = shapes.get(f"{NETWORK}out.2.weight") or shapes.get("out.2.weight") or shapes.get("conv_out.weight")
    if first and len(first) == 4 and (first[1] in CHANNELS and (last is None or last[0] != first[1])):
        return f"{CHANNELS[first[1]]} ({first[1]} channels)", OTHER
    if FIRST in shapes and first and last and first[1] != last[0]:
        return f"a network that takes {first[1]} channels and makes {last[0]}", "one that estimates what it takes is expected"
    if f"{NETWORK}label_emb.weight" in shapes or (labels and not xl):
        return "a network with conditions beside the text", OTHER
    widths = [shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    if widths and widths[0] in WIDTHS and not xl:
        return f"{WIDTHS[widths[0]]}, by its text of {widths[0]} channels", OTHER
    parts = {
        "its UNet": FIRST in shapes and bool(widths) and last is not None,
        **{said: any(name.startswith(TEXTS[part]) for name in shapes) for said, part in encoders.items()},
        "its autoencoder": any(name.startswith(VAE) for name in shapes),
    }
    missing = [part for part, there in parts.items() if not there]
    if len(missing) == 1 and FIRST in shapes:
        return f"Stable Diffusion without {missing[0]}", FOLDER
    if missing:
        several = len({"model", "first_stage_model", "cond_stage_model", "conditioner"} & {name.partition(".")[0] for name in shapes}) > 1
        if found := _first(() if several else ALONE, shapes):
            return found
        return f"no single-file checkpoint of Stable Diffusion: {', '.join(missing)} are missing", OTHER
    for name in shapes:
        kind = file.dtype(name)
        if (
            name.startswith((NETWORK, VAE, *sum(TEXTS.values(), ())))
            and (kind is None or not kind.is_floating_point)
            and "position_ids" not in name
        ):
            return f"quantised: {printable(name, 100)} holds {file.stored[name]['dtype']} numbers", "float32, fp16, bf16 and fp8 are read"
    return "", ""


TRUE = {"true": True, "1": True, "false": False, "0": False}
"""Values as kohya's scripts write them, in lower case."""


def predicts(file: Tensors, given: str | None = None) -> tuple[str, str, str]:
    """What the network predicts (eps, v, or '' if unknown), the evidence for zero terminal SNR ('' if none), the evidence for the first.

    Evidence: empty tensors `v_pred` and `ztsnr` (as in ComfyUI), Stability's ModelSpec, and kohya's training metadata; `given`
    overrides it. Raises DistillError for contradictory evidence, and for a prediction that is not supported.
    """
    meta = file.metadata
    kinds = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v", "velocity": "v"}
    said: dict[str, str] = {}
    if "v_pred" in file.shapes:
        said["its tensor v_pred"] = "v"
    stated = meta.get("modelspec.prediction_type", "").lower()
    if stated and stated not in kinds and given is None:
        known = f"{file.path}: modelspec.prediction_type is {printable(stated, 60)}"
        raise DistillError(known, "eps and v are read; distill convert FILE --prediction gives one")
    if stated in kinds:
        said["its metadata modelspec.prediction_type"] = kinds[stated]
    architecture = meta.get("modelspec.architecture", "").lower()
    if match := re.match(r"stable-diffusion-v2-(768-v|512)", architecture):
        said["its metadata modelspec.architecture"] = "eps" if match[1] == "512" else "v"
    if (trained := TRUE.get(meta.get("ss_v_parameterization", "").lower())) is not None:
        said["its metadata ss_v_parameterization"] = "v" if trained else "eps"
    if meta.get("ss_base_model_version", "").endswith("_768_v"):
        said["its metadata ss_base_model_version"] = "v"
    zero = "its metadata ss_zero_terminal_snr" if TRUE.get(meta.get("ss_zero_terminal_snr", "").lower()) else ""
    zero = "its tensor ztsnr" if "ztsnr" in file.shapes else zero
    if given is not None:
        others = [place for place, kind in said.items() if kind != given]
        return given, zero, f"--prediction{f', against {others[0]}' if others else ''}"
    if len(set(said.values())) > 1:
        both = " and ".join(f"{kind} by {place}" for place, kind in said.items())
        raise DistillError(f"{file.path}: says two different predictions: {both}", "distill convert FILE --prediction says which")
    place, kind = next(iter(said.items()), ("", ""))
    return kind, zero, place

"""CLIP models (Radford et al. 2103.00020): a folder of transformers' CLIPModel with its tokenizer and its image processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_cli.config import CLIPNetworkConfig, TextConfig
from distill_cli.errors import DistillError, UsageError, nearest
from distill_cli.files import digest, folder_atomic
from distill_cli.models.parts import load_network, own_names, read_json
from distill_cli.models.sources import hub
from distill_cli.models.text import Reader, clip_reader, load_tokenizer, save_tokenizer, text_config
from distill_cli.processes import say_hidden
from distill_cli.tensors import hash_of, write

BUILTIN = Path(__file__).parent / "builtin"
SUFFIX = "-clip"
FILES = ("*.json", "merges.txt", "model.safetensors")
"""The files of a CLIP model on the hub."""
PROCESSOR = "preprocessor_config.json"
NOISED = "distill_noised"
"""The key of config.json that says of which model's noised data a CLIP model is."""
HINT = "a folder, or a hub id such as openai/clip-vit-large-patch14"


class Towers(nn.Module):
    """A CLIPModel: `towers(pixels, tokens)` -> embeddings of length 1 (B, D) and (K, D), and the scale 1 / temperature.

    Pixels (B, C, H, W) are normalised and of the model's size.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.pictures(pixels), self.texts(tokens), self.model.logit_scale.exp()

    def pictures(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.model.visual_projection(self.model.vision_model(pixels).pooler_output), dim=1)

    def texts(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output), dim=1)


@dataclass
class Clip:
    """A CLIP model. `mean` and `std` (3,) normalise pictures of 0 to 1."""

    towers: Towers
    tokenizer: Any
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    settings: str = ""
    """SHA-256 of the files of its folder that are not weights: tokenizer, preparation of pictures, captions."""

    def hash(self) -> str:
        """SHA-256 of all that decides what it answers: weights and settings."""
        return hashlib.sha256(f"{hash_of(self.towers.state_dict())} {self.settings}".encode()).hexdigest()

    @property
    def pixels(self) -> int:
        """Width of the pictures that the network takes."""
        return int(self.towers.model.config.vision_config.image_size)

    @property
    def reader(self) -> Reader:
        return clip_reader(self.tokenizer, self.towers.model.text_model)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of length 1 (B, D) of prompts, which are cut at the model's length."""
        reader = self.reader
        with torch.autocast(reader.place.type, enabled=False):
            return self.towers.texts(reader.tokens(prompts).to(reader.place))

    def pictures(self, x: Tensor) -> Tensor:
        """Embeddings of length 1 (B, D) of pictures (B, 3, H, W) in [-1, 1]; differentiable.

        As CLIP's own preparation the shorter side is resized to the network's, bicubic, and the middle is taken.
        """
        height, width = x.shape[2:]
        if (height, width) != (self.pixels, self.pixels):
            scale = self.pixels / min(height, width)
            size = [max(self.pixels, round(side * scale)) for side in (height, width)]
            x = F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True)
            top, left = ((side - self.pixels) // 2 for side in size)
            x = x[:, :, top : top + self.pixels, left : left + self.pixels]
        mean, std = (torch.tensor(each, device=x.device, dtype=x.dtype)[:, None, None] for each in (self.mean, self.std))
        return self.towers.pictures(((x + 1) / 2 - mean) / std)

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the folder, complete or absent: it opens in any version of transformers."""
        own_names(self.towers.model, ("CLIPModel",))
        with folder_atomic(Path(folder)) as temporary:
            self.write(temporary, dtype)

    def write(self, temporary: Path, dtype: torch.dtype) -> None:
        """Write the files."""
        write_towers(self.towers, self.tokenizer, temporary, dtype)
        size = self.pixels
        steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True)
        sizes = {
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "resample": 3,
            "rescale_factor": 1 / 255,
        }
        values = {"image_processor_type": "CLIPImageProcessor", **steps, **sizes, "image_mean": self.mean, "image_std": self.std}
        (temporary / PROCESSOR).write_text(json.dumps(values, indent=2) + "\n")


def write_towers(towers: Towers, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a CLIPModel and its tokenizer into a folder."""
    model = towers.model
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(folder)
    stored = read_json(folder / "config.json")
    # transformers says a type of a model that it has read
    for part in (stored, stored.get("text_config", {}), stored.get("vision_config", {})):
        part.pop("dtype", None), part.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
    weights = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items() if not name.endswith("position_ids")}
    write(folder / "model.safetensors", weights, {"format": "pt"})
    save_tokenizer(tokenizer, folder)


def create(pixels: int, network: CLIPNetworkConfig, text: TextConfig, tokenizer: Any, seed: int) -> Clip:
    """A CLIP model for RGB pictures of `pixels` a side, with random weights of `seed`."""
    return Clip(towers_of(pixels, 3, network, text, tokenizer, seed), tokenizer)


def towers_of(pixels: int, channels: int, network: CLIPNetworkConfig, text: TextConfig, tokenizer: Any, seed: int, **more: Any) -> Towers:
    """A CLIPModel of data of so many `channels`, with random weights of `seed`. `more` stands in its configuration."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        image_size=pixels,
        num_channels=channels,
        patch_size=network.patch,
        hidden_size=network.width,
        intermediate_size=4 * network.width,
        num_hidden_layers=network.layers,
        num_attention_heads=network.heads,
        projection_dim=network.features,
    )
    texts = text_config(text, tokenizer, network.features)
    config = transformers.CLIPConfig(text_config=texts.to_dict(), vision_config=vision.to_dict(), projection_dim=network.features)
    config.update(more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Towers(transformers.CLIPModel(config))


def names() -> list[str]:
    """The built-in CLIP models."""
    return sorted(path.name for path in BUILTIN.glob(f"*{SUFFIX}"))


def find(name: str, what: str) -> Path:
    """The folder of a built-in CLIP model, of a run, or of a hub id; errors call it `what`. Raises DistillError for no CLIP model."""
    if name in names():
        say_hidden("clip", name, "the built-in one")
        return BUILTIN / name
    if not Path(name).is_dir() and not hub.is_id(name):
        raise UsageError(f"{what}: no CLIP model of that name and no such folder", nearest(name, names(), "built in"))
    folder = hub.find(name, FILES, what)
    if (folder / "clip" / "config.json").is_file():
        folder = folder / "clip"
    if not (folder / "config.json").is_file():
        raise DistillError(f"{what}: no CLIP model: no config.json", HINT)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise DistillError(f"{what}: no CLIP model: its config.json says model_type {json.dumps(kind)}", HINT)
    return folder


def settings_of(folder: Path) -> str:
    """SHA-256 of the files of a CLIP model that are not weights, and of their names."""
    return digest(sorted(path for pattern in FILES[:-1] for path in folder.glob(pattern)))


def load(name: str, what: str | None = None) -> Clip:
    """A CLIP model by the name of a built-in one, from a folder, a run, or the hub. Float32, frozen, on the CPU."""
    from transformers import CLIPModel

    what = what or f"clip {name}"
    folder = find(name, what)
    if NOISED in read_json(folder / "config.json"):
        raise DistillError(f"{what}: a CLIP model of noised data, which only guides", "one of pictures: distill clip without noisy")
    model, prepared = load_network(CLIPModel, folder, "model"), read_json(folder / PROCESSOR)
    size, pixels = prepared.get("size"), model.config.vision_config.image_size
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    if shortest != pixels:
        raise DistillError(f"{folder / PROCESSOR}: size is {json.dumps(size)}, the network takes a shortest_edge of {pixels}")
    scales: dict[str, Any] = {key: prepared.get(key) for key in ("image_mean", "image_std")}
    for key, value in scales.items():
        if not isinstance(value, list) or len(value) != 3 or not all(type(each) in (int, float) for each in value):
            raise DistillError(f"{folder / PROCESSOR}: {key} is {json.dumps(value)}, three numbers are expected")
    return Clip(
        Towers(model).eval().requires_grad_(False), load_tokenizer(folder), scales["image_mean"], scales["image_std"], settings_of(folder)
    )

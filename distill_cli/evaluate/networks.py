"""Networks in whose features pictures are measured: a row of NETWORKS each, with the protocol of its publication."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distill_cli.config import EvaluateConfig
from distill_cli.data.pictures import to_uint8
from distill_cli.errors import DistillError, UsageError, printable, reason
from distill_cli.files import unreadable
from distill_cli.models import classifier, clip
from distill_cli.models.parts import load_network
from distill_cli.models.perceptual import cached
from distill_cli.models.sources.hub import find

EXTRA = "pip install 'distill-cli[eval]'"
INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
NETWORK_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors*")


class Network(ABC):
    """A network that sees pictures. `digest` is that of its weights and protocol, `about` its protocol in words."""

    name: ClassVar[str]
    prefix: ClassVar[str]
    """The beginning of the keys of its scores."""
    distance: ClassVar[str]
    """What the Fréchet distance in its features is called."""
    suffix: ClassVar[str]
    """What stands behind the titles of its other columns."""
    measures: ClassVar[tuple[str, ...]]
    """The measures that are made unless others are asked for."""
    classifies: ClassVar[bool] = False
    """Whether it gives logits."""
    labels: ClassVar[bool] = False
    """Whether its classes are those of the pictures."""
    batch: ClassVar[int] = 64
    """Pictures in a batch: always the same, because the last bit of a sum may depend on it."""
    shape: tuple[int, ...] | None = None
    """(C, H, W) of the only pictures that it knows; None: any."""
    classes: tuple[str, ...] = ()
    """The names of the labels that it knows."""
    digest: str
    about: str
    width: int

    @abstractmethod
    def __init__(self, config: EvaluateConfig, where: torch.device) -> None: ...

    @abstractmethod
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """`features` (B, width) of pictures (B, 3, H, W) in [-1, 1], and `logits` (B, K) if it classifies."""

    def check(self, shape: tuple[int, ...], classes: Sequence[str], data: str) -> None:
        """Raise UsageError for pictures that it does not know; most know all."""
        return


def _digest(network: nn.Module, *protocol: str) -> str:
    """SHA-256 of a network's weights and the words of its protocol."""
    made = hashlib.sha256("\n".join(protocol).encode())
    for name, value in sorted(network.state_dict().items()):
        made.update(name.encode())
        made.update(value.cpu().contiguous().numpy().tobytes())
    return made.hexdigest()


def _bytes(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8 (B, 3, H, W): published protocols begin with files of 8 bits."""
    return torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2)


class Own(Network):
    """A classifier of one's own: `distill classifier`, or built in."""

    name, prefix, distance, suffix = "classifier", "", "frechet", ""
    measures = ("accuracy", "frechet", "precision-recall")
    classifies, labels, batch = True, True, 500

    def __init__(self, config: EvaluateConfig, where: torch.device) -> None:
        self.given, self.network = config.classifier, classifier.load(config.classifier).to(where)
        self.info = self.network.info
        self.shape, self.classes = self.info.shape, self.info.classes
        self.width = self.network.head.in_features
        self.digest = _digest(self.network, "classifier")
        self.about = f"{self.width} features of the classifier {self.given}, trained on {self.info.data}"

    @torch.no_grad()
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        features = self.network.features(x)
        return {"features": features, "logits": self.network.head(features)}

    def check(self, shape: tuple[int, ...], classes: Sequence[str], data: str) -> None:
        info = self.info
        if tuple(shape) != info.shape or tuple(classes) != info.classes:
            theirs = f"{len(classes)} of {tuple(shape)}"
            if len(classes) == len(info.classes) and tuple(shape) == info.shape:
                theirs = f"others: {', '.join(classes[:3])}, ..."
            known = f"--classifier {self.given}: knows {len(info.classes)} classes of {info.shape} images"
            raise UsageError(f"{known}, --data {data} has {theirs}", "distill classifier --data trains one for your images")


class Inception(Network):
    """Inception v3 of 2015 as torch-fidelity has it, bit for bit."""

    name, prefix, distance, suffix = "inception", "inception_", "FID", ""
    measures = ("frechet", "kid", "inception-score", "precision-recall")
    classifies, width = True, 2048

    def __init__(self, config: EvaluateConfig, where: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UsageError("features inception: torch-fidelity is not installed", EXTRA) from error
        path = cached(config.inception, "inception", "features inception: the weights", INCEPTION, "91 MB, Apache-2.0")
        try:
            weights, trusted = torch.load(path, map_location="cpu", weights_only=True), io.BytesIO()
            torch.save(weights, trusted)  # torch-fidelity unpickles what it is given: these bytes are ours
            trusted.seek(0)
            self.network = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], trusted).to(where)
        except OSError as error:
            raise unreadable(path, error) from error
        except Exception as error:  # torch raises errors of many classes for other files
            what = f"{type(error).__name__}: {printable(error, 120)}"
            raise DistillError(f"{path}: not torch-fidelity's Inception v3 ({what})", f"fetch {INCEPTION}") from error
        self.digest = _digest(self.network, "inception")
        self.about = (
            "Inception v3 of 2015 by torch-fidelity: 2048 features, resized to 299 pixels as TensorFlow 1 does, bilinear and aliased"
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        features, logits = self.network(_bytes(x).to(x.device))
        return {"features": features, "logits": logits}


class Dinov2(Network):
    """DINOv2 (2304.07193) by transformers, pictures prepared as dgm-eval (Stein et al. 2306.04675) prepares them."""

    name, prefix, distance, suffix = "dinov2", "dinov2_", "FD-DINOv2", " (DINOv2)"
    measures = ("frechet", "precision-recall", "density-coverage")
    PIXELS, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, config: EvaluateConfig, where: torch.device) -> None:
        from transformers import Dinov2Model

        if config.dinov2 is None:
            raise UsageError(
                "features dinov2: no network given", "dinov2=FOLDER, or a hub id such as facebook/dinov2-large (1.2 GB, Apache-2.0)"
            )
        self.network = load_network(Dinov2Model, find(config.dinov2, NETWORK_FILES, f"dinov2 {config.dinov2}"), "model").to(where)
        self.width = self.network.config.hidden_size
        self.digest = _digest(self.network, "dinov2")
        self.about = (
            f"{self.width} features of {config.dinov2}: the class token after the last norm, pictures resized to {self.PIXELS} pixels "
            "a side by Pillow, bicubic"
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        size = (self.PIXELS, self.PIXELS)
        resized = [np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BICUBIC)) for each in to_uint8(x)]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.MEAN, self.STD))
        return {"features": self.network(((pixels - mean) / std).to(x.device)).last_hidden_state[:, 0]}


class CLIP:
    """transformers' CLIPModel and its processor: a built-in one, from a folder or a run, or a hub id, downloaded on first use."""

    def __init__(self, name: str, where: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        folder = clip.find(name, f"clip {name}")
        self.model = load_network(CLIPModel, folder, "model").to(where)
        try:
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many types for a missing folder or network
            raise DistillError(f"clip {name}: no CLIP model ({reason(error)})", clip.HINT) from error

    @torch.no_grad()
    def scores(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """(B,) 100 max(cos, 0) between uint8 images (B, H, W, 3) and their prompts, truncated to the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        given = self.processor(
            text=list(prompts), images=list(images), return_tensors="pt", padding="max_length", max_length=length, truncation=True
        ).to(self.model.device)
        made = self.model(**given)
        cosines = torch.nn.functional.cosine_similarity(made.image_embeds.float(), made.text_embeds.float(), dim=1)
        return 100 * cosines.clamp(min=0).cpu()

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """(B, D) projected embeddings of uint8 images (B, H, W, 3), not of unit length."""
        pixels = self.processor.image_processor(list(images), return_tensors="pt").pixel_values.to(self.model.device)
        return self.model.visual_projection(self.model.vision_model(pixels).pooler_output)


class ClipFeatures(Network):
    """A CLIP model's embeddings of pictures, prepared by the processor in its folder (Kynkäänniemi et al. 2203.06026)."""

    name, prefix, distance, suffix = "clip", "clip_", "FD-CLIP", " (CLIP)"
    measures = ("frechet", "kid")

    def __init__(self, config: EvaluateConfig, where: torch.device) -> None:
        if config.clip is None:
            raise UsageError(
                "features clip: no network given", "clip=FOLDER, or a hub id such as openai/clip-vit-base-patch32 (0.6 GB, MIT)"
            )
        self.clip = CLIP(config.clip, where)
        self.width = self.clip.model.config.projection_dim
        self.digest = _digest(self.clip.model, "clip", self.clip.processor.image_processor.to_json_string())
        self.about = f"{self.width} features of {config.clip}: projected embeddings, pictures prepared by its own processor"

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self.clip.features(to_uint8(x))}


NETWORKS: Mapping[str, type[Network]] = {network.name: network for network in (Own, Inception, Dinov2, ClipFeatures)}

"""LPIPS (Zhang et al. 1801.03924) on VGG-16, as DMD and consistency distillation use it: on images resized to 224 pixels,
or as they are (decoded latents). OpenAI's consistency program has average pooling in VGG, and leaves images of 256 pixels as they are.

The lpips package brings its linear layers; VGG's own weights are torchvision's file, from its cache or given by the user.
"""

from __future__ import annotations

import math
import re
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_cli.errors import DistillError, printable
from distill_cli.files import sha256, unreadable

FILE = "vgg16-397923af.pth"
URL = f"https://download.pytorch.org/models/{FILE}"
PIXELS = 224


def find_weights(given: Path | None) -> Path:
    """The file of VGG-16's weights: the given one, or the one in torchvision's cache. Nothing is downloaded."""
    return cached(given, "lpips_weights", "lpips: VGG's weights", URL, "528 MB")


def cached(given: Path | None, key: str, what: str, url: str, size: str) -> Path:
    """A file of weights: the `given` one, or the one of that URL in torch's cache. Nothing is downloaded.

    Raises DistillError that says both ways out, and for a file whose checksum is not the one in its name.
    """
    path = Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        message = f"{key} {path}: no such file" if given else f"{what} are not in {path}"
        raise DistillError(message, f"put {url} ({size}) there, or give a copy of it: {key}=FILE")
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if promised and not sha256(path).startswith(promised[1]):
        raise DistillError(f"{path}: corrupt: its checksum is not the one in its name", f"fetch {url} again")
    return path


class Perceptual(nn.Module):
    """Distance (B,) of images (B, C, H, W) in [-1, 1], resized to 224 if less than `below` wide; differentiable in the first.

    If it is `planned`, it is on the meta device, without weights.
    """

    def __init__(self, weights: Path | None = None, below: float = math.inf, pooling: str = "max", planned: bool = False) -> None:
        super().__init__()
        self.below = below
        path = None if planned else find_weights(weights)
        import lpips

        with warnings.catch_warnings(), torch.device("meta") if planned else nullcontext():
            warnings.simplefilter("ignore")  # lpips uses a deprecated argument of torchvision
            self.metric = lpips.LPIPS(net="vgg", pretrained=not planned, pnet_rand=True, verbose=False)
        try:
            stored = {} if path is None else torch.load(path, map_location="cpu", weights_only=True)
            for part in self.metric.net.children():
                for place, layer in part.named_children():
                    if isinstance(layer, nn.Conv2d) and path is not None:
                        layer.load_state_dict({key: stored[f"features.{place}.{key}"] for key in ("weight", "bias")})
                    elif isinstance(layer, nn.MaxPool2d) and pooling == "average":
                        setattr(part, place, nn.AvgPool2d(2))
        except OSError as error:
            raise unreadable(path or Path(), error) from error
        except Exception as error:  # torch raises errors of many classes for other files
            what = f"{type(error).__name__}: {printable(error, 120)}"
            raise DistillError(f"{path}: not torchvision's VGG-16 ({what})", f"fetch {URL}") from error
        self.eval().requires_grad_(False)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of unit length in each place."""
        images = images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()
        if images.shape[-1] < self.below and images.shape[-2:] != (PIXELS, PIXELS):
            images = F.interpolate(images, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)
        maps = [m.float() for m in self.metric.net(self.metric.scaling_layer(images))]
        # as lpips.normalize_tensor, whose gradient is not a number where all features are 0
        return [m / (m.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt() + 1e-10) for m in maps]

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            there = self._features(reference)
        torch.clear_autocast_cache()
        here = self._features(x)
        with torch.autocast(x.device.type, enabled=False):  # small differences vanish in half precision
            layers = zip(self.metric.lins, here, there, strict=True)
            return torch.stack([lin((a - b).square()).mean((1, 2, 3)) for lin, a, b in layers]).sum(0)

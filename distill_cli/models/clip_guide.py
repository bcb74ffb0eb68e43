"""CLIP guidance (Nichol et al. 2112.10741, section 2.3): a model is led by the similarity of its pictures and their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill_cli.diffusion.condition import GUIDE, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.guidance import gradient_of
from distill_cli.diffusion.losses import wide
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import NoiseSchedule, expand
from distill_cli.errors import UsageError
from distill_cli.models.clip import NOISED, Clip, find, load
from distill_cli.models.codec import Codec
from distill_cli.models.model import Model
from distill_cli.models.parts import read_json
from distill_cli.models.prompted import prompted

SCALE = 300.0
"""The usual factor of its gradient."""


@dataclass(eq=False)
class ClipGuide:
    """The gradient by x_t of the cosine between the embeddings of the estimated picture and of the prompt.

    `through`: "network" takes the derivative of the whole estimate D(x_t). "estimate" takes that of the best estimate of normal data of
    `spread`, alpha v / (alpha^2 v + sigma^2) with v = spread^2, and calls the network without gradient: then the guided estimate has
    scale r^2 times the gradient by x0, where r^2 is the variance of x0 given x_t (Song et al., Pseudoinverse-guided diffusion, ICLR 2023,
    section 3.3). A latent estimate is decoded with gradient. With `cutouts` the cosine is the mean over so
    many square parts of the picture, at least as large as what CLIP takes. Their places are drawn by the sample's time alone, so a sample
    does not depend on its batch.
    """

    clip: Clip
    codec: Codec
    schedule: NoiseSchedule
    scale: float
    spread: float = 1.0
    """Standard deviation of the model's data."""
    name: str = "CLIP"
    through: Literal["estimate", "network"] = "network"
    cutouts: int = 0
    part: str = GUIDE + "clip"
    classes: tuple[str, ...] = ()
    known: dict[str, Tensor] = field(default_factory=dict)
    """Embeddings of prompts (D,) on the CPU: each is computed once."""

    def __post_init__(self) -> None:
        self.network: nn.Module = self.clip.towers

    def told(self, labels: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, D) embeddings of the prompts at positions `labels`."""
        texts = [prompts[position] for position in labels.tolist()]
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            self.known |= dict(zip(new, self.clip.texts(new).float().cpu(), strict=True))
        return torch.stack([self.known[text] for text in texts]).to(labels.device)

    def identity(self) -> dict[str, Any]:
        settings = {"clip_scale": self.scale, "clip_through": self.through, "clip_cutouts": self.cutouts}
        return {"clip_guidance": self.clip.hash(), **settings}

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        asked = condition.parts[self.part]
        found: list[Tensor] = []
        if self.through == "estimate":
            estimate, t = denoiser(x, t, condition), t.to(wide(x))
            alpha, sigma = expand(self.schedule.alpha(t), x), expand(self.schedule.sigma(t), x)
            gradient = gradient_of(lambda x0: self.similarity(x0, t, asked), estimate)
            return estimate, gradient * alpha * self.spread**2 / (alpha.square() * self.spread**2 + sigma.square())

        def score(x: Tensor) -> Tensor:
            found.append(denoiser(x, t, condition))
            return self.similarity(found[0], t, asked)

        gradient = gradient_of(score, x)
        return found[0].detach(), gradient

    def similarity(self, x0: Tensor, t: Tensor, asked: Tensor) -> Tensor:
        """(B,) cosines of estimates and what is asked for (B, D); 0 where that is zeros."""
        seen, rows = self.clip.pictures, asked.to(x0)
        pictures = self.codec.raw(x0)  # a clamped value would have no gradient
        if pictures.shape[1] == 1:
            pictures = pictures.expand(-1, 3, -1, -1)
        if not self.cutouts:
            return (seen(pictures) * rows).sum(1)
        found = [torch.stack([(seen(part) * row).sum() for part in self.parts(one, at)]).mean()
                 for one, at, row in zip(pictures.split(1), t.tolist(), rows, strict=True)]  # fmt: skip
        return torch.stack(found)

    def parts(self, picture: Tensor, t: float) -> Iterator[Tensor]:
        """The square parts of a picture (1, 3, H, W) that CLIP sees at time t."""
        height, width = picture.shape[2:]
        moment = int(torch.tensor(t, dtype=torch.float32).view(torch.int32))
        draws = Draws(moment, range(self.cutouts))
        for size, down, across in torch.stack([draws.uniform("guidance", turn) for turn in range(3)], 1).tolist():
            side = self.clip.pixels + round(size * (min(height, width) - self.clip.pixels))
            top, left = round(down * (height - side)), round(across * (width - side))
            yield picture[:, :, top : top + side, left : left + side]


def asking(model: Model, config: Any) -> Model:
    """The model with prompts for the guide that a job's options name, if it has no text; itself without one."""
    return replace(model, conditioner=prompted(model.conditioner, model.lineage.name)) if config.clip_guidance is not None else model


def guide(config: Any, model: Model) -> ClipGuide | None:
    """The guide that a job's options name, None without one. Raises UsageError for a model that it cannot lead."""
    name, cutouts = config.clip_guidance, config.clip_cutouts
    if name is None or NOISED in read_json(find(name, f"--clip-guidance {name}") / "config.json"):
        return None
    model.codec.kind.needs_pictures("--clip-guidance")
    clip = load(name, f"--clip-guidance {name}")
    side = model.codec.factor * min(model.shape[1:])
    if cutouts and side <= clip.pixels:
        said = f"clip_cutouts {cutouts}: the pictures' {side} pixels are no more than the {clip.pixels} that CLIP takes"
        raise UsageError(said, "leave it out")
    spread, settings = model.denoiser.scales.sigma_data, (f"CLIP {name}", config.clip_through, cutouts)
    scale = SCALE if config.clip_scale is None else config.clip_scale
    return ClipGuide(clip, model.codec, model.denoiser.schedule, scale, spread, *settings)

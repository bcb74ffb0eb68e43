"""CLIP models of noised data (Nichol et al. 2112.10741, section 2.3): transformers' CLIPModel on x_t, whose gradient leads a denoiser.

The data have one channel more, which says the noise level. config.json says of which model's data they are and on which schedule they were
noised, so that another is refused; captions.json has the captions among which the model has learned to find that of x_t.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.diffusion.condition import GUIDE, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.guidance import gradient_of
from distill_cli.diffusion.schedule import NoiseSchedule, expand
from distill_cli.errors import DistillError, UsageError, printable
from distill_cli.files import folder_atomic
from distill_cli.models.clip import NOISED, Clip, Towers, find, settings_of, write_towers
from distill_cli.models.model import Model
from distill_cli.models.noisy_classifier import described
from distill_cli.models.parts import load_network, own_names, read_json
from distill_cli.models.text import load_tokenizer
from distill_cli.processes import say

CAPTIONS = "captions.json"
MOST = 100.0
"""The largest scale of similarities, as in CLIP's training."""
SCALE = 8.0
"""The usual factor of its gradient."""


def leveled(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t (B, C, H, W) of variance 1 for data of variance 1, and a channel of its noise level, from -1 (none) to 1 (alone)."""
    level = torch.atan2(sigma, alpha) * (4 / math.pi) - 1
    plane = expand(level, x).to(x).expand(-1, 1, *x.shape[2:])
    return torch.cat([x * expand((alpha**2 + sigma**2).rsqrt(), x).to(x), plane], 1)


@dataclass
class NoisyClip(Clip):
    """A CLIP model of x_t; `texts` is that of any CLIP model. Its pictures are data with their level: `towers.pictures(leveled(...))`."""

    captions: Sequence[str] = ()
    """Those that it was trained to tell apart."""

    @property
    def info(self) -> dict[str, Any]:
        """Of which model's data it is, their shape, and the schedule, as `described` says it."""
        found: dict[str, Any] = getattr(self.towers.model.config, NOISED)
        return found

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        own_names(self.towers.model, ("CLIPModel",))
        with folder_atomic(Path(folder)) as temporary:
            write_towers(self.towers, self.tokenizer, temporary, dtype)
            (temporary / CAPTIONS).write_text(json.dumps(list(self.captions), indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def load(name: str, what: str | None = None) -> NoisyClip:
    """One by the name of a built-in model, from a folder or a run. Float32, frozen, on the CPU."""
    from transformers import CLIPModel

    folder = find(name, what or f"clip {name}")
    model, place = load_network(CLIPModel, folder, "model"), folder / CAPTIONS
    try:
        captions = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DistillError(f"{place}: not readable as JSON", "is the folder complete?") from error
    info = getattr(model.config, NOISED)
    kinds = {"model": str, "schedule": dict, "shape": list}
    whole = isinstance(info, dict) and all(isinstance(info.get(key), kind) for key, kind in kinds.items())
    if not whole or not isinstance(captions, list) or not captions or not all(isinstance(each, str) for each in captions):
        raise DistillError(f"{folder}: no model of `distill clip --noisy`", "is the folder complete?")
    schedule = info["schedule"] | {"kind": printable(info["schedule"].get("kind"))}
    setattr(model.config, NOISED, info | {"model": printable(info["model"]), "schedule": schedule})
    towers = Towers(model).eval().requires_grad_(False)
    return NoisyClip(towers, load_tokenizer(folder), settings=settings_of(folder), captions=captions)


@dataclass(eq=False)
class NoisyClipGuide:
    """The gradient by x_t of log p(prompt | x_t), the softmax over the prompt and the captions that the model was trained on."""

    clip: NoisyClip
    schedule: NoiseSchedule
    scale: float
    name: str
    part: str = GUIDE + "clip"
    classes: tuple[str, ...] = ()
    known: dict[str, Tensor] = field(default_factory=dict)
    """What a prompt is told as (D + 1,), on the CPU: its embedding, and 1 for one that was trained on."""

    def __post_init__(self) -> None:
        self.network: nn.Module = self.clip.towers
        self.others = self.clip.texts(self.clip.captions).float()
        self.learned = frozenset(self.clip.captions)

    def told(self, labels: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, D + 1) of the prompts at positions `labels`."""
        texts = [prompts[position] for position in labels.tolist()]
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            there = torch.tensor([[float(text in self.learned)] for text in new])
            self.known |= dict(zip(new, torch.cat([self.clip.texts(new).float().cpu(), there], 1), strict=True))
        return torch.stack([self.known[text] for text in texts]).to(labels.device)

    def identity(self) -> dict[str, Any]:
        return {"clip_guidance": self.clip.hash(), "clip_scale": self.scale}

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        asked, t = condition.parts[self.part], t.to(x.device, torch.float32)
        own, learned = asked[:, :-1].float(), asked[:, -1] > 0
        self.others = self.others.to(x.device)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        sharp = self.clip.towers.model.logit_scale.exp().clamp(max=MOST)

        def score(noisy: Tensor) -> Tensor:
            seen = self.clip.towers.pictures(leveled(noisy.float(), alpha, sigma))
            mine, theirs = sharp * (seen * own).sum(1), (sharp * seen @ self.others.T).logsumexp(1)
            found = mine - torch.where(learned, theirs, torch.logaddexp(theirs, mine))
            return torch.where(own.abs().sum(1) > 0, found, torch.zeros_like(found))

        return denoiser(x, t, condition), gradient_of(score, x)


def guide(config: Any, model: Model) -> NoisyClipGuide | None:
    """The guide that a job's options name if it is a CLIP model of noised data. Raises UsageError for one that does not fit the model."""
    name = config.clip_guidance
    said = f"--clip-guidance {name}"
    if name is None or NOISED not in read_json(find(name, said) / "config.json"):
        return None
    if given := config.changed("clip_through", "clip_cutouts"):
        raise UsageError(f"{given[0]}: {name} sees noised data, and no estimate", "leave it out")
    clip = load(name, said)
    info, hint = clip.info, f"distill clip --noisy --model {model.lineage.name} trains one"
    if tuple(info["shape"]) != model.shape:
        shapes = f"of data of shape {tuple(info['shape'])}, those of {model.lineage.name} are {model.shape}"
        raise UsageError(f"{said}: it has learned {info['model']}, {shapes}", hint)
    if info["schedule"] != described(model.denoiser.schedule):
        theirs = f"{info['schedule'].get('kind')} of {info['model']}"
        raise UsageError(f"{said}: of another noise schedule ({theirs}) than {model.lineage.name}'s", hint)
    if info["model"] != model.lineage.name:
        say(f"{said}: it has learned the noised data of {info['model']}, and leads {model.lineage.name}: of the same shape and schedule")
    return NoisyClipGuide(clip, model.denoiser.schedule, SCALE if config.clip_scale is None else config.clip_scale, f"CLIP {name}")

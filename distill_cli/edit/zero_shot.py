"""Zero-shot editing with consistency students (Song et al. 2303.01469, section 6.3 and appendix D).

What is known of a picture is its part in a subspace; each estimate of the student gets that part put back before noise is
added again. The subspaces: pixels outside a mask, the luminance of each pixel, the mean of each patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_cli.diffusion import solvers
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import GRID, NoiseSchedule
from distill_cli.errors import UsageError
from distill_cli.models.model import Model

Projection = Callable[[Tensor], Tensor]
"""(B, C, H, W) -> its part in the known subspace; twice is once, and it never makes a picture longer."""

LUMINANCE = (0.2989, 0.5870, 0.1140)
WHITE = sum(LUMINANCE) ** 2 / sum(weight**2 for weight in LUMINANCE)
"""The sum over the channels of white's part along the luminance weights."""
STROKES = (20, 24, 28, 32, 36)
"""From about sigma 2. The paper starts at 5.4 on 256 pixels; fewer pixels keep less of their strokes under the same noise."""
EVERY_FOURTH = tuple(range(0, GRID, 4))
GAMUT_ROUNDS = 1000


def inpainting(known: Tensor) -> Projection:
    """The pixels where `known` (1 or B, 1, H, W) is 1."""
    return lambda x: x * known.to(x)


def luminance(x: Tensor) -> Tensor:
    """The part of each pixel along the luminance weights."""
    direction = torch.tensor(LUMINANCE, dtype=x.dtype, device=x.device)
    direction = (direction / direction.norm()).view(1, 3, 1, 1)
    return (x * direction).sum(1, keepdim=True) * direction


def patch_means(patch: int) -> Projection:
    """Each channel's mean over patches of `patch` pixels square."""
    return lambda x: F.interpolate(F.avg_pool2d(x, patch), scale_factor=patch, mode="nearest")


def replacing(known: Tensor, projection: Projection) -> Projection:
    """x clamped to [-1, 1], with `known`, the projection of a picture, in the place of its own."""

    def replace(x: Tensor) -> Tensor:
        x = x.clamp(-1, 1)
        return x - projection(x) + known

    return replace


def into_gamut(x: Tensor, known: Tensor, projection: Projection) -> Tensor:
    """The picture in [-1, 1] nearest to x whose known part is `known`.

    Putting a luminance back can leave the range of colours, and cutting it off would lose the luminance again. The nearest
    picture is clamp(x + m) with a multiplier m in the known subspace, found by accelerated gradient ascent (Nesterov 1983).
    """
    multiplier = ahead = torch.zeros_like(x)
    for k in range(GAMUT_ROUNDS):
        missing = known - projection((x + ahead).clamp(-1, 1))
        if missing.abs().max() < 1e-4:
            break
        last, multiplier = multiplier, ahead + missing
        ahead = multiplier + k / (k + 3) * (multiplier - last)
    return (x + ahead).clamp(-1, 1)


def check_can_edit(model: Model, name: str) -> NoiseSchedule:
    """The student's schedule; raises UsageError for a model that cannot edit, with what can."""
    if model.sampler.knows == "pure noise":
        raise UsageError(
            f"--model {name}: the student knows pure noise alone, an edit needs every noise level",
            "use a consistency student: distill cm --teacher ... makes one",
        )
    if not model.sampler.edits:
        raise UsageError(f"--model {name}: no consistency student", "distill cm --teacher ... makes one")
    return model.denoiser.schedule


def labels_of(model: Model, count: int, classes: list[int] | None, start: int = 0) -> Tensor:
    """(count,) labels: those asked for in turn, or the null label."""
    if classes is not None or not model.conditioner.classes:
        return model.conditioner.labels(count, classes, start)
    if model.conditioner.null_label is None:
        raise UsageError("--classes: this student knows no null class", "say which classes the pictures have, in their order")
    return torch.full((count,), model.conditioner.null_label)


@torch.no_grad()
def edit(
    model: Model,
    x: Tensor,
    times: list[float],
    labels: Tensor,
    draws: Draws,
    known: Tensor | None = None,
    projection: Projection | None = None,
) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] from x at noise level times[0]; with a projection their known part is `known`."""
    device = next(model.denoiser.parameters()).device
    options: dict[str, Any] = {}
    if projection is not None:
        assert known is not None
        known = known.to(device)
        options["project"] = replacing(known, projection)
    out = solvers.few_step(
        model.denoiser,
        model.denoiser.schedule,
        x.to(device),
        torch.tensor(times, dtype=torch.float64),
        model.conditioner(labels.to(device)),
        sigma_min=model.denoiser.scales.sigma_min,
        noise=lambda k: draws.normal("solver", model.shape, turn=k).to(device),
        **options,
    )
    if projection is None:
        return out.clamp(-1, 1).cpu()
    assert known is not None
    return into_gamut(out, known, projection).cpu()


def between(first: Tensor, last: Tensor, frames: int) -> Tensor:
    """(frames, C, H, W) on the arc from one noise to another, both included: each is standard normal (appendix D)."""
    angle = torch.acos((first * last).sum() / (first.norm() * last.norm()))
    share = torch.linspace(0, 1, frames).view(-1, 1, 1, 1)
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * last) / math.sin(angle.item())

"""Zero-shot editing with consistency students (Song et al. 2303.01469, section 6.3 and appendix D).

The known part of a picture is its projection onto a subspace: pixels outside a mask, the luminance of each pixel, or the
mean of each patch. It is put back into each of the student's estimates before noise is added again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_cli.diffusion import solvers
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import GRID, NoiseSchedule
from distill_cli.errors import UsageError
from distill_cli.models.model import Model

Projection = Callable[[Tensor], Tensor]
"""An orthogonal projection (B, C, H, W) -> (B, C, H, W) onto the known subspace."""

LUMINANCE = (0.2989, 0.5870, 0.1140)
WHITE = sum(LUMINANCE) ** 2 / sum(weight**2 for weight in LUMINANCE)
"""The luminance weights in the projection of white, summed over the channels."""
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
    """x clamped to [-1, 1], with its projection replaced by `known`, the projection of a picture."""

    def replace(x: Tensor) -> Tensor:
        x = x.clamp(-1, 1)
        return x - projection(x) + known

    return replace


def into_gamut(x: Tensor, known: Tensor, projection: Projection) -> Tensor:
    """The picture in [-1, 1] nearest to x whose known part is `known`.

    Replacing the luminance can leave the range of colours, and clamping would change the luminance again. The nearest picture
    is clamp(x + m) with a multiplier m in the known subspace, found by accelerated gradient ascent (Nesterov 1983).
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
    """The student's schedule. Raises UsageError for a model that cannot edit."""
    if model.sampler.knows == "pure noise":
        knows = f"--model {name}: the student knows pure noise alone, an edit needs every noise level"
        raise UsageError(knows, "use a consistency student: distill cm --teacher ... makes one")
    if not model.sampler.edits:
        raise UsageError(f"--model {name}: no consistency student", "distill cm --teacher ... makes one")
    return model.denoiser.schedule


def labels_of(model: Model, count: int, classes: list[int] | None, start: int = 0) -> Tensor:
    """(count,) labels: the given ones in turn, or else the null label."""
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
    """Pictures (B, C, H, W) in [-1, 1] from x at noise level times[0]. With a projection their known part is `known`."""
    device = next(model.denoiser.parameters()).device
    run = partial(
        solvers.few_step,
        model.denoiser,
        model.denoiser.schedule,
        x.to(device),
        torch.tensor(times, dtype=torch.float64),
        model.conditioner(labels.to(device)),
        sigma_min=model.denoiser.scales.sigma_min,
        noise=lambda k: draws.normal("solver", model.shape, turn=k).to(device),
    )
    if known is None or projection is None:
        return run().clamp(-1, 1).cpu()
    known = known.to(device)
    return into_gamut(run(project=replacing(known, projection)), known, projection).cpu()


def between(first: Tensor, last: Tensor, frames: int) -> Tensor:
    """(frames, C, H, W) on the arc from one noise to another, both included: each is standard normal (appendix D)."""
    angle = torch.acos((first * last).sum() / (first.norm() * last.norm()))
    share = torch.linspace(0, 1, frames).view(-1, 1, 1, 1)
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * last) / math.sin(angle.item())

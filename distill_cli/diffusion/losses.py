"""Losses for distribution matching, denoising and regression, from (B, C, H, W) to a scalar or (B,)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_cli.diffusion.condition import NOTHING, Condition
from distill_cli.diffusion.denoiser import Denoiser
from distill_cli.diffusion.schedule import NoiseSchedule, add_noise, expand
from distill_cli.diffusion.transfer import sent


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where that is better."""
    return x if x.dtype == torch.float64 else x.float()


def matching_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The distribution-matching gradient of each sample (Yin et al. 2311.18828, eq. 7 and 8), in float32 or better.

    x: the student's images; `real`, `fake`: estimates of x0 at x_t by the (guided) teacher and the fake score; all
    (B, C, H, W). The weight divides by each sample's mean |x - real|; the paper's sigma^2 / alpha and the conversion
    from scores to x0 cancel. A sample that the teacher reproduces exactly has gradient 0.
    """
    x, real, fake = (wide(each.detach()) for each in (x, real, fake))
    scale = (x - real).abs().flatten(1).mean(1)
    tiny = torch.finfo(scale.dtype).tiny
    return (fake - real) / expand(scale.clamp(min=tiny), x)


def matching_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of value 0.5 mean(gradient^2) whose derivative by x is gradient / x.numel()."""
    x = wide(x)
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def denoising_loss(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    condition: Condition = NOTHING,
    *,
    sigma_data: float = 0.5,
    error: str = "noise",
) -> Tensor:
    """Weighted denoising error of each sample, (B,): the loss for a teacher, and for the fake score on x.detach().

    x, noise (B, C, H, W), t (B,). Its mean is the golden `fake_loss`.
    """
    x = wide(x)
    estimate = denoiser(add_noise(schedule, x, sent(noise, x.device, x.dtype), t), t, condition)
    squared = (estimate - x).square().flatten(1).mean(1)
    return schedule.weight(t.to(squared), sigma_data, error) * squared


def distance(kind: str, x: Tensor, reference: Tensor, c: float) -> Tensor:
    """(B,) distance: l1 or l2 as means over a sample, or pseudo-Huber sqrt(|d|^2 + c^2) - c with a sum (c = 0: the norm)."""
    delta = (x - reference).flatten(1)
    if kind == "l1":
        return delta.abs().mean(1)
    if kind == "l2":
        return delta.square().mean(1)
    if kind == "huber":
        squared = delta.square().sum(1)
        return (squared + max(c * c, torch.finfo(squared.dtype).tiny)).sqrt() - c
    raise ValueError(f"metric {kind!r} is none of l1, l2, huber")


def regression_loss(kind: str, x: Tensor, reference: Tensor) -> Tensor:
    """(B,) distance of the student's images from the teacher's with the same noise: l2, or huber / sqrt(dimensions).

    huber's c is 0.00054 sqrt(dimensions) (Song & Dhariwal 2310.14189, section 3.3).
    """
    root = x[0].numel() ** 0.5
    out = distance(kind, x.float(), reference.float(), 0.00054 * root)
    return out / root if kind == "huber" else out

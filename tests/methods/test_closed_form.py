"""A whole distillation against an exact answer: the teacher is a Gaussian in closed form, the networks are small."""

import torch

from distill_cli.diffusion.denoiser import MixtureDenoiser
from distill_cli.diffusion.schedule import EDMSchedule
from tests.plane import distilled

MEAN, STD = torch.tensor([0.6, -0.4]), 0.3
SCHEDULE = EDMSchedule(0.02, 10.0)
GAUSSIAN = MixtureDenoiser(MEAN.view(1, 2, 1, 1), torch.ones(1), STD, SCHEDULE)


def test_the_student_has_the_teachers_mean_and_spread():
    points = distilled(GAUSSIAN, SCHEDULE, 500, fake_steps=2)
    assert (points.mean(0) - MEAN).abs().max() < 0.08
    assert ((points.std(0) / STD - 1).abs() < 0.3).all()


def test_without_the_fake_score_it_collapses():
    """The real score alone pulls every point to the mode: the spread is the fake score's doing."""
    points = distilled(GAUSSIAN, SCHEDULE, 500, fake_score=False)
    assert (points.mean(0) - MEAN).abs().max() < 0.08
    assert (points.std(0) < 0.3 * STD).all()

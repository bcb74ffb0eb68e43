"""The mathematics against numbers of the papers' own programs (see ../golden/README.md), float64."""

import torch

from distill_cli.diffusion import losses, solvers
from distill_cli.diffusion.guidance import Guided
from distill_cli.diffusion.schedule import EDMSchedule, TableSchedule, add_noise
from tests.conditions import labels_of, of


def close(ours, theirs, relative):
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


def test_edm_heun(golden):
    g = golden("edm_heun")
    schedule = EDMSchedule(g.header["sigma_min"], g.header["sigma_max"], g.header["rho"])
    x0 = solvers.heun(g.mixture("teacher"), schedule, schedule.prior_std * g["noise"], schedule.times(g.header["num_steps"]))
    close(x0, g["x0"], 1e-9)


def matching(g, schedule, t, real):
    x = g["x"].clone().requires_grad_(True)
    noisy = add_noise(schedule, g["x"], g["noise"], t)
    fake = g.mixture("fake", schedule)
    gradient = losses.matching_gradient(x, real(noisy, t), fake(noisy, t))
    loss = losses.matching_loss(x, gradient)
    loss.backward()
    return gradient, loss.detach(), x.grad, fake


def test_dmd_edm(golden):
    g = golden("dmd_edm")
    schedule, t = EDMSchedule(), g["sigma"]
    gradient, loss, derivative, fake = matching(g, schedule, t, g.mixture("teacher", schedule))
    close(gradient, g["grad"], 1e-9)
    close(loss, g["loss"], 1e-9)
    close(derivative, g["dloss_dx"], 1e-9)
    errors = losses.denoising_loss(fake, schedule, g["x"], g["noise"], t, sigma_data=g.header["sigma_data"])
    close(errors.mean(), g["fake_loss"], 1e-9)


def test_dmd_sd(golden):
    g = golden("dmd_sd")
    schedule, t = TableSchedule(g["alphas_cumprod"]), g["t"].double()
    cond, uncond = g.mixture("teacher_cond", schedule), g.mixture("teacher_uncond", schedule)

    def both(x, t, condition):  # label 0 is the condition, label 1 the null condition
        return torch.where(labels_of(condition).view(-1, 1, 1, 1) == 0, cond(x, t), uncond(x, t))

    teacher = Guided(both, g.header["guidance_scale"], of(torch.tensor([1])))
    labels = of(torch.zeros(len(t), dtype=torch.long))
    gradient, loss, derivative, fake = matching(g, schedule, t, lambda x, t: teacher(x, t, labels))
    close(gradient, g["grad"], 1e-6)
    close(loss, g["loss"], 1e-6)
    close(derivative, g["dloss_dx"], 1e-6)
    close(losses.denoising_loss(fake, schedule, g["x"], g["noise"], t).mean(), g["fake_loss"], 1e-6)

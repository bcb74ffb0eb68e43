"""Guides against closed forms: an unconditional mixture led by the exact classifier of its components is the conditional one."""

import pytest
import torch

from distill_cli.diffusion.condition import GUIDE, Condition
from distill_cli.diffusion.denoiser import MixtureDenoiser
from distill_cli.diffusion.guidance import Guided, Steered, Unconditional, estimates, gradient_of, guided, steered
from distill_cli.diffusion.schedule import FlowSchedule, add_noise, expand
from tests.conditions import labels_of, of
from tests.diffusion.test_denoiser import SCHEDULES, mixture

GROUP = torch.tensor([0, 0, 1])
"""The class of each component of the mixture."""
PART = f"{GUIDE}class"


def asked(classes):
    """The condition that asks a guide for classes; -1 for none."""
    return Condition({PART: (torch.tensor(classes)[:, None] == torch.arange(2)).double()})


def of_class(whole, number):
    """The mixture of a class alone."""
    mine = number == GROUP
    return MixtureDenoiser(whole.means[mine], whole.weights[mine] / whole.weights[mine].sum(), whole.std, whole.schedule)


class Exact:
    """log p(class | x_t) of the mixture's classes, by Bayes' rule."""

    def __init__(self, whole, scale=1.0):
        self.whole, self.scale = whole, scale

    def __call__(self, denoiser, x, t, condition):
        whole, schedule = self.whole, self.whole.schedule

        def score(x):
            a, s = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
            variance = ((a * whole.std) ** 2 + s**2).flatten(1)
            logits = whole.weights.log() - (x[:, None] - a[:, None] * whole.means).flatten(2).square().sum(2) / (2 * variance)
            classes = torch.stack([logits[:, number == GROUP].logsumexp(1) for number in (0, 1)], 1)
            return (condition.parts[PART] * classes.log_softmax(1)).sum(1)

        return denoiser(x, t, condition), gradient_of(score, x)


def noised(name):
    schedule, t = SCHEDULES[name]
    generator = torch.Generator().manual_seed(3)
    x0, eps = (torch.randn(4, 2, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    return schedule, add_noise(schedule, x0, eps, t), t


@pytest.mark.parametrize("name", SCHEDULES)
def test_led_by_the_exact_classifier_it_is_the_conditional_denoiser(name):
    schedule, x, t = noised(name)
    whole = mixture(schedule)
    led, classes = Steered(whole, schedule, Exact(whole)), [0, 1, 1, 0]
    with torch.no_grad():  # as solvers and teachers are called
        out, alone = led(x, t, asked(classes)), led(x, t, asked([-1] * 4))
    wanted = torch.cat([of_class(whole, number)(x[k : k + 1], t[k : k + 1]) for k, number in enumerate(classes)])
    assert (out - wanted).abs().max() < 1e-10
    assert (whole(x, t) - wanted).abs().max() > 0.1  # there is something to lead
    assert torch.equal(alone, whole(x, t))
    with torch.no_grad():
        double = Steered(whole, schedule, Exact(whole, 2.0))(x, t, asked(classes))
    assert (double - (2 * wanted - whole(x, t))).abs().max() < 1e-9  # the shift is linear in the scale


def test_without_signal_the_term_is_left_out_for_those_samples_alone():
    schedule, t = FlowSchedule(), torch.tensor([1.0, 0.6], dtype=torch.float64)
    whole, x = mixture(schedule), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        out = Steered(whole, schedule, Exact(whole))(x, t, asked([1, 1]))
    assert torch.equal(out[0], whole(x, t)[0])
    assert (out[1] - of_class(whole, 1)(x, t)[1]).abs().max() < 1e-10


def test_it_lies_on_classifier_free_guidance_and_on_the_null_denoiser():
    """The conditional estimate is told beside the guided one, and no network is asked twice."""
    schedule, x, t = noised("table")
    whole, null, calls = mixture(schedule), of(torch.tensor([2])), []

    def network(x, t, condition):
        calls.append(len(x))
        return torch.where(labels_of(condition.seen).view(-1, 1, 1, 1) == 2, whole(x, t), 0.5 * x)

    condition = of(torch.tensor([0, 1, 1, 0])).plus(PART, asked([0, 1, 1, 0]).parts[PART])
    shift = Steered(whole, schedule, Exact(whole))(x, t, condition) - whole(x, t)
    for scale, kind, base, evaluations in (
        (3.0, Guided, whole(x, t) + 3 * (0.5 * x - whole(x, t)), [8]),
        (0, Unconditional, whole(x, t), [4, 4]),
    ):
        led = steered(guided(network, scale, null), schedule, (Exact(whole),))
        assert isinstance(led.denoiser, kind)
        calls.clear()
        cond, out = estimates(led, x, t, condition)
        assert calls == evaluations
        assert (cond - 0.5 * x).abs().max() < 1e-12
        assert (out - base - shift).abs().max() < 1e-10
        assert torch.equal(led(x, t, condition), out)


def test_the_null_condition_asks_guides_for_nothing():
    condition, null = of(torch.tensor([0, 1])).plus(PART, asked([0, 1]).parts[PART]), of(torch.tensor([2]))
    half = condition.where(torch.tensor([True, False]), null)
    assert half.parts["class_labels"].tolist() == [2, 1]
    assert half.parts[PART].tolist() == [[0, 0], [0, 1]]
    only = condition.seen
    assert set(only.parts) == {"class_labels"}
    assert only.seen is only


def test_gradients_are_of_float32_under_autocast():
    weight = torch.randn(16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = gradient_of(lambda x: (x @ weight).square().sum(1) / 2, x := torch.randn(3, 16))
    assert found.dtype == torch.float32
    assert torch.allclose(found, x @ weight @ weight.T, rtol=1e-4, atol=1e-4)

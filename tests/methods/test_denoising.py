import pytest
import torch

from distill_cli.data import open_images
from distill_cli.data.kinds import PICTURES
from distill_cli.diffusion.denoiser import MixtureDenoiser
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import add_noise, expand
from distill_cli.methods.train.config import TrainConfig
from distill_cli.methods.train.denoising import Denoising
from tests.conditions import labels_of

NETWORK = {"channels": [8], "attention": [False], "groups": 4, "head": 8}


def objective(**options):
    return Denoising(TrainConfig(device="cpu", network=NETWORK, **options), open_images("digits"))


def drawn(train, draws):
    return train.schedule.drawn(draws, train.config.p_mean, train.config.p_std)


def test_edm_times_are_lognormal():
    log = drawn(objective(), Draws(0, range(5000))).log()
    assert abs(log.mean() + 1.2) < 0.05
    assert abs(log.std() - 1.2) < 0.05


def test_ddpm_times_are_whole_and_uniform():
    t = drawn(objective(prediction="eps"), Draws(0, range(5000)))
    assert torch.equal(t, t.floor())
    assert t.min() == 0
    assert 990 < t.max() <= 999
    assert abs(t.mean() - 499.5) < 15


def test_one_step_by_hand():
    """Images, labels and times of the first batch from the draws; a tenth of the labels becomes the null class."""
    train = objective(label_dropout=0.5)
    seen = {}

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t, condition):
            seen.update(x=x, t=t, labels=labels_of(condition))
            return x * 0 + self.p

    train.trained["teacher"].module = Spy()
    draws = Draws(0, range(64))
    loss = next(train.turns(0, draws)).value
    x, labels = train.images.batch([train.order[i] for i in range(64)], draws)
    sigma = drawn(train, draws)
    assert torch.equal(seen["x"], x + expand(sigma, x) * draws.normal("noise", (3, 16, 16)))
    dropped = seen["labels"] == 10
    assert torch.equal(seen["labels"][~dropped], labels[~dropped])
    assert 20 < dropped.sum() < 44
    expected = ((sigma**-2 + 4) * x.square().mean((1, 2, 3))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_set_without_classes_trains_without_labels(tmp_path):
    import numpy as np
    from PIL import Image

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "x.png")
    train = Denoising(TrainConfig(device="cpu", network=NETWORK, data=str(tmp_path), resolution=8), open_images(str(tmp_path), 8))
    assert train.teacher.conditioner.null_label is None
    assert torch.isfinite(next(train.turns(0, Draws(0, range(2)))).value)


class Gaussian:
    """Pictures of independent N(0.3, 0.5^2) pixels."""

    kind, shape, classes = PICTURES, (1, 2, 2), ()

    def __len__(self):
        return 1000

    def batch(self, positions, draws):
        return 0.3 + 0.5 * draws.normal("augment", self.shape), torch.zeros(len(positions), dtype=torch.long)


class Affine(torch.nn.Module):
    """x and t to w(t) x + b(t), with polynomials of t: no closed form is built in."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(2, 8))

    def forward(self, x, time, condition):
        powers = torch.stack([torch.cos(k * torch.pi * time / 1000) for k in range(8)], 1)
        w, b = (expand(values, x) for values in (powers @ self.weights.T).unbind(1))
        return w * x + b


def test_a_flow_teacher_of_a_gaussian_is_the_closed_form():
    """At every time, from the steps that `distill train` takes, times and weights included."""
    train = Denoising(TrainConfig(device="cpu", network=NETWORK, prediction="flow", shift=2.0), Gaussian())
    network = train.trained["teacher"].module
    network.network = Affine()
    optimizer = torch.optim.Adam(network.parameters(), 0.03)
    for step in range(400):
        optimizer.zero_grad()
        next(train.turns(step, Draws(0, range(512 * step, 512 * step + 512)))).value.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 400)
    exact = MixtureDenoiser(torch.full((1, 1, 2, 2), 0.3), torch.ones(1), 0.5, train.schedule)
    for t in (0.1, 0.4, 0.7, 0.9, 0.98):
        times = torch.full((256,), t)
        x = add_noise(
            train.schedule, Gaussian().batch(range(256), Draws(1, range(256)))[0], Draws(1, range(256)).normal("noise", (1, 2, 2)), times
        )
        with torch.no_grad():
            assert (network(x, times) - exact(x, times)).abs().mean() < 0.02, t


def test_flow_times_are_logit_normal_unless_asked_otherwise():
    said = TrainConfig(prediction="flow"), TrainConfig(prediction="flow", p_mean=0.5), TrainConfig()
    assert [(config.p_mean, config.p_std) for config in said] == [(0.0, 1.0), (0.5, 1.0), (-1.2, 1.2)]
    for prediction, option in (("flow", "beta_schedule"), ("eps", "shift"), ("edm", "shift")):
        value = {"beta_schedule": "scaled_linear", "shift": 3.0}[option]
        with pytest.raises(ValueError, match=f"{option} is not used with prediction {prediction}"):
            TrainConfig(prediction=prediction, **{option: value})

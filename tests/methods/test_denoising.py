import pytest
import torch

from distill_cli.data import open_images
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import expand
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

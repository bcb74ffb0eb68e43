import pytest
import torch

from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.losses import denoising_loss, matching_gradient, matching_loss, regression_loss
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule, expand


class Raw(torch.nn.Module):
    def forward(self, x, t, condition):
        self.said = torch.sin(3 * x + expand(t, x))
        return self.said


TABLE = TableSchedule.from_config({"beta_schedule": "linear"})
TRAINED = {
    "edm": (EDMSchedule(), [0.01, 0.7, 30.0]),
    "eps": (TABLE, [3.0, 400.0, 999.0]),
    "v": (TABLE, [3.0, 400.0, 999.0]),
    "flow": (FlowSchedule(3.0), [0.003, 0.5, 1.0]),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_the_weighted_x0_error_is_the_raw_networks_plain_error(kind):
    """EDM's weight and the plain errors of noise, velocity and flow are all the mean square of F - target."""
    schedule, times = TRAINED[kind]
    t = torch.tensor(times, dtype=torch.float64)
    x, noise = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    raw = Raw()
    denoiser = NetworkDenoiser(raw, schedule, kind, time_input="t")
    loss = denoising_loss(denoiser, schedule, x, noise, t, error=denoiser.error)
    a, s = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    norm = (s * s + 0.25).sqrt()
    edm = (x - 0.25 / norm**2 * (x + s * noise)) / (s * 0.5 / norm)
    target = {"eps": noise, "v": a * noise - s * x, "flow": noise - x, "edm": edm}[kind]
    expected = (raw.said - target).square().mean((1, 2, 3))
    assert (loss / expected - 1).abs().max() < 1e-9


def test_matching_is_finite_where_the_teacher_is_exact():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(matching_gradient(x, x, x), torch.zeros_like(x))


def test_matching_in_half_precision_is_computed_in_float32():
    x = torch.full((1, 1, 2, 2), 100.0, dtype=torch.bfloat16)
    real, fake = torch.full((1, 1, 2, 2), 99.0), torch.full((1, 1, 2, 2), 99.001)
    gradient = matching_gradient(x, real, fake)
    assert gradient.dtype == torch.float32
    assert (gradient - 0.001).abs().max() < 1e-5
    assert matching_loss(x, gradient).item() == pytest.approx(0.5e-6, rel=0.05)


def test_regression_losses():
    x, y = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    x[0] = 0.5
    assert regression_loss("l2", x, y).tolist() == pytest.approx([0.25, 0])
    c = 0.00054 * 12**0.5  # pseudo-Huber of a sample: (sqrt(|d|^2 + c^2) - c) / sqrt(12)
    assert regression_loss("huber", x, y).tolist() == pytest.approx([((12 * 0.25 + c * c) ** 0.5 - c) / 12**0.5, 0], rel=1e-5)

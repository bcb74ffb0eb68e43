"""Rates and steps of the optimizers, in closed form."""

import pytest
import torch

from distill_cli.config import TrainingConfig
from distill_cli.training.optimizer import learning_rate, make_optimizer


def test_learning_rate():
    config = TrainingConfig(steps=110, warmup_steps=10, lr_schedule="cosine", lr_end=0.1)
    assert learning_rate(config, 2.0, 0, 110) == pytest.approx(0.2)
    assert learning_rate(config, 2.0, 9, 110) == pytest.approx(2.0)
    assert learning_rate(config, 2.0, 60, 110) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(config, 2.0, 110, 110) == pytest.approx(0.2)
    assert learning_rate(TrainingConfig(warmup_steps=0), 2.0, 5, 1000) == 2.0


def test_muon_orthogonalises_in_float32_on_a_cpu():
    """Five steps of Newton and Schulz (Jordan et al. 2024; coefficients of modded-nanogpt) in float64 agree; bfloat16's are 1e-2 apart."""
    network = torch.nn.Linear(24, 16, bias=False)
    optimizer = make_optimizer(TrainingConfig(optimizer="muon", weight_decay=0), network.parameters(), 1.0)
    before = network.weight.detach().clone()
    network.weight.grad = torch.randn(16, 24)
    optimizer.step()
    x = network.weight.grad.double()
    x = x / x.norm()
    for a, b, c in [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
                    (2.8366, -3.0525, 1.2012)]:  # fmt: skip
        x = a * x + (b * x @ x.T + c * x @ x.T @ x @ x.T) @ x
    expected = 0.2 * 24**0.5 * x
    assert (before - network.weight.detach() - expected).abs().max() < 1e-4


def test_muon_steps_by_an_orthogonal_matrix_as_long_as_one_of_adam():
    """A step's singular values are alike though its gradient's are 1 to 30, and its rms is 0.2 lr; biases go by NAdamW."""
    network = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Linear(24, 16))
    optimizer = make_optimizer(TrainingConfig(optimizer="muon", weight_decay=0), network.parameters(), 0.01)
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        u, s, v = torch.linalg.svd(torch.randn(p.flatten(1).shape if p.ndim > 1 else (len(p), 1)), full_matrices=False)
        p.grad = (u @ torch.diag(torch.logspace(-1.5, 0, len(s))) @ v).view_as(p)
    optimizer.step()
    for p, old in zip(network.parameters(), before, strict=True):
        moved = (old - p.detach()) / 0.01
        if p.ndim > 1:
            moved = moved.flatten(1) / (0.2 * max(p.flatten(1).shape) ** 0.5)
            assert torch.linalg.svdvals(moved).sub(1).abs().max() < 0.35
            assert (moved @ p.grad.flatten(1).T).trace() > 0
        else:
            assert torch.equal(moved.sign(), p.grad.sign())
            assert ((moved.abs() > 0.5) & (moved.abs() < 2)).all()

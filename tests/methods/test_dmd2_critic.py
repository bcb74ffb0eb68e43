"""The discriminator of DMD2: who learns from what, its losses, and the layer that it reads."""

import math

import pytest
import torch
from torch import nn

from distill_cli.errors import UsageError
from distill_cli.methods.dmd2 import critic
from distill_cli.models import load
from tests.methods.test_dmd2 import drawn, of


class TestDiscriminator:
    def losses_of(self, one, step=0):
        found = []
        for loss in one.turns(step, drawn()):
            loss.value.backward()
            grads = {name: [p.grad is not None for p in each.parameters()] for name, each in one.trained.items()}
            found.append((loss, grads))
            for each in one.trained.values():
                each.module.zero_grad(set_to_none=True)
        return found

    @pytest.mark.parametrize("kind", ["fake", "teacher"])
    def test_who_learns_from_what(self, kind):
        """The student's turn leaves the fake score and the head alone; the others leave the student alone."""
        one = of(data="digits", gan=kind, fake_steps=2)
        (student, of_student), *fakes = self.losses_of(one)
        assert student.network == "student"
        assert all(of_student["student"])
        assert not any(of_student["fake"])
        for loss, grads in fakes:
            assert loss.network == "fake"
            assert all(grads["fake"])
            assert not any(grads["student"])
        assert not any(p.requires_grad or p.grad is not None for p in one.frozen["teacher"].parameters())

    def test_its_losses_are_softplus(self):
        one = of(data="digits", fake_steps=1, gan_weight=0.5, critic_weight=0.25, r1_weight=2.0)
        head = one.trained["fake"].module.head
        nn.init.zeros_(head.outer.weight)
        nn.init.constant_(head.outer.bias, 1.5)
        student, fake = (loss for loss, _ in self.losses_of(one))
        softplus = [math.log1p(math.exp(sign * 1.5)) for sign in (-1, 1)]
        assert student.metrics["gan_loss"].item() == pytest.approx(softplus[0])
        assert student.value.item() == pytest.approx(student.metrics["matching_loss"].item() + 0.5 * softplus[0])
        assert fake.metrics["critic_loss"].item() == pytest.approx(sum(softplus))
        assert fake.metrics["critic_right"].item() == pytest.approx(0.5)
        assert fake.metrics["r1"].item() == 0
        assert fake.value.item() == pytest.approx(fake.metrics["score_loss"].item() + 0.25 * sum(softplus))

    def test_r1_is_the_squared_gradient(self, monkeypatch):
        """For logits a . x_t with x_t = alpha x0 + noise: E (a . nudge / size)^2 = |a|^2, alpha 1."""
        one = of(data="digits", fake_steps=1, r1_weight=1.0, batch_size=256)
        a = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
        one.trained["fake"].module.forward = lambda x, t, condition: (x, (a * x).flatten(1).sum(1))
        made = one.batch(0, drawn(256), 0)
        assert one.fake_loss(made).metrics["r1"].item() == pytest.approx(a.square().sum().item(), rel=0.25)

    def test_the_head_tells_two_clouds_apart(self):
        """Its own loss alone, on features of two means, brings nearly all logits to the right side."""
        torch.manual_seed(0)
        head = critic.Head(6, 0)
        optimizer = torch.optim.Adam(head.parameters(), 1e-2)
        apart = 0.3 * torch.tensor([1.0, -1, 1, -1, 1, -1])
        real, fake = torch.randn(256, 5, 6) + apart, torch.randn(256, 5, 6) - apart
        for _ in range(60):
            loss = nn.functional.softplus(-head(real)).mean() + nn.functional.softplus(head(fake)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = ((head(real) > 0).float().mean() + (head(fake) < 0).float().mean()) / 2
        assert right > 0.95

    @pytest.mark.parametrize("name", ["tiny", "tiny-sd", "tiny-sdxl", "tiny-sd3"])
    def test_it_reads_the_middle_of_the_network(self, name):
        """The features change with the input, have the width that the head expects, and leave no hook behind."""
        model = load(name)
        condition, t = model.example(2, "cpu"), torch.full((2,), model.denoiser.schedule.t_max / 2)
        x = torch.randn(2, *model.shape)
        estimate, features = critic.features_of(model.denoiser, x, t, condition)
        assert torch.equal(estimate, model.denoiser(x, t, condition))
        layer, width = model.backbone.middle()
        assert features.shape[::2] == (2, width)
        assert not torch.equal(features, critic.features_of(model.denoiser, x + 0.1, t, condition)[1])
        assert not layer._forward_hooks

    def test_compiled_graphs_hide_it(self):
        for name, mode, refused in (("tiny", "whole", True), ("tiny", "blocks", False), ("tiny-sd3", "blocks", True)):
            if refused:
                with pytest.raises(UsageError, match=f"compile {mode}: not with gan"):
                    critic.check(mode, load(name).backbone)
            else:
                critic.check(mode, load(name).backbone)

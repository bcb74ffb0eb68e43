import numpy as np
import torch

from distill_cli.diffusion.noise import Draws, Order


def test_a_sample_does_not_depend_on_its_batch():
    together = Draws(7, range(10)).normal("prior", (3, 4, 4))
    for batch in ([3], [9, 3, 0]):
        alone = Draws(7, batch).normal("prior", (3, 4, 4))
        assert torch.equal(alone, together[batch])


def test_streams_differ():
    one = Draws(0, [0]).normal("prior", (8,))
    assert not torch.equal(one, Draws(1, [0]).normal("prior", (8,)))
    assert not torch.equal(one, Draws(0, [1]).normal("prior", (8,)))
    assert not torch.equal(one, Draws(0, [0]).normal("noise", (8,)))
    assert not torch.equal(one, Draws(0, [0]).normal("prior", (8,), turn=1))


def test_values_are_those_of_philox():
    """Pinned: another generator, key or counter would change every store of pairs in the world."""
    expected = np.random.Generator(np.random.Philox(key=[5, 0], counter=[0, 0, 0, 42])).standard_normal(3, dtype=np.float32)
    assert Draws(5, [42]).normal("prior", (3,)).tolist() == [expected.tolist()]
    assert np.allclose(Draws(0, [0]).normal("prior", (3,)).numpy()[0], PINNED, atol=0)


PINNED = np.array([0.059911035001277924, 0.015559634193778038, -1.1644384860992432], dtype=np.float32)


def test_moments():
    draws = Draws(3, range(2000))
    normal, uniform = draws.normal("noise", (16,)), draws.uniform("time")
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert abs(uniform.mean() - 0.5) < 0.02
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_order_visits_everything_once_an_epoch():
    order = Order(1, 7)
    first, second = [order[i] for i in range(7)], [order[i] for i in range(7, 14)]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert order[3] == first[3]  # going back gives the same

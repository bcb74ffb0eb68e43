"""The world of shapes: what captions say is what pictures show, by a judge that shares no code with it."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch

from distill_cli.data import open_images, shapes
from distill_cli.data.pictures import to_uint8
from distill_cli.diffusion.noise import Draws
from tests import shapes_judge

EVERY = range(len(shapes.THINGS))


def test_every_combination_has_its_caption():
    captions = [thing.caption for thing in shapes.THINGS]
    assert len(set(captions)) == len(captions) == 2 * 8 * 4 * 5 * 3
    assert "a large red circle at the top left of a white background" in captions
    assert "a small black cross in the centre of a pink background" in captions
    assert all(shapes_judge.asked(thing.caption) == astuple(thing) for thing in shapes.THINGS)


def test_a_tenth_is_held_back():
    assert len(shapes.HELD) == 96
    assert set(shapes.HELD).isdisjoint(shapes.TRAINED)
    assert set(shapes.HELD) | set(shapes.TRAINED) == set(shapes.THINGS)
    assert len(shapes.Shapes()) == 864
    for field in range(5):  # no attribute is unseen
        assert {astuple(t)[field] for t in shapes.TRAINED} == {astuple(t)[field] for t in shapes.HELD}


def test_the_judge_reads_every_picture_right():
    """All combinations, each with its own radius, centre and colour: 100%, and the ends of the ranges too."""
    world = shapes.Shapes(shapes.THINGS)
    images, _ = world.batch(EVERY, Draws(3, EVERY))
    assert shapes_judge.judge(to_uint8(images), world.captions(EVERY))["all"] == 1
    for end in (0.0, 1.0):
        images = torch.stack([shapes.render(thing, torch.full((6,), end, dtype=torch.float64)) for thing in shapes.THINGS])
        assert shapes_judge.judge(to_uint8(images), world.captions(EVERY))["all"] == 1


def test_the_judge_reads_wrong_pictures_wrong():
    world = shapes.Shapes(shapes.THINGS)
    images = to_uint8(world.batch(EVERY, Draws(3, EVERY))[0])
    captions = world.captions(EVERY)
    flipped = shapes_judge.judge(images[:, ::-1], captions)  # right are the centre of five places and three of four shapes
    assert [flipped[name] for name in ("colour", "shape", "place", "background")] == [1, 0.75, 0.2, 1]
    assert shapes_judge.judge(images[:, :, :, ::-1], captions)["colour"] < 0.5
    blurred = (images.astype(int) + np.roll(images, 20, 2)) // 2
    assert shapes_judge.judge(blurred.astype(np.uint8), captions)["all"] < 0.1
    assert shapes_judge.judge(np.full_like(images, 150), captions)["all"] == 0
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    assert shapes_judge.judge(noise, captions)["all"] == 0


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_areas_are_those_of_the_outlines(shape):
    """Antialiased: the covered area is the outline's to a thousandth, wherever the centre lies between the pixels."""
    for x, y in ((32.0, 32.0), (31.3, 32.7)):
        covered = shapes.coverage(shape, torch.tensor([x, y], dtype=torch.float64), torch.tensor(17.0)).sum().item()
        assert covered == pytest.approx(shapes_judge.AREAS[shape] * 17**2, rel=4e-3)


def test_a_picture_is_determined_by_its_index():
    world = open_images("shapes")
    assert world.shape == (3, 64, 64)
    some, _ = world.batch([5, 17], Draws(0, [100, 7]))
    again, _ = world.batch([17], Draws(0, [7]))
    assert torch.equal(some[1], again[0])
    other, _ = world.batch([17], Draws(0, [8]))
    assert not torch.equal(some[1], other[0])
    assert -1 <= some.min() < some.max() <= 1


def test_the_triangle_points_upwards():
    x = torch.zeros(1)
    top, bottom = (shapes.distance("triangle", x, torch.tensor([y]), torch.tensor(10.0)) for y in (-11.5, 5.75))
    assert top.item() == pytest.approx(0, abs=1e-5)
    assert bottom.item() == pytest.approx(0, abs=1e-5)
    corner = shapes.distance("triangle", torch.tensor([11.5 * math.cos(math.pi / 6)]), torch.tensor([5.75]), torch.tensor(10.0))
    assert corner.item() == pytest.approx(0, abs=1e-5)

import numpy as np
import pytest
import torch
from PIL import Image

from distill_cli.data import open_images
from distill_cli.data.images import hue_to_rgb
from distill_cli.data.opened import open_picture
from distill_cli.data.pictures import grid, to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images = open_images("digits")
    theirs = load_digits()
    x, labels = images.batch(range(1797), Draws(0, range(1797)))
    assert labels.tolist() == theirs.target.tolist()
    grey = torch.nn.functional.interpolate(torch.tensor(theirs.images / 16).float()[:, None], size=16, mode="bilinear", align_corners=False)
    assert x.shape == (1797, 3, 16, 16)
    assert ((x.amax(1, keepdim=True) + 1) / 2 - grey).abs().max() < 1e-6
    assert x.min() == -1


def test_ink_has_a_uniform_hue_and_a_largest_channel_of_1():
    import colorsys

    hues = torch.rand(500)
    rgb = hue_to_rgb(hues)
    for hue, colour in zip(hues.tolist(), rgb.tolist(), strict=True):
        assert colour == pytest.approx(colorsys.hsv_to_rgb(hue, 1, 1), abs=1e-5)
    x, _ = open_images("digits").batch(range(1000), Draws(0, range(1000)))
    ink = ((x + 1) / 2).amax((2, 3))
    seen = [colorsys.rgb_to_hsv(*(c / c.max()).tolist())[0] for c in ink]
    counts = np.histogram(seen, 10, (0, 1))[0]
    assert counts.min() > 60
    assert counts.max() < 140


def test_a_picture_does_not_depend_on_its_batch():
    images = open_images("digits")
    whole, _ = images.batch(range(6), Draws(0, range(6)))
    part, _ = images.batch([4], Draws(0, [4]))
    assert torch.equal(part[0], whole[4])


@pytest.fixture
def folder(tmp_path):
    def save(name, array, mode="RGB"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(array, mode).save(path)

    save("b/wide.png", np.tile(np.array([255, 0, 0], np.uint8), (10, 20, 1)))
    save("a/clear.png", np.zeros((8, 8, 4), np.uint8), "RGBA")
    save("a/grey.png", np.full((8, 8), 51, np.uint8), "L")
    return tmp_path


def test_folders_have_classes_and_composite_alpha(folder):
    images = open_images(str(folder), 4)
    assert images.classes == ["a", "b"]
    x, labels = images.batch(range(3), Draws(0, range(3)))
    assert labels.tolist() == [0, 0, 1]
    assert torch.equal(x[0], torch.ones(3, 4, 4))  # transparent is laid on white
    assert (x[1] - (51 / 127.5 - 1)).abs().max() < 1e-6
    assert torch.equal(x[2, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_flipping_is_by_sample(tmp_path):
    array = np.zeros((4, 4, 3), np.uint8)
    array[:, :2] = 255
    Image.fromarray(array).save(tmp_path / "x.png")
    images = open_images(str(tmp_path), 4, flip=True)
    assert images.classes == []
    x, _ = images.batch([0] * 64, Draws(0, range(64)))
    left = (x[:, 0, 0, 0] == 1).sum()
    assert 15 < left < 49


def test_a_file_that_is_no_image_is_named(folder):
    (folder / "b/broken.png").write_bytes(b"not an image")
    with pytest.raises(DistillError, match="broken.png: not a readable image"):
        open_images(str(folder), 4).batch(range(4), Draws(0, range(4)))
    (folder / "stray.png").write_bytes(b"")
    with pytest.raises(DistillError, match="stray.png is in no class"):
        open_images(str(folder), 4)


def test_deep_grey_pictures_keep_their_levels(tmp_path):
    """16 bits: PIL's own conversion would cut off what is over 255."""
    from PIL import Image

    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    picture, transparent, dark = open_picture(tmp_path / "deep.png")
    assert not transparent
    assert not dark
    assert np.abs(np.asarray(picture)[..., 0] - ramp / 257).max() <= 0.5


def test_uint8_rounds_to_the_nearest():
    values = torch.tensor([-1.0, 1.0, 0.0, 2.0, -3.0, 100 / 127.5 - 1]).view(1, 1, 1, 6)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 255, 128, 255, 0, 100]


def test_grid():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, 1).repeat(2, 2).repeat(3, 3)
    picture = grid(images, columns=2, scale=2)
    assert picture.shape == (11, 11, 3)
    assert [picture[1, 1, 0], picture[1, 6, 0], picture[6, 1, 0], picture[6, 6, 0], picture[0, 0, 0]] == [0, 1, 2, 128, 128]

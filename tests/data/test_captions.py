"""Captions in pictures: words stay apart, lines fit, nothing is cut, nothing lies over a picture or another caption."""

import numpy as np
import pytest
from PIL import Image

from distill_cli.data.pictures import LINE, MARGIN, NARROW, SPACE, TITLED, font, grid, save_comparison, wrapped

SAID = "teacher: 35 network evaluations an image"
TEXTS = [
    SAID,
    "a large red circle at the left " * 9,
    "runs/a/folder/whose_name_has_no_space/and/goes/on/for/ever/and/ever@2 and more",
    "\u4e2d" * 90,
    "a  été\n\tbroken line \x1b[1m \udce9",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("width", [5, NARROW, 300])
def test_lines_fit_and_nothing_is_cut(text, width):
    lines = wrapped(text, width)
    for line in lines:
        ends = [x + font(word.isascii()).getlength(word) for x, word in line]
        assert ends[-1] <= width or all(len(word) == 1 for _, word in line)
        assert all(x - end >= SPACE for (x, _), end in zip(line[1:], ends, strict=False))
    assert "".join(word for line in lines for _, word in line) == "".join(text.split()).replace("\x1b", "\\x1b").replace(
        "\udce9", "\\udce9"
    )


def test_drawn_words_stand_apart(tmp_path):
    """The words of a title are counted by the gaps of three pixels or more between them."""
    save_comparison([(SAID, np.zeros((1, 8, 400, 3), np.uint8))], tmp_path / "a.png", scale=1)
    ink = np.asarray(Image.open(tmp_path / "a.png").convert("L"))[: LINE + 4] < 128
    inked = np.flatnonzero(ink.any(0))
    assert (np.diff(inked) > 3).sum() + 1 == len(SAID.split())
    assert not ink[:, :4].any()


@pytest.mark.parametrize(("side", "scale"), [(16, 2), (16, 16)])
def test_a_caption_stays_below_its_picture(side, scale):
    """Each caption alone changes the pixels of its own place, below pictures that stay as they are."""
    images = np.arange(6 * side * side * 3, dtype=np.uint8).reshape(6, side, side, 3)
    captions = [SAID, "short", "", SAID * 3, "x" * 99, "last"]
    whole = grid(images, 4, scale, captions)
    cell, gap = max(side * scale, NARROW), scale // 2
    first, second = (LINE * len(wrapped(captions[k], cell - 2 * MARGIN)) for k in (3, 4))
    seen = np.full(whole.shape[:2], 0)
    for k, caption in enumerate(captions):
        under = LINE * (len(wrapped(captions[3], cell - 2 * MARGIN)) if k < 4 else len(wrapped(captions[4], cell - 2 * MARGIN)))
        top = gap if k < 4 else gap + side * scale + LINE * len(wrapped(captions[3], cell - 2 * MARGIN)) + gap
        left = gap + k % 4 * (cell + gap)
        assert np.array_equal(whole[top : top + side * scale, left : left + side * scale], images[k].repeat(scale, 0).repeat(scale, 1))
        box = whole[top + side * scale : top + side * scale + under, left : left + cell]
        assert (box != 128).any() == bool(caption)
        seen[top : top + side * scale + under, left : left + cell] = 1
    assert (whole[seen == 0] == 128).all()


def test_long_titles_wrap_over_narrow_pictures(tmp_path):
    save_comparison([(SAID * 3, np.zeros((1, 8, 8, 3), np.uint8)), ("b", np.full((1, 8, 8, 3), 9, np.uint8))], tmp_path / "a.png", scale=1)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    lines = len(wrapped(SAID * 3, TITLED - 2 * MARGIN))
    assert lines > 2
    assert picture.shape == (2 * (8 + 2 + 8) + LINE * (lines + 1), TITLED, 3)
    assert (picture[LINE * lines + 9 : LINE * lines + 17, 1:9] == 0).all()
    assert (picture[-9:-1, 1:9] == 9).all()
    assert (picture[: LINE * lines + 8, -4:] == 255).all()

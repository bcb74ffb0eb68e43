"""Pictures of other depths, of several frames, and several broken ones at once."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distill_cli.data import listing, open_images
from distill_cli.data.folders import pictures_below
from distill_cli.data.opened import BrokenPicture, header, open_picture
from distill_cli.diffusion.noise import Draws
from tests.cli.test_bad_input import one_line
from tests.data.test_folders import tiff
from tests.training.test_data_of_runs import TRAIN, cut, photos  # noqa: F401


def deep_png(values, colour, clear):
    """A PNG of 16 bits with a transparent value."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    parts = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + parts


@pytest.mark.parametrize(("dtype", "bits", "kind"), [(np.int8, 8, 2), (np.int16, 16, 2), (np.int32, 32, 2), (np.uint32, 32, 1)])
def test_a_depth_that_says_no_white_is_seen_in_the_header(dtype, bits, kind, tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(np.full((4, 4), 51, dtype), bits, kind))
    for call in (header, open_picture):
        with pytest.raises(BrokenPicture) as caught:
            call(tmp_path / "x.tif")
        assert f"integers of {bits} bits: nothing says which is white" in caught.value.message or bits == 32
        assert "floats from 0 to 1" in caught.value.hint or bits == 32


def test_a_value_of_16_bits_may_be_transparent(tmp_path):
    grey = np.array([[1000, 40000]])
    (tmp_path / "g.png").write_bytes(deep_png(grey, 0, [1000]))
    (tmp_path / "c.png").write_bytes(deep_png(grey[..., None].repeat(3, 2), 2, [1000] * 3))
    for name in ("g.png", "c.png"):
        found = open_picture(tmp_path / name)
        assert found.transparent
        assert np.asarray(found.image)[0, :, 0].tolist() == [255, 156]


def test_a_picture_of_another_depth_is_replaced_as_told(distill, photos, tmp_path):  # noqa: F811
    (photos / "dog/6.tif").write_bytes(tiff(np.full((32, 32), 51, np.float32), 32, 3))
    ended = distill(*TRAIN, "--steps", 8, "--out", "r")
    one_line(ended, 1, "dog/6.tif: floats from 51 to 51", "as floats from 0 to 1, then --resume r")
    (photos / "dog/6.tif").write_bytes(tiff(np.full((32, 32), 0.2, np.float32), 32, 3))
    again = distill("train", "--resume", "r")
    assert again.code == 0, again.err
    (photos / "dog/6.tif").write_bytes(tiff(np.full((32, 32), 51, np.int32), 32, 2))
    one_line(distill(*TRAIN, "--out", "s"), 1, "dog/6.tif: integers of 32 bits")
    assert not (tmp_path / "s").exists()


def test_all_broken_pictures_are_noted_at_once(distill, photos, tmp_path):  # noqa: F811
    for name in ("cat/1.jpg", "dog/2.jpg", "dog/5.jpg"):
        cut(photos / name)
    one_line(distill(*TRAIN, "--steps", 8, "--out", "r"), 1, "3 pictures are broken: cat/1.jpg, dog/2.jpg, dog/5.jpg")
    assert listing.found_broken(tmp_path / "r") == {"cat/1.jpg", "dog/2.jpg", "dog/5.jpg"}
    for name in ("cat/1.jpg", "dog/2.jpg", "dog/5.jpg"):
        (photos / name).unlink()
    assert distill("train", "--resume", "r").code == 0
    for k in range(3):
        (photos / f"cat/{k}.jpg").write_bytes(b"<html>")
    named = distill(*TRAIN, "--out", "s").err
    assert all(f"cat/{k}.jpg: not a readable image" in named for k in range(3))


def test_the_first_of_several_frames_is_taken_and_said(distill, photos, tmp_path):  # noqa: F811
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for name in ("cat/6.gif", "cat/7.tif"):
        frames[0].save(photos / name, save_all=True, append_images=frames[1:])
        assert header(photos / name)
        assert np.asarray(open_picture(photos / name).image)[0, 0].tolist() == [255, 0, 0]
    assert not header(photos / "cat/0.jpg")
    said = listing.prepare(open_images(str(photos), 8), None)
    assert "2 of 14 pictures have several frames: the first is taken" in said


def test_dark_pictures_are_said_once_by_the_first_process(tmp_path, capsys, monkeypatch):
    (tmp_path / "p").mkdir()
    for k in range(4):
        (tmp_path / f"p/{k}.tif").write_bytes(tiff(np.full((4, 4), 200, np.uint16), 16, 1))
    for rank, count in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        images = open_images(str(tmp_path / "p"), 4)
        for _ in range(2):
            images.batch(range(4), Draws(0, range(4)))
        assert capsys.readouterr().err.count("16 bits a channel") == count


def test_what_is_no_file_is_counted(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "x.png")
    found = pictures_below(tmp_path)
    assert [file.name for file in found.files] == ["a.png"]
    assert "1 pipe or device" in found.without

"""Folders of pictures as notebooks, Macs, clusters and this package leave them, and pictures of every depth."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distill_cli.data.folders import pictures_below
from distill_cli.data.images import Folder
from distill_cli.data.opened import open_picture
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError

TRAIN = ("train", "--resolution", 8, "--steps", 1, "batch_size=2", "sample_every=0", "network.channels=[8]", "network.attention=[0]")
TRAIN += ("network.groups=4", "network.head=8")


def picture(path, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 12), colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of two pictures, in a folder that is hidden itself."""
    root = tmp_path / ".cache/photos"
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        picture(root / name)
    return root


def below(root):
    return [str(file.relative_to(root)) for file in pictures_below(root).files]


WHOLE = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]


def test_what_is_no_data_is_left_out_and_counted(folder):
    for name in (".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "cat/@eaDir/0.png/SMALL.jpg"):
        picture(folder / name)
    (folder / "cat/._0.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    (folder / "cat/.hidden.png").write_bytes(b"")
    (folder / "cat/notes.txt").write_text("a cat")
    (folder / "cat/0.HEIC").write_bytes(b"no Pillow reads it")
    (folder / "bird").mkdir()
    images = Folder(folder, 8)
    assert below(folder) == WHOLE
    assert images.classes == ["cat", "dog"]
    for said in (
        "2 hidden folders",
        "2 hidden files",
        "1 folder __MACOSX",
        "1 folder @eaDir",
        "1 .txt file",
        "1 .heic file that Pillow cannot",
    ):
        assert said in images.about
    assert "1 folder without pictures (bird)" in images.about
    assert images.about.startswith(f"4 pictures of 2 classes in {folder}; left out: ")


def test_links_are_followed_and_no_circle_is_walked(folder, tmp_path):
    picture(tmp_path / "store/owl/0.png")
    os.symlink("../../store/owl", folder / "owl")
    os.symlink("..", folder / "cat/up")
    os.symlink("cat", folder / "again")
    os.symlink("itself", folder / "itself")
    os.symlink("nowhere.png", folder / "cat/gone.png")
    found = pictures_below(folder)
    assert below(folder) == [*WHOLE, "owl/0.png"]
    assert found.broken == ["itself", "cat/gone.png"] or found.broken == ["cat/gone.png", "itself"]
    assert "2 links to a folder that is read already" in found.without
    assert Folder(folder, 8).classes == ["cat", "dog", "owl"]


def test_the_packages_own_sheets_are_no_pictures(folder):
    for sheet, beside in (("grid.png", "samples.jsonl"), ("side-by-side.png", "edits.json")):
        picture(folder / "cat" / sheet)
        assert f"cat/{sheet}" in below(folder)  # a picture like any other, where nothing says that it is ours
        (folder / "cat" / beside).write_text("")
        assert f"cat/{sheet}" not in below(folder)


def test_every_suffix_that_pillow_reads(folder):
    for suffix, kind in ((".jfif", "jpeg"), (".webp", "webp"), (".AVIF", "avif"), (".JPEG", "jpeg")):
        Image.new("RGB", (12, 12), "white").save(folder / f"dog/new{suffix}", kind)
    images = Folder(folder, 8)
    assert len(images) == 8
    x, _ = images.batch(range(8), Draws(0, range(8)))
    assert (x[[k for k, file in enumerate(images.files) if file.stem == "new"]] > 0.99).all()


def test_a_folder_that_cannot_be_read_is_said(folder, monkeypatch):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DistillError, match="dog: permission denied"):
        pictures_below(folder)


def test_a_plan_says_what_it_read(distill, folder):
    picture(folder / ".trash/cat/9.png")
    (folder / "README").write_text("")
    result = distill(*TRAIN, "--data", folder, "--out", "o", "--dry-run")
    assert result.code == 0, result.err
    assert result.err == f"train: 4 pictures of 2 classes in {folder}; left out: 1 hidden folder, 1 file without a suffix\n"


def test_edit_walks_alike(folder, tmp_path):
    from distill_cli.config import EditConfig
    from distill_cli.edit.job import find

    picture(folder / "cat/._1.png")
    config = EditConfig(task="inpaint", input=folder, mask=folder / "dog/1.png")
    files, about = find(config, tmp_path / "out")
    assert [str(file.relative_to(folder)) for file in files] == WHOLE[:3]
    assert about == f"3 pictures in {folder}; left out: 1 hidden file, 1 mask"


def test_the_first_line_of_a_job_and_a_dark_picture(distill, tmp_path):
    (tmp_path / "scans").mkdir()
    for k in range(4):
        Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(tmp_path / f"scans/{k}.png")
    result = distill(*TRAIN, "--data", "scans", "--out", "o")
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert lines[0] == f"train: 4 pictures in {tmp_path / 'scans'}"
    assert sum("16 bits a channel, and no value over a sixteenth" in line for line in lines) == 1


def tiff(values, bits, kind, photometric=1):
    """An uncompressed grey TIFF; kind: 1 unsigned, 2 signed, 3 floats."""
    data = values.tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 146, 277: 1, 278: height, 279: len(data), 339: kind}
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (head + bytes(4)).ljust(146, b"\0") + data


@pytest.mark.parametrize(
    ("values", "bits", "kind", "seen"),
    [
        (np.full((4, 4), 51, np.uint8), 8, 1, 51),
        (np.full((4, 4), 200, np.uint16), 16, 1, 1),  # as dark as it is, although 200 fits into 8 bits
        (np.full((4, 4), 51 * 257, np.uint16), 16, 1, 51),
        (np.full((4, 4), 0.2, np.float32), 32, 3, 51),
        (np.full((4, 4), 51, np.float32), 32, 3, "floats from 51 to 51"),
        (np.full((4, 4), -0.1, np.float32), 32, 3, "floats from -0.1"),
        (np.full((4, 4), np.nan, np.float32), 32, 3, "floats from nan"),
        (np.full((4, 4), 51, np.int32), 32, 2, "integers of 32 bits"),
        (np.full((4, 4), 51, np.int16), 16, 2, "signed integers of 16 bits"),
    ],
)
def test_the_depth_is_the_formats(values, bits, kind, seen, tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(values, bits, kind))
    if isinstance(seen, str):
        with pytest.raises(DistillError, match=f"x.tif: {seen}.*nothing says which is white"):
            open_picture(tmp_path / "x.tif")
    else:
        assert np.asarray(open_picture(tmp_path / "x.tif").image)[0, 0].tolist() == [seen] * 3
    if kind == 1 and bits == 16:
        (tmp_path / "y.tif").write_bytes(tiff(65535 - values, bits, kind, photometric=0))
        assert np.asarray(open_picture(tmp_path / "y.tif").image)[0, 0].tolist() == [seen] * 3


def test_an_unreadable_picture_is_not_called_broken(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")

    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DistillError, match="a.png: input/output error") as caught:
        open_picture(tmp_path / "a.png")
    assert caught.value.hint == ""


@pytest.mark.parametrize(("value", "dark"), [(4000, True), (40000, False)])
def test_twelve_bits_in_sixteen_are_said(value, dark, tmp_path):
    """Of colours too, of which Pillow gives the upper 8 bits alone."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + np.full((4, 3), value, ">u2").tobytes()) * 4
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "rgb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    picture = open_picture(tmp_path / "rgb.png")
    assert np.asarray(picture.image)[0, 0].tolist() == [value >> 8] * 3
    assert bool(picture.dark) == dark

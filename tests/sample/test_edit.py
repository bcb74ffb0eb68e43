"""Zero-shot edits against the paper's own program, and against what they promise."""

import numpy as np
import pytest
import torch
from PIL import Image

from distill_cli.data.pictures import to_uint8
from distill_cli.diffusion import solvers
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.edit import zero_shot as edit
from distill_cli.models.formats import save
from distill_cli.models.sampler import Sampler


def close(ours, theirs, relative=1e-6):
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.fixture
def student(tiny, tmp_path):
    """A consistency student with random weights, saved in `student`."""
    from dataclasses import replace

    out = tiny.copy(sampler=Sampler.consistency([80.0, 1.38]))
    out.denoiser.parameterisation = "consistency"
    out.lineage = replace_lineage(out.lineage, kind="student", method="cd")
    save(out, tmp_path / "student")
    return replace(out)


def replace_lineage(lineage, **changes):
    return lineage.model_copy(update=changes)


def test_golden_sampling_and_edits(golden):
    """The denoiser in closed form stands in for the student, as in the reference program."""
    g = golden("consistency_sampling")
    h = g.header
    schedule = EDMSchedule(h["sigma_min"], h["sigma_max"], h["rho"])
    times = schedule.point(torch.tensor(h["ts"]), h["steps"] - 1)
    student = g.mixture("denoiser")
    # the reference adds noise after its last estimate too: at sigma_min that is none
    assert times[-1].item() == pytest.approx(h["sigma_min"])

    def run(**options):
        return solvers.few_step(
            student, schedule, g["x_T"], times[:-1], sigma_min=h["sigma_min"], noise=lambda k: g["noises"][k - 1], **options
        )

    close(run(), g["sample"])
    for name, projection in (("colorize", edit.luminance), ("superres", edit.patch_means(h["superres_patch"]))):
        known = projection(g["image"])
        close(known, g[f"{name}.known"])
        close(run(project=edit.replacing(known, projection)), g[f"{name}.sample"])


@pytest.mark.parametrize("projection", [edit.luminance, edit.patch_means(4), edit.inpainting((torch.rand(1, 1, 16, 16) > 0.5).float())])
def test_projections_are_orthogonal(projection):
    x, y = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(projection(projection(x)), projection(x))
    assert (projection(x) * (y - projection(y))).sum().abs() < 1e-9


def test_into_gamut_is_the_nearest_picture_with_the_known_part():
    torch.manual_seed(0)
    picture = torch.rand(4, 3, 16, 16) * 2 - 1
    wild = picture + 2 * (torch.randn_like(picture))
    for projection in (edit.luminance, edit.patch_means(4)):
        known = projection(picture)
        out = edit.into_gamut(wild - projection(wild) + known, known, projection)
        assert out.abs().max() <= 1
        assert (projection(out) - known).abs().max() < 2 / 255
    inside = picture.clamp(-0.9, 0.9)
    assert torch.allclose(edit.into_gamut(inside, edit.luminance(inside), edit.luminance), inside, atol=1e-6)


def test_the_arc_between_two_noises():
    first, last = Draws(0, range(2)).normal("prior", (3, 16, 16))
    frames = edit.between(first, last, 5)
    assert torch.allclose(frames[0], first, atol=1e-5)
    assert torch.allclose(frames[-1], last, atol=1e-5)
    assert (frames.flatten(1).norm(dim=1) / first.norm() - 1).abs().max() < 0.05  # a straight line's middle has 0.7 of it


def pictures(folder, count=3, size=16):
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"p{i}.png")


def load(path):
    return np.asarray(Image.open(path)).astype(float)


def test_inpainting_keeps_what_is_known_exactly(distill, tmp_path, student):
    pictures(tmp_path / "in")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ("edit", "inpaint", "--model", "student", "--input", "in", "--mask", "mask.png", "--times", "index:0,20", "--out", "o")
    result = distill(*arguments, "--json")
    assert result.code == 0, result.err
    assert result.json["network_evaluations"] == 2
    assert result.err.splitlines()[0].endswith("3 pictures in in")
    for i in range(3):
        before, after = load(tmp_path / f"in/p{i}.png"), load(tmp_path / f"o/{i:04d}-p{i}.png")
        assert np.array_equal(before[:, :8], after[:, :8])
        assert np.abs(before[:, 8:] - after[:, 8:]).mean() > 5
    assert Image.open(tmp_path / "o/side-by-side.png").size[0] > 100
    first = load(tmp_path / "o/0001-p1.png")
    (tmp_path / "o/0001-p1.png").unlink()
    again = distill(*arguments, "--json")
    assert (again.code, again.json["made"]) == (0, 3)  # a batch whole
    assert np.array_equal(load(tmp_path / "o/0001-p1.png"), first)
    Image.fromarray(255 - np.asarray(Image.open(tmp_path / "in/p2.png"))).save(tmp_path / "in/p2.png")
    other = distill(*arguments)
    assert other.code == 2
    assert "o: made with other settings: files is" in other.err
    other = distill(*arguments, "--seed", 1)
    assert other.code == 2
    assert "seed is 0, not 1" in other.err


def test_a_killed_edit_goes_on(distill, tmp_path, student, monkeypatch):
    """Only what is missing is made; pictures and the picture of pictures equal those of a run that was not stopped."""
    from distill_cli.edit import job as editing

    pictures(tmp_path / "in", count=5)
    arguments = ("edit", "colorize", "--model", "student", "--input", "in", "--times", "index:0,20", "batch_size=2")
    assert distill(*arguments, "--out", "whole").code == 0
    write, written = editing.write_atomic, []

    def full(path, data):
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        write(path, data)

    monkeypatch.setattr(editing, "write_atomic", full)
    assert distill(*arguments, "--out", "o").code != 0
    monkeypatch.setattr(editing, "write_atomic", write)
    again = distill(*arguments, "--out", "o", "--json")
    assert (again.code, again.json["made"]) == (0, 3)  # the batch of the third, and the last
    for path in (tmp_path / "whole").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "o" / path.name).read_bytes()


def test_pictures_of_pictures_are_not_edited(distill, tmp_path, student):
    assert distill("sample", "--model", "student", "--num", 2, "--grid", "--out", "in/s").code == 0
    pictures(tmp_path / "in/t", count=1)
    (tmp_path / "in/t/p0.png").rename(tmp_path / "in/t/grid.png")  # a picture of that name is no grid
    result = distill("edit", "sdedit", "--model", "student", "--input", "in", "--times", "sigma:0.003", "--out", "o", "--json")
    assert result.json["pictures"] == 3


def test_a_masks_alpha_is_said(distill, tmp_path, student):
    pictures(tmp_path / "in")
    mask = np.zeros((16, 16, 4), dtype=np.uint8)
    mask[:, :8, 3] = 255  # black on the left, nothing on the right
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ("edit", "inpaint", "--model", "student", "--input", "in", "--mask", "mask.png", "--times", "index:0,20", "--out", "o")
    result = distill(*arguments)
    assert "mask.png: its alpha channel is laid on white, which is painted anew" in result.err
    before, after = load(tmp_path / "in/p0.png"), load(tmp_path / "o/0000-p0.png")
    assert np.array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8:] - after[:, 8:]).mean() > 5


def test_colorize_keeps_the_luminance(distill, tmp_path, student):
    pictures(tmp_path / "in")
    assert distill("edit", "colorize", "--model", "student", "--input", "in", "--classes", 3, "--out", "o").code == 0
    weights = np.array(edit.LUMINANCE)
    for i in range(3):
        before, after = load(tmp_path / f"in/p{i}.png"), load(tmp_path / f"o/{i:04d}-p{i}.png")
        assert np.abs((before - after) @ weights).max() / weights.sum() < 2
        assert np.abs(before - after).mean() > 5


@pytest.mark.parametrize("size", [16, 4])
def test_superres_keeps_the_patches(size, distill, tmp_path, student):
    """From a picture of the model's size, which is averaged, or from one that is small already."""
    pictures(tmp_path / "in", size=size)
    assert distill("edit", "superres", "--model", "student", "--input", "in", "--patch", 4, "--out", "o").code == 0
    for i in range(3):
        before, after = load(tmp_path / f"in/p{i}.png"), load(tmp_path / f"o/{i:04d}-p{i}.png")
        small = before if size == 4 else before.reshape(4, 4, 4, 4, 3).mean((1, 3))
        assert np.abs(after.reshape(4, 4, 4, 4, 3).mean((1, 3)) - small).max() < 2


def test_superres_takes_each_picture_by_its_own_size(distill, tmp_path, student):
    pictures(tmp_path / "in", count=2, size=4)
    Image.fromarray(np.random.default_rng(7).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "in/x.png")
    assert distill("edit", "superres", "--model", "student", "--input", "in", "--patch", 4, "--out", "o").code == 0
    for i in range(2):
        after = load(tmp_path / f"o/{i:04d}-p{i}.png").reshape(4, 4, 4, 4, 3).mean((1, 3))
        assert np.abs(after - load(tmp_path / f"in/p{i}.png")).max() < 2


def test_sdedit_starts_from_the_picture(distill, tmp_path, student):
    """At little noise the picture comes back; f(x, sigma_min) = x."""
    pictures(tmp_path / "in")
    changes = []
    for name, times in (("little", "sigma:0.003"), ("much", "sigma:40,1")):
        assert distill("edit", "sdedit", "--model", "student", "--input", "in", "--times", times, "--out", name).code == 0
        changes.append(
            np.mean([np.abs(load(tmp_path / f"in/p{i}.png") - load(tmp_path / f"{name}/{i:04d}-p{i}.png")).mean() for i in range(3)])
        )
    assert changes[0] < 2 < 20 < changes[1]


def test_interpolation_begins_and_ends_at_samples(distill, tmp_path, student):
    assert distill("edit", "interpolate", "--model", "student", "--classes", 4, "--seed", 5, "frames=6", "--out", "o").code == 0
    ends = student.sample(Draws(5, range(2)), torch.tensor([4, 4]))
    for name, expected in (("000", ends[0]), ("005", ends[1])):
        assert np.abs(load(tmp_path / f"o/{name}.png") - to_uint8(expected[None])[0]).max() <= 1


def test_alpha_and_size_are_said(distill, tmp_path, student):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "in/a.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "in/b.png")
    result = distill("edit", "sdedit", "--model", "student", "--input", "in", "--times", "sigma:0.003", "--out", "o")
    assert result.code == 0
    assert "a.png: its alpha channel is laid on white" in result.err
    assert "b.png: 40x20 pixels, scaled and cut to 16x16" in result.err
    assert load(tmp_path / "o/0000-a.png").min() > 245  # transparent red is white


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (["inpaint", "--input", "in", "--mask", "small.png"], "small.png: 8x8 pixels, in/p0.png has 16x16", "the same"),
        (["inpaint", "--input", "in", "--mask", "in/p0.txt"], "p0.txt: no such file", ""),
        (["inpaint", "--input", "in", "--mask", "black.png"], "black.png: all black: nothing is painted anew", ""),
        (["inpaint", "--input", "in"], "inpaint needs mask", ""),
        (["colorize"], "colorize needs input", ""),
        (["colorize", "--input", "nowhere"], "nowhere: no such file or folder", ""),
        (["colorize", "--input", "empty"], "empty: no pictures in it", ".png"),
        (["colorize", "--input", "in", "--out", "in/o"], "--out in/o: lies in --input in", "edited next time"),
        (["interpolate", "--input", "in"], "interpolate takes no input", ""),
        (["superres", "--input", "in", "--patch", "5"], "--patch 5: does not divide the model's 16x16", ""),
        (["colorize", "--input", "in", "--model", "dmd"], "the student knows pure noise alone", "distill cm"),
        (["colorize", "--input", "in", "--model", "tiny"], "--model tiny: no consistency student", "distill cm"),
        (["colorize", "--input", "in", "--times", "index:0,40"], "40 is not between 0 and 38", ""),
        (["colorize", "--input", "in", "--times", "index:20,0"], "noise levels must decrease", "indices grow"),
        (["colorize", "--input", "in", "--times", "sigma:1,5"], "noise levels must decrease", ""),
        (["colorize", "--input", "in", "--times", "sigma:81"], "81 is not above 0.002 and at most 80", ""),
        (["colorize", "--input", "in", "--patch", "2"], "colorize takes no patch", ""),
        (["colorize", "--input", "in", "frames=3"], "colorize takes no frames", ""),
        (["interpolate", "--classes", "3,5"], "interpolate takes one class, not 2", ""),
        (["colorize", "--input", "broken"], "broken/p9.png: not a readable image", "remove or replace"),
        (["colorize", "--input", "nowhere", "--dry-run"], "nowhere: no such file or folder", ""),
        (["colorize", "--input", "in", "--times", "0,22"], "--times 0,22: unknown", "index:0,22"),
        (["colour", "--input", "in"], "input should be 'inpaint', 'colorize'", ""),
    ],
)
def test_bad_input(arguments, says, hint, distill, tmp_path, student):
    pictures(tmp_path / "in")
    pictures(tmp_path / "broken")
    (tmp_path / "broken/p9.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    student.sampler = Sampler.one_step(student.denoiser.schedule)
    save(student, tmp_path / "dmd")
    chosen = [] if "--model" in arguments else ["--model", "student"]
    result = distill("edit", *arguments, *chosen, *([] if "--out" in arguments else ["--out", "o"]))
    assert result.code in (1, 2)
    assert says in next(line for line in result.err.splitlines() if line.startswith("error: "))
    assert hint in result.err
    assert not (tmp_path / "o").exists()


def test_classes_are_needed_where_there_is_no_null_class(tmp_path, student, distill):
    from dataclasses import replace

    student.conditioner = replace(student.conditioner, null_label=None)
    save(student, tmp_path / "student")
    pictures(tmp_path / "in")
    result = distill("edit", "colorize", "--model", "student", "--input", "in", "--out", "o")
    assert result.code == 2
    assert "--classes: this student knows no null class" in result.err

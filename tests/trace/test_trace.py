"""distill trace: its files hold the numbers that `distill sample` makes; a second call makes nothing; bad input is one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from distill_cli.config import NetworkConfig, TraceConfig
from distill_cli.data import open_images
from distill_cli.data.pictures import LINE
from distill_cli.data.points import Moons
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.evaluate.points import sliced_wasserstein, spread
from distill_cli.models import formats, load
from distill_cli.models.lineage import Lineage
from distill_cli.models.plane import new as plane_new
from distill_cli.models.sampler import Sampler
from distill_cli.models.times import PUBLISHED, nearest
from distill_cli.trace import job
from distill_cli.trace.record import places


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of a teacher of moons and of a consistency student; both have random weights, which nobody can tell by their lineage."""
    folder = tmp_path_factory.mktemp("moons")
    teacher = plane_new(Moons(), NetworkConfig(channels=[32, 32]), EDMSchedule(), "edm", Lineage(name="moons", data="moons"), 0)
    lineage = Lineage(name="moons-cd", kind="student", method="cd", teacher="moons", data="moons")
    student = teacher.copy(sampler=Sampler.consistency(nearest(EDMSchedule(), PUBLISHED)), lineage=lineage)
    for name, model in (("t", teacher), ("s", student)):
        formats.save(model, folder / name)
    return str(folder / "t"), str(folder / "s")


def plane(made, **options):
    models = {spec: load(spec) for spec in made}
    return job.opened(TraceConfig(model=list(made), **options), models, dict.fromkeys(made))


def test_rows_end_with_the_pictures_that_sample_makes(distill, tmp_path):
    common = ("--seed", 3, "--steps", 4, "device=cpu")
    assert distill("sample", "--model", "digits", "--num", 2, *common, "--out", "s").code == 0
    ended = distill("trace", "--model", "digits", "--data", "digits", "--num", 2, *common, "--out", "t", "--json")
    assert ended.json["files"] == ["000000.png", "000000.gif", "000001.png", "000001.gif"]
    for name in ("000000", "000001"):
        sheet, sample = (np.asarray(Image.open(tmp_path / folder / f"{name}.png")).astype(int) for folder in "ts")
        width, gap, below = 128, 4, LINE + 4
        for up in (0, width + gap):  # the estimate, and x_t
            bottom, right = len(sheet) - below - up, sheet.shape[1] - gap
            assert abs(sheet[bottom - width : bottom, right - width : right][::8, ::8] - sample).max() <= 1
        left = gap + places(5, 11)[3] * (width + gap)
        estimate = sheet[len(sheet) - below - width :, left : left + width][:width:8, ::8]
        assert abs(estimate - sample).max() <= 1  # the last estimate is the sample
        movie = Image.open(tmp_path / f"t/{name}.gif")
        assert movie.n_frames == (10 + 1) + (4 + 1)  # the data and ten times, four times and the sample
        movie.seek(10)
        assert movie.info["duration"] == job.HELD
        movie.seek(11)
        assert movie.info["duration"] == 160
    twice = distill("trace", "--model", "digits", "--data", "digits", "--num", 2, *common, "--out", "t", "--json")
    assert (twice.json["made"], twice.json["kept"]) == (0, 4)


def test_a_second_call_makes_what_is_missing(distill, made, tmp_path):
    common = ("trace", "--model", made[0], "--num", 20, "--steps", 3, "device=cpu", "--out", "t", "--json")
    assert distill(*common).json["made"] == 5
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "t").iterdir()}
    assert set(before) == {"trace.json", "reverse.png", "animation.gif", "trajectories.png", "score.png", "map.png"}
    (tmp_path / "t/score.png").unlink()
    assert distill(*common).json["made"] == 1
    after = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "t").iterdir()}
    assert {name for name in after if after[name][0] != before[name][0]} == {"score.png"}
    assert after["score.png"][1] == before["score.png"][1]
    ended = distill(*common, "--fps", 3)
    assert ended.code == 2
    assert "--out t: made with other settings: fps is 6, not 3\n" in ended.err
    ended = distill(*common, "--seed", 1, "solver=euler")
    assert "other settings: seed is 0, not 1; solver is None, not euler; models 1 solver is heun, not euler" in ended.err


def test_trajectories_end_at_the_samples(distill, made, tmp_path):
    assert distill("sample", "--model", made[0], "--num", 12, "--out", "s").code == 0
    stored = np.load(tmp_path / "s/samples.npz")["arr_0"]
    work = plane(made, num=12, data="moons")
    (teacher, first), (student, second) = work.walks
    np.testing.assert_allclose(first.end.flatten(1).numpy(), stored, rtol=1e-4, atol=1e-5)
    figure = work.trajectories()
    lines = [line.get_xydata() for line in figure.axes[0].lines]
    np.testing.assert_allclose(np.stack([line[-1] for line in lines]), stored, rtol=1e-4, atol=1e-5)
    noise = Draws(0, range(12)).normal("prior", (2, 1, 1)).flatten(1)
    np.testing.assert_allclose(np.stack([line[0] for line in lines]), noise / 2, rtol=1e-4)  # sigma 80 is data-wide noise
    assert (len(lines[0]), len(figure.axes[1].lines[0].get_xydata())) == (18 + 1, 1 + 1)
    torch.testing.assert_close(first.x[0], second.x[0])  # the student begins with the same noise
    real = open_images("moons").points.flatten(1)
    distance = sliced_wasserstein(first.end.flatten(1), real) / spread(real)
    assert work.reverse().axes[18 // 2 + 1].get_title() == f"samples, distance {distance:.3f}"


def test_a_grid_of_noises_is_mapped_as_samples_are(made):
    work = plane(made, num=2)
    line = work.map().axes[2].lines[3].get_xydata()
    u, v = (torch.linspace(-2.4, 2.4, count)[k] for count, k in ((17, 3), (121, 40)))
    student = work.traced[1].model
    x = student.denoiser(80 * torch.tensor([u, v])[None, :, None, None], torch.tensor([80.0]), student.conditioner(torch.tensor([0])))
    np.testing.assert_allclose(line[40], x.detach().flatten().numpy(), rtol=1e-4, atol=1e-5)


def test_options_of_a_teacher_leave_its_student_alone(distill, made):
    ended = distill(
        "trace", "--model", made[0], "--model", made[1], "--num", 5, "--steps", 4, "--every", 2, "--show", "reverse", "--out", "t"
    )
    assert ended.code == 0
    assert f"{made[1]}: sampled in its own way; --steps is for the teachers" in ended.err
    again = distill("trace", "--model", f"{made[0]}@4", "--model", f"{made[1]}@2", "--num", 5, "--show", "map", "--out", "u", "--dry-run")
    assert f"{made[1]}@2: few-step, 2 network evaluations" in again.out


REFUSED = [
    (("--model", "tiny"), "--model tiny: has not been trained: its weights are random"),
    (("--model", "digits", "--every", 19), "--every 19: the models take 18 steps at most"),
    (("--model", "digits", "--show", "forward"), "--show forward: noise is added to real data, and there are none"),
    (("--model", "digits", "--show", "score"), "--show score: not for images"),
    (("--model", "digits", "--model", "T"), "--model T: makes points, digits makes images"),
    (("--model", "digits", "--model", "shapes"), "--model shapes: noise of (4, 8, 8), that of digits is (3, 16, 16)"),
    (("--model", "digits", "--data", "moons"), "--data moons: points, the model makes images"),
    (("--model", "digits", "--data", "shapes"), "--data shapes: images of (3, 64, 64), the model's are (3, 16, 16)"),
    (("--model", "S", "--show", "score"), "--show score: no model estimates the mean at every time, as the score needs"),
    (
        (
            "--model",
            "digits@0",
        ),
        "--model digits@0: a number of steps must follow @",
    ),
    (("--model", "digits", "--classes", "12"), "--classes: no class 12"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_bad_input_is_one_line(distill, made, tmp_path, arguments, says):
    known = {"T": made[0], "S": made[1]}
    ended = distill("trace", *(known.get(each, each) for each in arguments), "--out", "new")
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert (ended.code, errors) == (2, [f"error: {says.replace('model T', f'model {made[0]}')}"])
    assert not (tmp_path / "new").exists()

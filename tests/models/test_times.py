"""Times of students: as people write them, as diffusers counts them, and their search."""

import shutil

import numpy as np
import pytest
import torch

from distill_cli.data.pictures import to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.errors import UsageError
from distill_cli.evaluate.search import UNUSED, lowest
from distill_cli.models.formats import save
from distill_cli.models.sampler import Sampler
from distill_cli.models.times import PUBLISHED, nearest, parse
from tests.conditions import of


@pytest.fixture
def student(tiny):
    out = tiny.copy(sampler=Sampler.consistency([80.0, 1.38]))
    out.denoiser.parameterisation = "consistency"
    out.lineage = out.lineage.model_copy(update={"kind": "student", "method": "cd"})
    return out


def test_the_three_ways():
    schedule = EDMSchedule()
    assert parse("index:0,22", schedule, 1) == pytest.approx([80.0, 1.38237], rel=1e-5)
    assert parse("sigma:80,1.5,0.01", schedule, 1) == [80, 1.5, 0.01]
    assert parse("even", schedule, 1) == pytest.approx([80.0])
    assert parse("even", schedule, 4) == pytest.approx(parse("index:0,10,20,30", schedule, 1))
    assert parse("even", schedule, 21)[-1] == pytest.approx(parse("index:38", schedule, 1)[0])  # diffusers would stop at 20


def test_times_are_counted_on_the_students_own_grid():
    coarse = EDMSchedule(grid=10)
    assert parse("index:0,4", coarse, 1) == pytest.approx([80.0, coarse.times(10)[4].item()])
    assert parse("even", coarse, 3) == pytest.approx(parse("index:0,3,6", coarse, 1))
    with pytest.raises(UsageError, match="9 is not between 0 and 8"):
        parse("index:0,9", coarse, 1)
    with pytest.raises(UsageError, match="11 steps on 10 times"):
        parse("even", coarse, 11)
    assert nearest(EDMSchedule(), PUBLISHED) == parse("index:0,22", EDMSchedule(), 1)
    assert nearest(EDMSchedule(grid=18), PUBLISHED) == parse("index:0,10", EDMSchedule(grid=18), 1)
    assert nearest(coarse, range(0, 40, 4)) == parse("index:0,1,2,3,4,5,6,7,8", coarse, 1)
    assert nearest(EDMSchedule(grid=2), PUBLISHED) == [pytest.approx(80.0)]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("index:0,39", "39 is not between 0 and 38"),
        ("index:0,1.5", "an index is a whole number"),
        ("index:-1", "-1 is not between"),
        ("index:5,5", "must decrease"),
        ("sigma:80,0.002", "0.002 is not above 0.002"),
        ("sigma:nan", "nan is not above"),
        ("sigma:1,2", "must decrease"),
        ("sigma:a", "not numbers"),
        ("0,22", "unknown"),
    ],
)
def test_wrong_times(spec, says):
    with pytest.raises(UsageError, match=says):
        parse(spec, EDMSchedule(), 1)


@pytest.mark.parametrize("times", ["index:5", "index:5,22", "sigma:80,1.4"])
def test_other_times_are_not_those_of_plain_diffusers(times, student, tmp_path):
    save(student.with_times(times), tmp_path / "m")
    assert "| not as distill samples it: the pipeline begins at sigma 80" in (tmp_path / "m/README.md").read_text()


def times_of(model, steps):
    return model.sampler.times_for(model.denoiser.schedule, "few-step", steps)


def test_students_sample_at_any_number_of_steps(student):
    assert times_of(student, 2).tolist() == [80.0, 1.38]
    assert times_of(student, 5).tolist() == pytest.approx(parse("even", EDMSchedule(), 5))
    other = student.with_times("sigma:70,3")
    assert (other.sampler.times, other.sampling.steps) == ((70.0, 3.0), 2)
    with pytest.raises(UsageError, match="2 times for --steps 3"):
        student.with_times("sigma:70,3", 3)


def test_models_that_take_no_times(tiny, student):
    with pytest.raises(UsageError, match="for consistency students"):
        tiny.with_times("even")
    student.sampler = Sampler.one_step(EDMSchedule())
    with pytest.raises(UsageError, match="for consistency students"):
        student.with_times("even")


def test_several_steps_start_at_their_first_time(student):
    """From noise of that level, not of sigma_max."""
    other, draws = student.with_times("sigma:2"), Draws(0, range(2))
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        expected = other.denoiser(2 * draws.normal("prior", other.shape), torch.full((2,), 2.0), of(labels))
    assert torch.equal(other.sample(draws, labels), expected.clamp(-1, 1))


@pytest.mark.parametrize(("steps", "grid"), [(1, 40), (2, 40), (3, 40), (2, 10), (3, 10)])
@pytest.mark.parametrize("strength", [1, 8])
def test_students_open_in_plain_diffusers(steps, grid, strength, student, tmp_path):
    """One step, two and three at times of the student's grid give the pictures that they give here, from the same noise.

    Also where the estimates leave [-1, 1]: both clamp them before noise is added again.
    """
    student.net.conv_out.weight.data.mul_(strength)
    from diffusers import ConsistencyModelPipeline

    indices = [0, grid // 3, 2 * grid // 3][:steps]
    student.denoiser.schedule = EDMSchedule(grid=grid)
    student = student.with_times("index:" + ",".join(map(str, indices)))
    save(student, tmp_path / "m")
    card = (tmp_path / "m/README.md").read_text()
    assert "| as distill samples it |" in card
    assert ("num_inference_steps=1)" if steps == 1 else f"num_inference_steps=None, timesteps={indices[::-1]})") in card
    pipeline = ConsistencyModelPipeline.from_pretrained(tmp_path / "m")
    pipeline.set_progress_bar_config(disable=True)
    draws, labels = Draws(3, range(2)), torch.tensor([4, 7])
    ours = student.sample(draws, labels)
    fresh = iter([draws.normal("solver", student.shape, turn=k) for k in range(1, steps)])
    import diffusers.schedulers.scheduling_consistency_models as module

    with torch.no_grad():
        first = student.denoiser(80 * draws.normal("prior", student.shape), torch.full((2,), 80.0), of(labels))
    assert (first.abs().max() > 1.5) == (strength > 1)
    original = module.randn_tensor
    module.randn_tensor = lambda shape, **_: next(fresh, torch.zeros(shape))
    try:
        theirs = pipeline(
            2,
            class_labels=labels,
            latents=draws.normal("prior", student.shape),
            timesteps=indices[::-1],
            num_inference_steps=None,
            output_type="pt",
        ).images
    finally:
        module.randn_tensor = original
    assert ours.std() > 0.05
    assert ((ours + 1) / 2 - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("best", [1, 2, 7, 22, 37, 38])
def test_ternary_search_finds_the_lowest(best):
    tried = []

    def score(k):
        tried.append(k)
        return abs(k - best)

    assert lowest(score, 1, 38) == best
    assert len(set(tried)) < 20


def test_the_search_writes_the_times_it_found(distill, student, tmp_path, monkeypatch):
    from distill_cli.models import load

    save(student, tmp_path / "student")
    before = load(str(tmp_path / "student")).weights_hash()
    result = distill("sample", "--model", "student", "--search-times", 3, "--num", 12, "--json")
    assert result.code == 0, result.err
    tried = result.json["tried"]
    assert result.json["indices"] == min((row for row in tried if len(row["indices"]) == 3), key=lambda row: row["frechet"])["indices"]
    best2 = min((row for row in tried if len(row["indices"]) == 2), key=lambda row: row["frechet"])["indices"]
    best3 = min((row for row in tried if len(row["indices"]) == 3), key=lambda row: row["frechet"])["indices"]
    assert best3[:2] == best2
    again = load(str(tmp_path / "student"))
    assert again.sampler.times == pytest.approx(parse("index:" + ",".join(map(str, best3)), EDMSchedule(), 3))
    assert again.sampling.steps == 3
    assert again.weights_hash() == before
    # what was measured is what sampling at those times gives, of noises that no job reaches
    images = again.sample(Draws(0, range(UNUSED, UNUSED + 12)), again.conditioner.labels(12))
    np.savez(tmp_path / "s.npz", arr_0=to_uint8(images))
    row = distill("evaluate", "--model", "s.npz", "--out", "e", "--json").json["rows"][0]
    assert row["frechet"] == pytest.approx(min(r["frechet"] for r in tried if r["indices"] == best3), rel=1e-6)


def test_a_run_writes_its_times_as_noise_levels(distill, tmp_path):
    """So that a resume means the same; indices in the recipe of a run are of when all students counted on 40 points."""
    from distill_cli.models import load

    arguments = ("cm", "--teacher", "tiny", "--data", "digits", "--steps", 1, "batch_size=2", "sample_every=0", "scales=10")
    assert distill(*arguments, "times=index:0,4", "--out", "r").code == 0
    own, recipe = load(str(tmp_path / "r")).sampler.times, tmp_path / "r/recipe.yaml"
    assert list(own) == parse("index:0,4", EDMSchedule(grid=10), 2)
    written = f"times: sigma:{own[0]!r},{own[1]!r}\n"
    assert written in recipe.read_text()
    for times, expected in ((written, own), ("times: index:0,22\n", parse("index:0,22", EDMSchedule(), 2))):
        recipe.write_text(recipe.read_text().replace(written, times))
        shutil.rmtree(tmp_path / "r/student")
        result = distill("cm", "--resume", "r")
        assert result.code == 0, result.err
        assert load(str(tmp_path / "r")).sampler.times == tuple(expected)


def test_resuming_a_finished_run_keeps_the_times_found(distill, tmp_path):
    from distill_cli.models import load

    assert distill("cm", "--teacher", "tiny", "--data", "digits", "--steps", 1, "batch_size=2", "sample_every=0", "--out", "r").code == 0
    assert distill("sample", "--model", "r", "--search-times", 2, "--num", 4).code == 0
    times = load(str(tmp_path / "r")).sampler.times
    assert distill("cm", "--resume", "r").code == 0
    assert load(str(tmp_path / "r")).sampler.times == times


def test_what_a_search_refuses(distill, tmp_path, student):
    student.denoiser.schedule = EDMSchedule(grid=4)
    save(student, tmp_path / "student")
    result = distill("sample", "--model", "student", "--search-times", 4, "--num", 4)
    assert result.code == 2
    assert "--search-times 4: this student has 4 times" in result.err
    assert distill("sample", "--model", "student", "--search-times", 3, "--num", 4).code == 0  # 0,1,2
    result = distill("sample", "--model", "student", "--search-times", 2, "--out", "x", "--format", "npz")
    assert result.code == 2
    assert "--search-times makes no samples, so --format and --out have no use here" in result.err
    result = distill("sample", "--model", "student", "--classifier", "x")
    assert result.code == 2
    assert "classifier is used by search_times alone" in result.err


def test_a_late_first_time_is_said(distill, tmp_path, student):
    save(student, tmp_path / "student")
    result = distill("sample", "--model", "student", "--times", "sigma:2", "--num", 2)
    assert result.code == 0
    assert "--times sigma:2: begins with pure noise of sigma 2" in result.err


def test_a_search_needs_a_students_folder(distill, tmp_path, tiny):
    result = distill("sample", "--model", "digits", "--search-times", 2)
    assert result.code == 2
    assert "--search-times writes into a student's folder" in result.err
    save(tiny, tmp_path / "teacher")
    result = distill("sample", "--model", "teacher", "--search-times", 2)
    assert result.code == 2
    assert "--search-times 2: for consistency students (distill cm) alone" in result.err

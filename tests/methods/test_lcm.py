"""Latent consistency distillation: golden numbers, the student in plain diffusers, told guidance scales, and what is refused."""

import json

import pytest
import torch

from distill_cli.data import open_images
from distill_cli.diffusion import consistency as maths
from distill_cli.diffusion.condition import GUIDANCE_SCALE, NOTHING, Condition
from distill_cli.diffusion.denoiser import MixtureDenoiser, boundary
from distill_cli.diffusion.guidance import guided
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import FlowSchedule, TableSchedule, expand, zero_terminal_snr
from distill_cli.diffusion.solvers import ddim_step
from distill_cli.errors import DistillError, UsageError
from distill_cli.methods.lcm.objective import LCM
from distill_cli.models import load
from distill_cli.models.backbones import embedded
from distill_cli.models.formats import save
from distill_cli.models.sampler import Sampler
from distill_cli.runs import Run
from tests.conditions import of
from tests.looking import few_shapes, no_memory
from tests.models.test_stable_diffusion import PROMPTS, edit_json, made
from tests.options import consistency, options


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_shapes():
        yield


def close(ours, theirs, relative=1e-4):
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


def test_golden(golden):
    """The public scripts hold times in float32, hence 1e-4. Their w is the guidance scale - 1."""
    g = golden("lcm")
    schedule, steps = TableSchedule(g["alphas_cumprod"]), int(g.header["ddim_timesteps"])
    t, r = maths.neighbours(schedule, steps - 1 - g["index"], steps)
    assert torch.equal(t, g["start_timestep"].double())
    assert torch.equal(r, g["timestep"].double())
    for time, name in ((t, "_start"), (r, "")):
        skip, out = boundary(time, float(g.header["timestep_scaling"]), float(g.header["sigma_data"]))
        close(skip, g[f"c_skip{name}"])
        close(out, g[f"c_out{name}"])
    close(embedded(g["w"] + 1, int(g.header["w_embedding_dim"])), g["w_embedding"])
    cond, uncond = (g.mixture(f"teacher_{name}", schedule) for name in ("cond", "uncond"))

    def teacher(x, t, condition):
        return torch.where(expand(condition.parts["class_labels"], x) > 0, cond(x, t), uncond(x, t))

    z, labels = g["z"], torch.ones(len(g["w"]))
    real = guided(teacher, None, of(torch.zeros(1)))
    x0 = real(z, t, of(labels).plus(GUIDANCE_SCALE, g["w"] + 1))
    close(ddim_step(schedule, z, x0, t, r), g["x_prev"])


def gaussian(schedule, x, t, r, mean=0.7, std=0.5):
    """Where the ODE of data N(mean, std^2) takes x from times t to r."""
    (a, s), (a_next, s_next) = ((expand(schedule.alpha(k), x), expand(schedule.sigma(k), x)) for k in (t, r))
    return a_next * mean + ((a_next * std) ** 2 + s_next**2).sqrt() / ((a * std) ** 2 + s**2).sqrt() * (x - a * mean)


SCHEDULES = {
    "table": TableSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "zero-snr": TableSchedule(zero_terminal_snr(TableSchedule.from_config({}).alphas_cumprod)),
    "flow": FlowSchedule(),
}


@pytest.mark.parametrize(
    ("name", "solver", "order"), [("table", "euler", 2), ("table", "heun", 3), ("zero-snr", "euler", 2), ("flow", "euler", 2)]
)
def test_the_teachers_steps_converge_on_any_schedule(name, solver, order):
    """Halving the steps divides the whole error by 2^(order - 1); from the largest time too, where alpha may be 0."""
    schedule = SCHEDULES[name]
    teacher = MixtureDenoiser(torch.full((1, 1, 1, 1), 0.7), torch.ones(1), 0.5, schedule)
    x = torch.randn(4, 1, 1, 1, dtype=torch.float64)
    t, r = (schedule.at(torch.full((4,), share, dtype=torch.float64)) for share in (1.0, 0.3))
    exact = gaussian(schedule, x, t, r)
    errors = [(maths.ode_steps(teacher, schedule, x, t, r, NOTHING, solver, n) - exact).abs().max() for n in (64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2 ** (order - 1), rel=0.15)
    assert errors[1] < 0.02


def test_a_consistency_function_of_a_gaussian_is_learned_by_no_pair():
    """The exact consistency function has loss 0 in the limit of fine grids, on every schedule: its two estimates agree."""
    for name in ("table", "flow"):
        schedule = SCHEDULES[name]
        x, noise = 0.7 + 0.5 * torch.randn(6, 1, 1, 1, dtype=torch.float64), torch.randn(6, 1, 1, 1, dtype=torch.float64)
        t, r = maths.neighbours(schedule, torch.tensor([0, 100, 200, 300, 400, 490]), 500)
        noisy = expand(schedule.alpha(t), x) * x + expand(schedule.sigma(t), x) * noise
        teacher = MixtureDenoiser(torch.full((1, 1, 1, 1), 0.7), torch.ones(1), 0.5, schedule)
        nearer = maths.ode_step(teacher, schedule, noisy, t, r, NOTHING, "euler")
        zero = schedule.time(torch.full_like(t, 1e-12))
        estimates = [gaussian(schedule, x, time, zero) for x, time in ((noisy, t), (nearer, r))]
        assert (estimates[0] - estimates[1]).abs().max() < 2e-3, name


def opened(model, tmp_path, method="lcm", **changes):
    """An objective on the captioned shapes, prepared."""
    config = options("cm", method=method, data="shapes", device="cpu", batch_size=2, out=tmp_path, **changes)
    images = open_images("shapes") if model.text else open_images("digits")
    if method != "lcm":
        return consistency(config, model, images)
    out = LCM(config, model, images)
    out.prepare(torch.device("cpu"), Run(tmp_path))
    return out


def test_a_told_student_begins_as_its_teacher_whatever_it_is_told(tmp_path):
    teacher = load("tiny-sd").with_prompts(PROMPTS)
    told = teacher.backbone.told()
    x, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 19.0]), teacher.conditioner(torch.tensor([0, 1]))
    with torch.no_grad():
        for scale in (1.0, 7.5):
            assert torch.equal(told(x, t, condition.plus(GUIDANCE_SCALE, torch.full((2,), scale))), teacher.backbone(x, t, condition))
        told.net.time_embedding.cond_proj.weight.normal_()
        one, other = (told(x, t, condition.plus(GUIDANCE_SCALE, torch.full((2,), scale))) for scale in (1.0, 7.5))
        assert (one - other).abs().max() > 1e-3


def test_each_image_is_guided_by_the_scale_that_the_student_is_told(tmp_path):
    lcm = opened(load("tiny-sd"), tmp_path, guidance_range=(2, 9))
    x, condition = lcm.examples.batch(Draws(0, range(4)), torch.device("cpu"))
    told = lcm.told(condition, Draws(0, range(4)))
    scales = told.parts[GUIDANCE_SCALE]
    assert torch.allclose(scales, (2 + 7 * Draws(0, range(4)).uniform("guidance")).float())
    t, r = (time.float() for time in lcm.times(Draws(0, range(4)), 0))
    null = lcm.start.conditioner.null
    with torch.no_grad():
        ours = lcm.nearer(x, x, x, t, r, told)
        for k, scale in enumerate(scales.tolist()):
            one = guided(lcm.teacher.denoiser, scale, null)(x[k : k + 1], t[k : k + 1], condition[k : k + 1])
            assert torch.allclose(ours[k : k + 1], ddim_step(lcm.schedule, x[k : k + 1], one, t[k : k + 1], r[k : k + 1]), atol=1e-5)


def test_the_target_of_the_last_interval_is_the_teachers_point_itself(tmp_path):
    lcm = opened(load("tiny-sd"), tmp_path)
    x, condition = lcm.examples.batch(Draws(0, range(2)), torch.device("cpu"))
    noise, t, r = torch.randn_like(x), torch.full((2,), 19.0), torch.zeros(2)
    noisy = expand(lcm.schedule.alpha(t), x) * x + expand(lcm.schedule.sigma(t), x) * noise
    with torch.no_grad():
        before = lcm.errors(x, noise, t, r, condition)
        target = lcm.nearer(x, noise, noisy, t, r, condition)
        difference = (lcm.network("student")(noisy, t, condition) - target).flatten(1)
    assert torch.allclose(before, (difference.square().sum(1) + lcm.huber_c**2).sqrt() - lcm.huber_c, rtol=1e-5)


def taught(tmp_path, **changes):
    """A student's folder, its told weights filled."""
    lcm = opened(made("v"), tmp_path, guidance_range=(1, 8), **changes)
    lcm.student.network.net.time_embedding.cond_proj.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    model = lcm.model(lcm.student.eval().requires_grad_(False), 1)
    save(model, tmp_path / "student")
    return load(str(tmp_path / "student")).with_prompts(PROMPTS)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    from unittest.mock import patch

    with patch("distill_cli.training.source.check_images"):  # pictures of another size than the model's: nothing is trained
        return taught(tmp_path_factory.mktemp("lcm"))


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (1, 8.0), (4, 2.5), (8, 6.0)])
def test_the_same_pictures_as_LatentConsistencyModelPipeline(steps, scale, student, tmp_path, monkeypatch):
    import diffusers
    from diffusers.schedulers import scheduling_lcm

    model = student
    save(model, tmp_path / "model")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(pipeline).__name__ == "LatentConsistencyModelPipeline"
    pipeline.set_progress_bar_config(disable=True)
    draws = Draws(3, range(2))
    ours = model.generate(draws, torch.tensor([0, 1]), model.with_defaults(None, steps, scale))
    rest = iter([draws.normal("solver", model.shape, turn=k) for k in range(1, steps)])
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(rest))
    latents = draws.normal("prior", model.shape)
    theirs = pipeline(PROMPTS, latents=latents, num_inference_steps=steps, guidance_scale=scale, output_type="latent").images
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert next(rest, None) is None


def test_told_guidance_changes_the_picture_at_the_cost_of_one_evaluation(student):
    model = student
    one, other = (model.with_defaults(None, 2, scale) for scale in (1.0, 8.0))
    assert one.evaluations == other.evaluations == 2
    draws, labels = Draws(3, range(2)), torch.tensor([0, 1])
    assert (model.generate(draws, labels, one) - model.generate(draws, labels, other)).abs().max() > 0.05
    assert model.sampler.told == (1, 8)
    for wrong in (0.5, 9.0):
        with pytest.raises(UsageError, match="has learned scales from 1 to 8"):
            model.with_defaults(None, None, wrong)
    with pytest.raises(UsageError, match="--steps 51: the student was made for at most 50"):
        model.with_defaults(None, 51, None)
    with pytest.raises(UsageError, match="negative prompt is built in"):
        model.with_prompts(PROMPTS, "blurred")
    with pytest.raises(UsageError, match="guidance_calls 2: a student is called once"):
        model.with_defaults(None, None, 4.0, 2)
    assert model.sampler.dial == "3 (1 to 8 learned)"


def test_a_foreign_folder_is_read_with_its_pipelines_defaults(student, tmp_path):
    model = student
    save(model, tmp_path / "foreign")
    (tmp_path / "foreign/distill.json").unlink()
    again = load(str(tmp_path / "foreign"))
    assert (again.sampler.steps, again.sampler.guidance_scale, again.sampler.told) == (4, 8.5, None)
    assert any("does not say which guidance scales" in note for note in again.notes)
    again = again.with_prompts(PROMPTS)
    draws, labels = Draws(3, range(2)), torch.tensor([0, 1])
    pictures = [each.generate(draws, labels, each.with_defaults(None, 4, 3.0)) for each in (model, again)]
    assert torch.equal(*pictures)
    edit_json(tmp_path / "foreign/scheduler/scheduler_config.json", _class_name="DDIMScheduler")
    edit_json(tmp_path / "foreign/model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(DistillError, match="time_cond_proj_dim is 256: the network wants a guidance scale"):
        load(str(tmp_path / "foreign"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(guidance_range=(4, 2)), "guidance_range 4,2 does not rise"),
        (dict(guidance_range=(0.5, 2)), "does not rise from 1"),
        (dict(guidance_range=(2, 4), guidance_scale=5), "guidance_scale 5.0 is outside guidance_range 2,4"),
        (dict(original_steps=3), "student_steps 4: the grid has 3 times"),
        (dict(scales=18), "[Ss]cales"),
    ],
)
def test_options_that_do_not_go_together(changes, says):
    with pytest.raises(ValueError, match=says):
        options("cm", method="lcm", **changes)


def test_teachers_that_a_method_cannot_take(tmp_path, tiny):
    with pytest.raises(UsageError, match="a UNet2DModel cannot be told a guidance scale"):
        opened(tiny, tmp_path, guidance_range=(1, 4))
    teacher = load("tiny-sd")
    for steps in (1200, 600, 30):
        with pytest.raises(UsageError, match=f"original_steps {steps}: does not divide the 1000 times"):
            opened(teacher, tmp_path, original_steps=steps)
    with pytest.raises(UsageError, match="a grid of 1200 steps: .* has 1000 times"):
        opened(teacher, tmp_path, "cd", teacher="tiny-sd", scales=1201)
    with pytest.raises(UsageError, match="metric lpips: compares pixels"):
        opened(teacher, tmp_path, metric="lpips")
    with pytest.raises(UsageError, match="times index:0,22: for EDM teachers"):
        opened(teacher, tmp_path, times="index:0,22")
    teacher.denoiser.schedule, teacher.sampler = SCHEDULES["zero-snr"], Sampler(solver="ddim", steps=50, guidance_scale=7.5)
    with pytest.raises(UsageError, match="solver heun: the schedule of tiny-sd ends without signal"):
        opened(teacher, tmp_path, "cd", teacher="tiny-sd", solver="heun")
    assert opened(teacher, tmp_path, "cd", teacher="tiny-sd").config.solver == "euler"
    with pytest.raises(UsageError, match="weighting inverse-step: the schedule of tiny-sd ends without signal"):
        opened(teacher, tmp_path, "ict", teacher="tiny-sd")


def test_easy_tuning_on_a_table_has_finite_losses_at_its_ends(tmp_path):
    """Levels below the table's smallest and above its largest fall on its ends, where both estimates are the picture itself."""
    ect = opened(load("tiny-sd"), tmp_path, "ect", teacher="tiny-sd")
    x, condition = ect.examples.batch(Draws(0, range(2)), torch.device("cpu"))
    levels = torch.tensor([1e-4, 1e4]).double()
    t, r = ect.schedule.time(levels), ect.schedule.time(levels / 2)
    with torch.no_grad():
        errors = ect.errors(x, torch.randn_like(x), t, r, condition)
    assert errors.isfinite().all()
    assert errors[0] == 0


def test_a_saved_student_keeps_its_boundary_and_grid(student, tmp_path):
    model = student
    save(model, tmp_path / "again")
    stored = json.loads((tmp_path / "again/scheduler/scheduler_config.json").read_text())
    assert (stored["_class_name"], stored["original_inference_steps"], stored["timestep_scaling"]) == ("LCMScheduler", 50, 10.0)
    assert load(str(tmp_path / "again")).denoiser.boundary == 10.0
    x, condition = torch.randn(2, 4, 16, 16), Condition({**model.conditioner(torch.tensor([0, 1])).parts, GUIDANCE_SCALE: torch.ones(2)})
    with torch.no_grad():
        assert torch.equal(model.denoiser(x, torch.zeros(2), condition), x)  # without noise it is the picture itself


@pytest.mark.parametrize(
    ("command", "calls"),
    [
        (["cm", "--method", "lcm", "--data"], "trains student on 8 images; evaluates teacher on 16 images, target on 8 images"),
        (["pd", "first_steps=8", "last_steps=4", "--data"], "trains student on 8 images; evaluates teacher on 32 images"),
        (["dmd", "--pairs"], "trains student on 16 images, fake on 8 images; evaluates teacher on 16 images, fake on 8 images"),
    ],
)
def test_the_plan_at_full_architecture_needs_no_weights_and_no_pairs(command, calls, capsys, tmp_path):
    from distill_cli.cli.app import run

    there = [*command, str(tmp_path / "pairs"), "--teacher", "sd3-medium", "--batch-size", "8", "--steps", "10", "--dry-run"]
    with no_memory():  # which tests/training/test_memory.py counts
        assert run(there) == 0
    said = capsys.readouterr().out
    assert "teacher 2,028,328,000, student 2,028,328,000" in said
    assert f"each step: {calls}\n" in said

"""A diffusers folder with LCMScheduler that others have made: several steps, as plain diffusers takes them."""

import json

import pytest
import torch

from distill_cli.diffusion.denoiser import boundary
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import TableSchedule
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import lcm, load
from distill_cli.models.formats import save
from distill_cli.models.formats.stable_diffusion import in_diffusers
from distill_cli.models.sampler import Sampler, Sampling
from tests.models.test_stable_diffusion import PROMPTS, edit_json, made


def foreign(path, prediction="eps", **scheduler):
    """A folder as others save one: LCMScheduler, and no distill.json."""
    model = made(prediction)
    model.sampler = Sampler.one_step(model.denoiser.schedule)
    save(model, path)
    (path / "distill.json").unlink()
    edit_json(path / "scheduler/scheduler_config.json", **scheduler)
    return path


def theirs(folder, steps, latents, noises, monkeypatch):
    """The latents that plain diffusers makes of these, with these noises between its steps."""
    import diffusers
    from diffusers.schedulers import scheduling_lcm

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    rest = iter(noises)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(rest))
    out = pipeline(PROMPTS, latents=latents, num_inference_steps=steps, guidance_scale=1, output_type="latent").images
    assert next(rest, None) is None
    return out


@pytest.mark.parametrize(
    ("prediction", "steps", "scheduler"),
    [
        ("eps", 1, {}),
        ("eps", 4, {}),
        ("v", 3, {}),
        ("eps", 7, {"original_inference_steps": 30}),  # which begins at 989
        ("eps", 1, {"original_inference_steps": 30}),
        ("v", 25, {"original_inference_steps": 1000, "timestep_scaling": 0.01}),  # whose boundary weighs
    ],
)
def test_steps_are_those_of_plain_diffusers(prediction, steps, scheduler, tmp_path, monkeypatch):
    folder = foreign(tmp_path / "lcm", prediction, **scheduler)
    model = load(str(folder)).with_prompts(PROMPTS)
    assert model.sampling == Sampling(solver="few-step", steps=1)
    draws = Draws(3, range(2))
    ours = model.generate(draws, torch.tensor([0, 1]), model.with_defaults(None, steps, None))
    noises = [draws.normal("solver", model.shape, turn=k) for k in range(1, steps)]
    expected = theirs(folder, steps, draws.normal("prior", model.shape), noises, monkeypatch)
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()


def test_times_are_those_of_the_scheduler():
    import diffusers

    for original, count in ((50, 1000), (30, 1000), (7, 1000), (1000, 1000), (4, 10)):
        scheduler = diffusers.LCMScheduler(num_train_timesteps=count, original_inference_steps=original)
        for steps in {1, 2, 3, original // 2, original - 1, original}:
            scheduler.set_timesteps(steps)
            assert lcm.sampler_of(scheduler.config).times_for(None, "few-step", steps).tolist() == scheduler.timesteps.tolist()


def test_the_form_at_the_boundary_is_the_schedulers():
    import diffusers

    scheduler = diffusers.LCMScheduler(timestep_scaling=2.5)
    t = torch.tensor([0, 1, 19, 500, 999])
    skips, outs = boundary(t.double(), 2.5)
    for skip_t, out_t, time in zip(skips.tolist(), outs.tolist(), t.tolist(), strict=True):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(time)
        assert (skip_t, out_t) == pytest.approx((skip, out), rel=1e-12)
    assert (skips[0], outs[0]) == (1, 0)  # at no noise the picture itself


def test_what_the_scheduler_cannot_do_is_said(tmp_path):
    model = load(str(foreign(tmp_path / "lcm", original_inference_steps=8)))
    with pytest.raises(UsageError, match="--steps 9: the student was made for at most 8"):
        model.with_defaults(None, 9, None)
    for wrong in (0, 1001, "50", None, True, 2.5):
        with pytest.raises(DistillError, match="original_inference_steps"):
            lcm.sampler_of({"original_inference_steps": wrong})
    with pytest.raises(DistillError, match="timestep_scaling"):
        lcm.scaling_of({"timestep_scaling": "10"})


def test_a_student_of_ours_stays_as_it_is(tmp_path):
    """Its one step is at t = 999 with the plain estimate, whatever the file of its scheduler says."""
    model = made()
    model.sampler = Sampler.one_step(model.denoiser.schedule)
    model.lineage = model.lineage.model_copy(update={"kind": "student", "method": "dmd"})
    save(model, tmp_path / "ours")
    again = load(str(tmp_path / "ours")).with_prompts(PROMPTS)
    assert json.loads((tmp_path / "ours/scheduler/scheduler_config.json").read_text())["_class_name"] == "LCMScheduler"
    assert again.denoiser.boundary is None
    draws = Draws(3, range(2))
    x = draws.normal("prior", again.shape)
    estimate = again.denoiser(x, torch.full((2,), 999.0), again.conditioner(torch.tensor([0, 1])))
    assert torch.equal(again.generate(draws, torch.tensor([0, 1])), estimate)
    with pytest.raises(UsageError, match="was made for at most 1"):
        again.with_defaults(None, 2, None)


def test_another_ones_is_read_by_its_scheduler_also_with_our_file(tmp_path):
    """Which versions with format 1 wrote beside it, with one time."""
    model = load(str(foreign(tmp_path / "lcm")))
    save(model, tmp_path / "again")
    stored = json.loads((tmp_path / "again/distill.json").read_text())
    old = {key: value for key, value in stored.items() if key != "sampler"} | {"format": 1, "few_step_times": [999.0]}
    (tmp_path / "again/distill.json").write_text(json.dumps(old | {"sampling": {"solver": "few-step", "steps": 1}}))
    assert load(str(tmp_path / "again")).sampler == model.sampler


@pytest.mark.parametrize(
    ("solver", "change", "says"),
    [
        ("pndm", {}, ""),
        ("ddim", {}, "the folder's scheduler is PNDMScheduler, and here it is sampled by ddim"),
        ("dpm++", {"_class_name": "DPMSolverMultistepScheduler"}, ""),
        (
            "dpm++",
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            "has use_karras_sigmas True, and here it is False",
        ),
        ("ddim", {"_class_name": "DDIMScheduler", "thresholding": True}, "has thresholding True, and here it is False"),
    ],
)
def test_how_diffusers_samples_a_teacher(solver, change, says):
    model = load("tiny-sd")
    model.scheduler = {**model.scheduler, **change}
    model.sampler = Sampler(solver=solver, steps=10)
    assert says in in_diffusers(model).differs
    assert bool(says) == bool(in_diffusers(model).differs)


@pytest.mark.parametrize("bins", [1000, 1030, 20])
def test_one_step_begins_where_the_scheduler_does(bins):
    model = load("tiny-sd")
    model.scheduler = {**model.scheduler, "num_train_timesteps": bins}
    model.denoiser.schedule = TableSchedule.from_config(model.scheduler)
    model.sampler = Sampler.one_step(model.denoiser.schedule)
    assert in_diffusers(model).differs == ("" if bins > 20 else "the folder's scheduler is LCMScheduler, which takes other times")


@pytest.mark.parametrize(("time", "says"), [(399.0, ""), (5.0, "keeps a share of the noise")])
def test_one_step_at_an_earlier_time(time, says):
    """LCMScheduler's boundary is next to nothing but near t = 0."""
    model = load("tiny-sd")
    model.sampler = Sampler.one_step(model.denoiser.schedule, time)
    there = in_diffusers(model)
    assert says in there.differs
    assert bool(says) == bool(there.differs)
    assert f"timesteps=[{time:g}]" in there.snippet

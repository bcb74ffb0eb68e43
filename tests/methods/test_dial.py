"""A dial for students: pairs with a guidance scale each, dmd and pd that are told it, and the same pictures in plain diffusers."""

import re

import pytest
import torch
from safetensors.torch import load_file

from distill_cli.config import PairsConfig
from distill_cli.diffusion.condition import GUIDANCE_SCALE, Condition
from distill_cli.diffusion.guidance import guided
from distill_cli.diffusion.losses import matching_gradient, matching_loss
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import add_noise
from distill_cli.errors import UsageError
from distill_cli.methods.dmd.objective import DMD, times_at
from distill_cli.methods.pd import maths
from distill_cli.methods.pd.objective import open as open_pd
from distill_cli.models import load
from distill_cli.models.formats import format_of, save
from distill_cli.pairs.generate import generate, plan
from distill_cli.pairs.generate import manifest_of as manifest
from distill_cli.pairs.store import PairStore
from distill_cli.training.job import Job
from tests.looking import few_shapes
from tests.models.test_stable_diffusion import PROMPTS
from tests.options import options

SPAN = (1.0, 6.0)


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_shapes():
        yield


@pytest.fixture(scope="module")
def teacher():
    return load("tiny-sd").with_prompts(PROMPTS)


def asked(folder, **changes):
    settings = dict(teacher="tiny-sd", num=5, shard_size=3, batch_size=2, steps=2, dtype="float32", seed=4, guidance_range=SPAN)
    return PairsConfig(**{**settings, "out": folder, **changes})


@pytest.fixture(scope="module")
def pairs(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    generate(asked(folder), load("tiny-sd").with_prompts(PROMPTS), folder)
    return folder


def test_each_pair_is_made_at_a_scale_of_its_own(pairs, teacher):
    store = PairStore(pairs)
    made = store.batch(range(5))
    wanted = 1 + 5 * Draws(4, range(5)).uniform("guidance")
    assert torch.equal(made["guidance"], wanted.float())
    assert torch.equal(made["guidance"], torch.cat([load_file(path)["guidance"] for path in sorted(pairs.glob("shard-*.safetensors"))]))
    for i, scale in enumerate(made["guidance"].tolist()):
        alone = teacher.generate(Draws(4, [i]), made["label"][i : i + 1], teacher.with_defaults(None, 2, scale))
        assert (alone - made["x0"][i]).abs().max() < 1e-4 * alone.abs().max()
    assert made["x0"].std() > 0.1
    assert store.manifest.guidance_scale == 6  # the teacher's own 7.5, brought into the range


def test_a_plan_counts_both_evaluations_whatever_the_default_scale_is(teacher):
    for scale in (1.0, 3.0):
        assert "(6 an image)" in plan(manifest(asked(None, guidance_scale=scale), teacher), teacher)["network evaluations"]


def dmd(teacher, pairs=None, **changes):
    settings = dict(teacher="tiny-sd", batch_size=3, steps=2, warmup_steps=0, seed=1, pairs=pairs)
    return DMD(options("dmd", **{**settings, **changes}), teacher.copy(), PairStore(pairs) if pairs else None, PROMPTS)


def filled(objective):
    """Its students' embeddings of the scale are no longer zero."""
    for name, trained in objective.trained.items():
        weight = trained.module.network.net.time_embedding.cond_proj.weight
        weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return objective


def test_each_image_is_matched_to_the_teacher_at_the_scale_that_student_and_fake_score_are_told(teacher):
    """The loss of a step, by hand, one image after another."""
    method = filled(dmd(teacher, guidance_range=SPAN))
    draws = Draws(1, range(3))
    loss = next(method.turns(0, draws)).value.item()
    scales = (1 + 5 * draws.uniform("guidance")).float()
    labels = method.labels(draws)
    assert len(set(scales.tolist())) == 3
    losses = []
    with torch.no_grad():
        for i, scale in enumerate(scales.tolist()):
            own = Draws(1, [i])
            plain = method.teacher.conditioner(labels[i : i + 1])
            told = plain.plus(GUIDANCE_SCALE, scales[i : i + 1])
            x = method.generate(own.normal("noise", method.teacher.shape), told)
            t = times_at(method.schedule, 1000, own.uniform("matching_time"), 0.02, 0.98)
            noisy = add_noise(method.schedule, x, own.normal("matching_noise", x.shape[1:]), t)
            real = guided(method.teacher.denoiser, scale, method.teacher.conditioner.null)(noisy, t, plain)
            losses.append(matching_loss(x, matching_gradient(x, real, method.network("fake")(noisy, t, told))).item())
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_the_regression_is_told_the_pairs_scales(teacher, pairs):
    method = filled(dmd(teacher, pairs, regression_weight=1.0, matching_weight=0.0))
    assert method.config.guidance_range == SPAN  # the pairs'
    draws = Draws(1, range(3))
    stored = PairStore(pairs).batch([method.order[i] for i in range(3)])
    with torch.no_grad():
        told = method.of_pairs(stored["label"]).plus(GUIDANCE_SCALE, stored["guidance"])
        wanted = (method.generate(stored["noise"], told) - stored["x0"]).square().mean()
        assert next(method.turns(0, draws)).value.item() == pytest.approx(wanted.item(), rel=1e-5)


def pictures(model, prompts, scale, pipeline_options, monkeypatch, folder):
    """What we and plain diffusers make of the same noise at a scale."""
    import diffusers

    save(model, folder)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    again = load(str(folder)).with_prompts(prompts)
    draws = Draws(3, range(len(prompts)))
    ours = again.generate(draws, torch.arange(len(prompts)), again.with_defaults(None, None, scale))
    latents = draws.normal("prior", model.shape)
    theirs = pipeline(prompts, latents=latents, guidance_scale=scale, output_type="latent", **pipeline_options).images
    return type(pipeline).__name__, ours, theirs


def test_a_one_step_student_moves_with_guidance_scale_in_plain_diffusers(teacher, monkeypatch, tmp_path):
    method = filled(dmd(teacher, guidance_range=SPAN))
    model = method.model(method.network("student").eval().requires_grad_(False), 1)
    assert (model.sampler.dial, model.sampler.guidance) == ("6 (1 to 6 learned)", "told")
    made = []
    for scale in (1.0, 2.5, 6.0):
        name, ours, theirs = pictures(model, PROMPTS, scale, {"num_inference_steps": 1}, monkeypatch, tmp_path / f"{scale}")
        assert name == "LatentConsistencyModelPipeline"
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
        made.append(ours)
    assert (made[0] - made[2]).abs().max() > 0.05
    with pytest.raises(UsageError, match="this student has learned scales from 1 to 6"):
        model.with_defaults(None, None, 7.0)


def pd(tmp_path, **changes):
    settings = dict(teacher="tiny-sd", data="shapes", first_steps=4, last_steps=2, steps=4, batch_size=3, guidance_range=SPAN)
    return open_pd(options("pd", out=tmp_path / "run", **{**settings, **changes}), Job("pd"))


def test_progressive_distillation_guides_the_first_round_and_tells_the_others(tmp_path, monkeypatch):
    from distill_cli.runs import Run

    method = pd(tmp_path, last_steps=1)
    method.prepare(torch.device("cpu"), Run(tmp_path))
    targets = []
    monkeypatch.setattr(maths, "target", lambda teacher, *rest: targets.append((teacher, rest)) or rest[1] * 0)
    method.before(0)
    next(method.turns(0, Draws(0, range(3))))
    teacher, (_, noisy, t, _, _, told) = targets[0]
    scales = told.parts[GUIDANCE_SCALE]
    assert torch.equal(scales, (1 + 5 * Draws(0, range(3)).uniform("guidance")).float())
    plain = Condition({key: part for key, part in told.parts.items() if key != GUIDANCE_SCALE})
    with torch.no_grad():
        ours = teacher(noisy, t, told)
        for i, scale in enumerate(scales.tolist()):
            one = guided(method.teacher.denoiser, scale, method.teacher.conditioner.null)(noisy[i : i + 1], t[i : i + 1], plain[i : i + 1])
            assert (ours[i : i + 1] - one).abs().max() < 1e-5 * one.abs().max()
    filled(method)
    method.before(2)
    next(method.turns(2, Draws(0, range(3))))
    teacher, (_, noisy, t, _, _, told) = targets[1]
    assert teacher is method.kept["teacher"]
    with torch.no_grad():  # told, and different at another scale
        changed = told.plus(GUIDANCE_SCALE, told.parts[GUIDANCE_SCALE] + 1)
        assert torch.equal(teacher(noisy, t, told), method.network("student")(noisy, t, told))
        assert (teacher(noisy, t, told) - teacher(noisy, t, changed)).abs().max() > 1e-3
    assert [method.calls(step).forwards[0].images for step in (0, 2)] == [6, 3]


def test_its_student_is_told_in_plain_diffusers(tmp_path, monkeypatch):
    method = filled(pd(tmp_path))
    model = method.model(method.network("student").eval().requires_grad_(False), 4)
    model = model.with_prompts(PROMPTS)
    made = []
    for scale in (1.0, 6.0):
        name, ours, theirs = pictures(model, PROMPTS, scale, {"num_inference_steps": 2}, monkeypatch, tmp_path / f"{scale}")
        assert name == "StableDiffusionPipeline"
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
        made.append(ours)
    assert (made[0] - made[1]).abs().max() > 0.01
    assert format_of(model).in_diffusers(model).differs == ""


def test_what_does_not_go_together_is_refused(teacher, pairs, tmp_path, tiny, tiny_pairs):
    for command in ("pairs", "dmd", "pd"):
        with pytest.raises(ValueError, match="guidance_range 4,2 does not rise from 1 or more"):
            options(command, guidance_range=(4, 2))
        with pytest.raises(ValueError, match="guidance_scale 5.0 is outside guidance_range 2,4"):
            options(command, guidance_range=(2, 4), guidance_scale=5.0)
    with pytest.raises(UsageError, match=re.escape("guidance_scale 3: " + str(pairs) + " has scales from 1 to 6")):
        dmd(teacher, pairs, guidance_scale=3.0)
    with pytest.raises(UsageError, match="guidance_range 1,4: .* has scales from 1 to 6"):
        dmd(teacher, pairs, guidance_range=(1.0, 4.0))
    with pytest.raises(UsageError, match="guidance_range: a LoRA has no place for the scale"):
        dmd(teacher, guidance_range=SPAN, lora=2)
    with pytest.raises(UsageError, match="has no null condition"):
        DMD(options("dmd", teacher="tiny", guidance_range=SPAN), without_null(tiny), None)
    with pytest.raises(UsageError, match="a UNet2DModel cannot be told a guidance scale"):
        DMD(options("dmd", teacher="tiny", guidance_range=SPAN), tiny.copy(), None)
    with pytest.raises(UsageError, match="a UNet2DModel cannot be told a guidance scale"):
        manifest(options("pairs", teacher="tiny", guidance_range=SPAN), tiny)


def without_null(model):
    from dataclasses import replace

    return replace(model.copy(), conditioner=model.conditioner.taught(None, False))

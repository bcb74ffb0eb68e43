"""Distribution matching in latents: golden numbers through the objective itself, text from disk, regression on decoded latents."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from distill_cli.config import PairsConfig
from distill_cli.diffusion.guidance import guided
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import TableSchedule
from distill_cli.errors import UsageError
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import DMD, of_decoded, one_by_one
from distill_cli.models import load
from distill_cli.models.formats import save
from distill_cli.models.sampler import Sampler
from distill_cli.pairs.generate import generate
from distill_cli.pairs.store import PairStore
from distill_cli.runs import Run
from distill_cli.training.objective import Full
from tests.contracts import diffusers_alone

TEXT = "encoder_hidden_states"
PROMPTS = ["a small red circle", "a large blue cross", "a yellow square"]


@pytest.fixture(scope="module")
def teacher():
    return load("tiny-sd").with_prompts(PROMPTS)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, teacher):
    """Seven pairs of three prompts, guided away from a negative one."""
    folder = tmp_path_factory.mktemp("pairs") / "tiny-sd"
    model = teacher.with_prompts(PROMPTS, "grey")
    generate(PairsConfig(teacher="tiny-sd", num=7, shard_size=4, batch_size=4, steps=3, guidance_scale=3, dtype="float32"), model, folder)
    return folder


class GoldenDraws(Draws):
    """Draws whose matching and score noises and times are given."""

    def __init__(self, noise, t):
        super().__init__(0, range(len(t)))
        self.noise, self.t = noise, t.double()

    def normal(self, purpose, shape=(), turn=0):
        return self.noise if purpose in ("matching_noise", "score_noise") else super().normal(purpose, shape, turn)

    def uniform(self, purpose, turn=0):
        if purpose == "matching_time":
            return (self.t - 20 + 0.5) / 961
        return (self.t + 0.5) / 1000 if purpose == "score_time" else super().uniform(purpose, turn)


class Fixed(nn.Module):
    """A student whose images are given, and learnt."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def forward(self, x, t, condition=None):
        return self.x


class Wrapped(nn.Module):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x, t, condition=None):
        return self.denoiser(x, t)


def test_golden_dmd_sd_through_the_objective(golden, teacher):
    g = golden("dmd_sd")
    schedule = TableSchedule(g["alphas_cumprod"])
    dmd = DMD(DMDConfig(teacher="tiny-sd", device="cpu", guidance_scale=g.header["guidance_scale"]), teacher, None)
    assert dmd.sampling.guidance_scale == 8
    null = teacher.conditioner.null
    cond, uncond = g.mixture("teacher_cond", schedule), g.mixture("teacher_uncond", schedule)

    def both(x, t, condition):
        is_null = (condition.parts[TEXT] == null.parts[TEXT]).flatten(1).all(1)
        return torch.where(is_null.view(-1, 1, 1, 1), uncond(x, t), cond(x, t))

    student = Fixed(g["x"])
    dmd.schedule, dmd.teacher = schedule, replace(dmd.teacher, size=(8, 8))
    dmd.real = guided(both, dmd.sampling.guidance_scale, null)
    dmd.trained = {"student": Full(student, 0.0), "fake": Full(Wrapped(g.mixture("fake", schedule)), 0.0)}
    turns = dmd.turns(0, GoldenDraws(g["noise"], g["t"]))
    first = next(turns)
    assert first.value.item() == pytest.approx(g["loss"].item(), rel=1e-6)
    first.value.backward()
    assert (student.x.grad - g["dloss_dx"]).abs().max() <= 1e-6 * g["dloss_dx"].abs().max()
    second = next(turns)
    assert second.network == "fake"
    assert second.value.item() == pytest.approx(g["fake_loss"].item(), rel=1e-6)


def test_the_text_encoder_is_not_needed_while_training_runs(teacher, stored, monkeypatch):
    dmd = DMD(DMDConfig(teacher="tiny-sd", device="cpu", pairs=stored), teacher, PairStore(stored))
    assert dmd.teacher.text.negative == "grey"  # as the pairs were made
    assert teacher.text.parts()["text_encoder"] not in dmd.frozen.values()
    expected = dmd.teacher.text.given(PROMPTS, "grey")(torch.tensor([0, 1, 2]))
    dmd.prepare(torch.device("cpu"), Run(stored))
    monkeypatch.setattr(type(teacher.text), "encode", None)  # whoever asks it now fails
    losses = [loss.value.item() for loss in dmd.turns(0, Draws(0, range(4)))]
    assert len(losses) == 2
    assert torch.allclose(dmd.of_pairs(torch.tensor([0, 1, 2])).parts[TEXT], expected.parts[TEXT], atol=1e-5)


def test_without_pairs_the_embeddings_stand_in_the_run(teacher, tmp_path, monkeypatch):
    dmd = DMD(DMDConfig(teacher="tiny-sd", device="cpu", out=tmp_path / "run"), teacher, None)
    assert teacher.text.parts()["text_encoder"] not in dmd.frozen.values()
    assert not (tmp_path / "run").exists()  # which must be new when the run begins
    dmd.prepare(torch.device("cpu"), Run(tmp_path / "run"))
    assert len(list((tmp_path / "run").glob("text-*/shard-*"))) == 2  # 864 captions
    monkeypatch.setattr(type(teacher.text), "encode", None)
    assert len(list(dmd.turns(0, Draws(0, range(4))))) == 2


def test_pairs_hold_the_latents_of_their_noise_and_prompt(teacher, stored):
    store = PairStore(stored)
    batch = store.batch([1, 5])
    assert batch["x0"].shape == (2, 4, 8, 8)
    assert [store.prompts()[label] for label in batch["label"]] == [PROMPTS[1], PROMPTS[2]]
    model = teacher.with_prompts(PROMPTS, "grey")
    again = model.generate(Draws(0, [1, 5]), batch["label"], store.manifest.sampling)
    assert torch.allclose(again, batch["x0"], atol=1e-4)


def test_matching_on_pairs_too(teacher, stored):
    """The option of the LAION runs: matching and fake score see both batches, each image with noise and time of its own."""
    dmd = DMD(DMDConfig(teacher="tiny-sd", device="cpu", pairs=stored, match_pairs=True), teacher, PairStore(stored))
    seen = []
    real = dmd._match
    dmd._match = lambda x, noise, t, condition: seen.append((x, noise, t, condition)) or real(x, noise, t, condition)
    fake = dmd.trained["fake"].module
    fake.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    list(dmd.turns(0, Draws(0, range(3))))
    x, noise, t, condition = seen[0]
    assert len(x) == len(noise) == len(t) == len(condition.parts[TEXT]) == 6
    assert len(noise.flatten(1).unique(dim=0)) == 6
    assert len(t.unique()) > 3
    pairs = PairStore(stored).batch([dmd.order[i] for i in range(3)])
    assert torch.equal(condition[3:].parts[TEXT], dmd.of_pairs(pairs["label"]).parts[TEXT])
    student = dmd.trained["student"].module
    with torch.no_grad():
        assert torch.allclose(x[3:], student(pairs["noise"], torch.full((3,), 999.0), condition[3:]), atol=1e-5)
    assert len(seen[-1][0]) == 6


def test_regression_on_decoded_latents(teacher):
    """The distance is between pictures, its gradient arrives at the latents, and the reference has none."""
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    reference = torch.randn(2, 4, 8, 8)
    seen = []

    def metric(x, y):
        seen.append((x, y))
        return (x - y).square().flatten(1).mean(1)

    distance = of_decoded(metric, teacher.codec, latents, reference)
    assert distance.shape == (2,)
    assert seen[0][0].shape == (2, 3, 64, 64)
    assert torch.allclose(seen[0][1], teacher.codec.vae.decode(reference / teacher.codec.scale).sample, atol=1e-5)
    distance.sum().backward()
    assert latents.grad.abs().max() > 0
    assert not seen[0][1].requires_grad
    again = latents.detach().requires_grad_(True)
    apart = one_by_one(partial(of_decoded, metric, teacher.codec), again, reference)
    kept = len(seen)
    apart.sum().backward()
    assert len(seen) == kept + 2, "each picture is decoded again in the backward pass"
    assert torch.allclose(apart, distance, rtol=1e-5)
    assert torch.allclose(again.grad, latents.grad, rtol=1e-4, atol=1e-7)


def test_what_does_not_go_together(teacher, stored, tiny, tiny_pairs):
    with pytest.raises(UsageError, match="shape"):
        DMD(DMDConfig(device="cpu", pairs=tiny_pairs), teacher, PairStore(tiny_pairs))
    with pytest.raises(UsageError, match="no text"):
        DMD(DMDConfig(device="cpu", prompts="shapes"), tiny, None)
    with pytest.raises(UsageError, match="no text"):
        DMD(DMDConfig(device="cpu", negative_prompt="ugly"), tiny, None)
    with pytest.raises(UsageError, match="t_bins 10: for EDM and flow teachers"):
        DMD(DMDConfig(device="cpu", t_bins=10), teacher, None)


@pytest.mark.parametrize(
    ("name", "time", "said"),
    [("tiny-sd", 399, "timesteps=[399]"), ("tiny-sdxl", 399, "timesteps=[399]"), ("tiny-sd3", 0.7, "sigmas=[0.7]")],
)
def test_a_student_told_an_earlier_time_than_the_last(name, time, said, tmp_path):
    """It takes pure noise for x at that time, as DMD2's one-step student of SDXL; plain diffusers is given the time by the card."""
    teacher = load(name).with_prompts(PROMPTS)
    dmd = DMD(DMDConfig(device="cpu", teacher=name, student_time=time), teacher, None)
    draws, labels = Draws(0, range(2)), torch.tensor([0, 1])
    noise, condition, t = draws.normal("prior", teacher.shape), teacher.conditioner(labels), torch.tensor([float(time)] * 2)
    schedule = teacher.denoiser.schedule
    a, s = schedule.alpha(t[:1]), schedule.sigma(t[:1])
    with torch.no_grad():
        made = dmd.generate(noise, condition)
        predicted = teacher.backbone(noise, t if schedule.bins else 1000 * t, condition)
    expected = (noise - s * predicted) / a if schedule.bins else noise - s * predicted
    assert torch.allclose(made, expected, atol=1e-5)
    student = dmd.model(dmd.network("student"), 1)
    save(student, tmp_path / "s")
    again = load(str(tmp_path / "s")).with_prompts(PROMPTS)
    assert again.sampler == Sampler.one_step(schedule, time)
    ours = again.sample(draws, labels)
    assert torch.allclose(ours, teacher.codec.decode(made).detach(), atol=1e-5)
    theirs = diffusers_alone.pictures(tmp_path / "s", draws, again.shape, labels.tolist(), PROMPTS[:2])
    assert (ours - theirs).abs().max() < 1e-4
    assert said in (tmp_path / "s/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "time", "has"),
    [("tiny-sd", 399.5, "whole times up to 999"), ("tiny-sd", 1000, "whole times up to 999"), ("tiny", 81, "times up to 80")],
)
def test_a_time_that_the_schedule_does_not_have(name, time, has, tiny):
    teacher = tiny if name == "tiny" else load(name).with_prompts(PROMPTS)
    with pytest.raises(UsageError, match=f"student_time {time:g}: {name} has {has}"):
        DMD(DMDConfig(device="cpu", teacher=name, student_time=time), teacher, None)

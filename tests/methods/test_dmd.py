"""The objective against the paper: who is guided, which times, which order, which images."""

from dataclasses import replace

import pytest
import torch

from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, TableSchedule, add_noise
from distill_cli.errors import UsageError
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import DMD, check_pairs, remedies, times_at
from distill_cli.models import pixel
from distill_cli.models.lineage import Lineage
from distill_cli.models.sampler import Sampler
from distill_cli.pairs.store import PairStore
from tests.conditions import of


def objective(tiny, pairs=None, **options):
    return DMD(DMDConfig(teacher="tiny", device="cpu", pairs=pairs, **options), tiny.copy(), PairStore(pairs) if pairs else None)


def test_matching_times_are_2_to_98_percent_and_score_times_all(tiny):
    dmd = objective(tiny)
    u = torch.linspace(0, 1 - 1e-9, 20_000, dtype=torch.float64)
    sigma = EDMSchedule().at(torch.arange(1000, dtype=torch.float64) / 999).float()
    matching, score = (times_at(dmd.schedule, 1000, u, *shares) for shares in ((0.02, 0.98), (0.0, 1.0)))
    assert torch.equal(matching.unique(), sigma[20:981])
    assert torch.equal(score.unique(), sigma)
    assert matching[0] < matching[-1]  # the first bins are the small sigmas


def test_matching_times_of_a_table_are_20_to_980(tiny):
    table = TableSchedule.from_config({"beta_schedule": "linear"})
    model = pixel.create(
        resolution=8, channels=[8], attention=[False], groups=4, head=8, classes=[], schedule=table, parameterisation="eps",
        lineage=Lineage(name="x"),
    )  # fmt: skip
    times = times_at(model.denoiser.schedule, 7, torch.linspace(0, 1 - 1e-9, 20_000, dtype=torch.float64), 0.02, 0.98)
    assert times.unique().tolist() == list(range(20, 981))


def test_the_student_starts_at_sigma_max_and_is_the_teacher(tiny):
    dmd, noise, labels = objective(tiny), torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 3])
    with torch.no_grad():
        expected = tiny.denoiser(80.0 * noise, torch.full((3,), 80.0), of(labels))
        assert torch.equal(dmd.generate(noise, of(labels)), expected)


def test_one_step_by_hand(tiny, tiny_pairs):
    """The first loss and its gradient, from the formulas and the draws alone, with a guided teacher and an unguided fake score."""
    dmd = objective(tiny, tiny_pairs, guidance_scale=3.0, regression_weight=0.7)
    with torch.no_grad():
        dmd.trained["fake"].module.network.unet.conv_out.bias.add_(0.1)
    draws = Draws(0, range(4))
    loss = next(dmd.turns(0, draws))
    pairs = PairStore(tiny_pairs).batch([dmd.order[i] for i in range(4)])
    labels = (draws.uniform("label") * 10).long()
    t80 = torch.full((4,), 80.0)
    with torch.no_grad():
        x = tiny.denoiser(80 * draws.normal("noise", tiny.shape), t80, of(labels))
        again = tiny.denoiser(80 * pairs["noise"], t80, of(pairs["label"]))
        t = times_at(dmd.schedule, 1000, draws.uniform("matching_time"), 0.02, 0.98)
        noisy = x + t.view(-1, 1, 1, 1) * draws.normal("matching_noise", tiny.shape)
        cond, uncond = tiny.denoiser(noisy, t, of(labels)), tiny.denoiser(noisy, t, of(torch.full((4,), 10)))
        real, fake = uncond + 3.0 * (cond - uncond), dmd.trained["fake"].module(noisy, t, of(labels))
        gradient = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    expected = 0.5 * gradient.square().mean() + 0.7 * (again - pairs["x0"]).square().mean()
    assert loss.network == "student"
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.metrics["matching_loss"].item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-4)


def test_a_share_of_a_batch_is_matched_beside_its_pairs(tiny, tiny_pairs):
    """Step 3 of batches of 8 with a quarter matched: images 6 and 7 of the matched, pairs 24 to 31; losses from the formulas alone."""
    dmd = objective(tiny, tiny_pairs, batch_size=8, matching_share=0.25, fake_lr=1e-4)
    student, fake = dmd.turns(3, Draws(0, range(24, 32)))
    two, pairs = Draws(0, [6, 7]), PairStore(tiny_pairs).batch([dmd.order[i] for i in range(24, 32)])
    labels, score = of((two.uniform("label") * 10).long()), dmd.trained["fake"].module
    with torch.no_grad():
        x = dmd.generate(two.normal("noise", tiny.shape), labels)
        t = times_at(dmd.schedule, 1000, two.uniform("matching_time"), 0.02, 0.98)
        noisy = add_noise(EDMSchedule(), x, two.normal("matching_noise", tiny.shape), t)
        real = tiny.denoiser(noisy, t, labels)
        real_error = ((t**-2 + 0.5**-2) * (real - x).square().mean((1, 2, 3))).mean()
        regression = (dmd.generate(pairs["noise"], of(pairs["label"])) - pairs["x0"]).square().mean()
        t = times_at(dmd.schedule, 1000, two.uniform("score_time"), 0.0, 1.0)
        error = (score(add_noise(EDMSchedule(), x, two.normal("score_noise", tiny.shape), t), t, labels) - x).square().mean((1, 2, 3))
    assert student.metrics["regression_loss"].item() == pytest.approx(regression.item(), rel=1e-4)
    assert student.metrics["real_error"].item() == pytest.approx(real_error.item(), rel=1e-4)
    assert student.metrics["matching_loss"].item() == 0  # the fake score is still the teacher
    weight = t**-2 + 0.5**-2
    assert fake.value.item() == pytest.approx((weight * error).mean().item(), rel=1e-4)
    assert dmd.calls().trainings[0].images == 10
    assert [call.images for call in dmd.calls().forwards] == [2, 2]


def test_after_the_regression_matching_is_alone(tiny, tiny_pairs):
    """9 of 12 steps with the regression: then the matched images are the same, and no pair is read."""
    both = objective(tiny, tiny_pairs, steps=12, batch_size=8, matching_share=0.25, regression_steps=9)
    assert [(phase.steps, phase.anew) for phase in both.phases] == [(9, False), (3, False)]
    assert [both.calls(step).trainings[0].images for step in (0, 8, 9, 11)] == [10, 10, 2, 2]
    with torch.no_grad():
        both.trained["fake"].module.network.unet.conv_out.bias.add_(0.1)
    last, after = (next(both.turns(step, Draws(0, range(24, 32)))) for step in (8, 9))
    matching = last.metrics["matching_loss"].item()
    assert last.value.item() == pytest.approx(matching + 0.25 * last.metrics["regression_loss"].item(), rel=1e-5)
    assert after.value.item() == after.metrics["matching_loss"].item() == pytest.approx(matching, rel=1e-5)
    assert "regression_loss" not in after.metrics
    both.pairs = None
    next(both.turns(9, Draws(0, range(24, 32))))


@pytest.mark.parametrize(("parts", "processes"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4)])
def test_the_matched_images_are_the_same_in_parts_and_in_processes(tiny, tiny_pairs, parts, processes):
    dmd = objective(tiny, tiny_pairs, batch_size=16, matching_share=0.25, accumulate=parts)
    size, found = 16 // parts, []
    for first in range(5 * 16, 6 * 16, size):
        for rank in range(processes):
            found.append(dmd.matched(Draws(0, range(first, first + size)[rank::processes])).indices)
    assert {len(each) for each in found} == {4 // parts // processes}
    assert sorted(index for each in found for index in each) == [20, 21, 22, 23]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"matching_share": 0.5}, "matching_share 0.5: needs a regression"),
        ({"matching_share": 0.5, "regression_weight": 1}, "or set regression_weight=0 matching_share=1 \\["),
        ({"matching_share": 0.5, "pairs": "p", "regression_weight": 0}, "matching_share 0.5: needs a regression"),
        ({"regression_steps": 5}, "regression_steps: needs a regression on pairs, and matching after it; without either, leave it out"),
        ({"regression_steps": 5, "pairs": "p", "matching_weight": 0}, "regression_steps: needs a regression on pairs, and matching"),
        ({"regression_steps": 5, "pairs": "p", "keep_best": 1}, "best_by loss: the loss falls where the regression ends"),
        ({"matching_share": 0.3, "pairs": "p", "batch_size": 8}, "0.3: of batch_size 8 that is 2.4 images: take 0.25 or 0.375 \\["),
        ({"matching_share": 0, "pairs": "p"}, "that is 0 images: take 0.03125, or for regression alone matching_share=1 matching_weight=0"),
        ({"matching_share": 1e-8, "pairs": "p"}, "that is 3.2e-07 images: take 0.03125 \\["),
        ({"matching_share": 0.5, "matching_weight": 0, "pairs": "p"}, "matching_weight 0 matches nothing: set matching_share=1 too"),
        ({"matching_share": 0.25, "pairs": "p", "batch_size": 8, "accumulate": 4}, "does not divide batch_size 8 and matching_share 0.25"),
    ],
)
def test_shares_of_nothing_and_of_no_whole_images_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DMDConfig(**options)


@pytest.mark.parametrize("memory", [[], ["memory=1MB"]])
def test_a_plan_for_processes_that_cannot_share_a_batch_is_refused(memory, distill):
    command = ("dmd", "--teacher", "tiny", "pairs=p", "batch_size=32", "matching_share=0.125", *memory)
    done = distill(*command, "--dry-run", "--num-processes", 8)
    assert (done.code, done.out) == (2, "")
    assert "error: batch_size 32 and matching_share 0.125 of it: cannot be shared evenly by 8 processes" in done.err
    four = distill(*command, "--dry-run", "--num-processes", 4)
    assert memory or "#   pairs: p has none yet: not compared with the teacher\n" in four.out
    assert "error: memory 1MB: the smallest plan needs" in four.err if memory else four.code == 0


def test_a_third_may_be_rounded():
    assert DMDConfig(matching_share=0.333333, pairs="p", batch_size=48).matched == 16


def test_the_fake_score_learns_the_images_of_before_the_students_step(tiny):
    dmd = objective(tiny, fake_steps=2)
    draws = Draws(0, range(4))
    turns = dmd.turns(0, draws)
    labels = (draws.uniform("label") * 10).long()
    with torch.no_grad():
        x = dmd.generate(draws.normal("noise", tiny.shape), of(labels))
    next(turns)
    with torch.no_grad():  # the engine steps the student here
        for p in dmd.trained["student"].module.parameters():
            p.add_(0.05)
    losses = list(turns)
    assert [loss.network for loss in losses] == ["fake", "fake"]
    for turn, loss in enumerate(losses):
        t = times_at(dmd.schedule, 1000, draws.uniform("score_time", turn), 0.0, 1.0)
        noisy = add_noise(EDMSchedule(), x, draws.normal("score_noise", tiny.shape, turn), t)
        with torch.no_grad():
            error = (dmd.trained["fake"].module(noisy, t, of(labels)) - x).square().mean((1, 2, 3))
        assert loss.value.item() == pytest.approx(((t**-2 + 0.5**-2) * error).mean().item(), rel=1e-4)
        loss.value.backward()
    assert all(p.grad is None for p in dmd.trained["student"].module.parameters())
    assert any(p.grad is not None for p in dmd.trained["fake"].module.parameters())


def test_the_students_loss_trains_the_student_alone(tiny, tiny_pairs):
    dmd = objective(tiny, tiny_pairs)
    next(dmd.turns(0, Draws(0, range(4)))).value.backward()
    assert all(p.grad is None for p in dmd.trained["fake"].module.parameters())
    assert all(p.grad is None for p in dmd.teacher.denoiser.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in dmd.trained["student"].module.parameters())


def test_without_matching_no_fake_score_is_trained(tiny, tiny_pairs):
    losses = list(objective(tiny, tiny_pairs, matching_weight=0).turns(0, Draws(0, range(2))))
    assert [loss.network for loss in losses] == ["student"]


def test_dropout_is_off_everywhere(tiny):
    dmd = objective(tiny)
    assert not any(m.training for n in (*(each.module for each in dmd.trained.values()), *dmd.frozen.values()) for m in n.modules())


def test_pairs_of_another_teacher_or_resolution_are_refused(tiny, tiny_pairs):
    pairs = PairStore(tiny_pairs)
    with pytest.raises(UsageError, match="made by another teacher"):
        check_pairs(pairs, tiny, "0" * 64)
    with pytest.raises(UsageError, match="has class 1, which is not in classes"):
        check_pairs(pairs, tiny, tiny.weights_hash(), [0])
    with pytest.raises(UsageError, match=r"images of shape \(3, 16, 16\), the teacher's are \(3, 32, 32\)"):
        check_pairs(pairs, replace(tiny, size=(32, 32)), tiny.weights_hash())


def test_the_teacher_is_guided_as_its_pairs_were(tiny, tiny_pairs):
    pairs = PairStore(tiny_pairs)
    pairs.manifest = pairs.manifest.model_copy(update={"guidance_scale": 2.5})
    config = DMDConfig(pairs=tiny_pairs, device="cpu")
    assert DMD(config, tiny.copy(), pairs).sampling.guidance_scale == 2.5
    assert DMD(config.model_copy(update={"guidance_scale": 1.5}), tiny.copy(), pairs).sampling.guidance_scale == 1.5
    assert DMD(DMDConfig(device="cpu"), tiny.copy(), None).sampling.guidance_scale == tiny.sampling.guidance_scale


def test_students_and_keys_of_other_teachers_are_refused(tiny, tiny_pairs):
    student = tiny.copy()
    student.sampler = Sampler.consistency([80.0])
    with pytest.raises(UsageError, match="a student"):
        DMD(DMDConfig(device="cpu"), student, None)
    config = DMDConfig(pairs=tiny_pairs, regression_loss="lpips", decoder="x", device="cpu")
    with pytest.raises(UsageError, match="for latents"):
        DMD(config, tiny.copy(), PairStore(tiny_pairs))


def test_guidance_without_a_null_class_is_refused(tiny):
    from dataclasses import replace

    from distill_cli.models.conditioners import ClassConditioner

    with pytest.raises(UsageError, match="no null class"):
        DMD(DMDConfig(guidance_scale=2.0, device="cpu"), replace(tiny.copy(), conditioner=ClassConditioner()), None)


def test_a_fake_score_that_falls_behind_is_reported(tiny):
    dmd = objective(tiny)
    assert dmd.advice({"real_error": 1.0, "fake_error": 1.62}, 0.5) == ""  # as a healthy run may have for a moment
    assert "fallen behind: its error on the student's images is 1.90 times" in dmd.advice({"real_error": 1.0, "fake_error": 1.9}, 0.5)


def test_what_to_change_follows_from_the_options(tiny):
    """A fake score that has not learned the student's pictures comes first, then a regression that is missing, then guidance."""
    learned, still = {"real_error": 1.0, "fake_error": 0.9}, {"real_error": 1.0, "fake_error": 0.98}
    assert "fake score lags: its error on them is still 0.98 times" in remedies(still, 8.0, True)["diverging"]
    assert "give pairs" in remedies(learned, 8.0, False)["swinging"]
    assert remedies(learned, 8.0, True)["over-saturated"] == "Lower guidance_scale, now 8"
    assert "over-saturated" not in remedies(learned, 1.0, True)
    assert objective(tiny).remedies(still) == remedies(still, 1.0, True)

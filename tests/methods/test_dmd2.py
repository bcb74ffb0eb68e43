"""DMD2: the gradient's two parts, backward simulation, the discriminator, the student's times, and what is refused."""

import math

import pytest
import torch

from distill_cli.bench import cases
from distill_cli.data import open_images
from distill_cli.diffusion import losses
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from distill_cli.diffusion.solvers import few_step
from distill_cli.errors import UsageError
from distill_cli.evaluate.points import sliced_wasserstein
from distill_cli.methods.dmd2 import begin, maths
from distill_cli.methods.dmd2.config import DMD2Config
from distill_cli.methods.dmd2.objective import DMD2
from distill_cli.models import load
from distill_cli.models.conditioners import ClassConditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.plane import PlaneCodec
from distill_cli.runs import Run
from tests.methods.test_consistency_function import MEANS, MIXTURE, SCHEDULE, STD, WEIGHTS, exact
from tests.plane import Plane
from tests.test_bench import calls_of


def of(name="tiny", data=None, model=None, student=None, **options):
    """The objective on a teacher, ready for its first step."""
    config = DMD2Config(**{"teacher": name, "device": "cpu", "batch_size": 4, "data": data, "student": student and "run"} | options)
    objective = DMD2(config, model or load(name), data and open_images(data), student)
    objective.prepare(torch.device("cpu"), Run("/nowhere"))
    return objective


def drawn(count=4, first=0):
    return Draws(3, range(first, first + count))


class TestGradient:
    def estimates(self):
        torch.manual_seed(1)
        return [torch.randn(5, 3, 4, 4, dtype=torch.float64) for _ in range(4)]

    @pytest.mark.parametrize("scale", [1.0, 1.75, 8.0])
    def test_the_parts_add_up_to_the_whole(self, scale):
        x, fake, cond, uncond = self.estimates()
        guided = uncond + scale * (cond - uncond)
        parts = maths.matching_part(x, fake, cond, guided) + maths.guidance_part(x, cond, guided)
        whole = losses.matching_gradient(x, guided, fake)
        assert (parts - whole).abs().max() <= 1e-10 * whole.abs().max()

    def test_the_objective_gives_it(self):
        """With one time for both parts and weights of 1: DMD's gradient for the guided teacher and the fake score."""
        one = of("digits", guidance_scale=3.0, student_steps=1)
        with torch.no_grad():
            for parameter in one.trained["fake"].parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
        made = one.batch(0, drawn(), 0)
        made.x = made.x.double()
        one.frozen["teacher"].double(), one.trained["fake"].module.double()
        gradient, _ = one.gradient(made)
        noisy, t = one.noised(made.x, made.draws, "matching", 0.02, 0.98)
        with torch.no_grad():
            cond, uncond = one.real.both(noisy, t, made.condition)
            whole = losses.matching_gradient(made.x, uncond + 3 * (cond - uncond), one.network("fake")(noisy, t, made.condition))
        assert gradient.dtype == torch.float64
        assert (gradient - whole).abs().max() <= 1e-10 * whole.abs().max()

    def test_each_part_has_its_weight_and_its_times(self):
        same = of("digits", guidance_scale=3.0, student_steps=1)
        apart = of("digits", guidance_scale=3.0, student_steps=1, guidance_times="range")
        made = same.batch(0, drawn(), 0)
        assert torch.equal(made.x, apart.batch(0, drawn(), 0).x)
        half = {"matching": of("digits", guidance_scale=3.0, student_steps=1, guidance_weight=0.0),
                "guidance": of("digits", guidance_scale=3.0, student_steps=1, matching_weight=0.0)}  # fmt: skip
        parts = {name: each.gradient(made)[0] for name, each in half.items()}
        assert torch.allclose(sum(parts.values()), same.gradient(made)[0], rtol=1e-4, atol=1e-6)
        other = apart.gradient(made)[0] - parts["matching"]  # the same formula at a second draw of times
        noisy, t = apart.noised(made.x, made.draws, "matching", 0.02, 0.98, turn=1)
        with torch.no_grad():
            cond, uncond = apart.real.both(noisy, t, made.condition)
        expected = maths.guidance_part(made.x, cond, uncond + 3 * (cond - uncond))
        assert torch.allclose(other, expected, rtol=1e-3, atol=1e-5)
        assert (other - parts["guidance"]).abs().max() > 0.1 * other.abs().max()


class TestTimes:
    def test_even_ones_are_those_of_the_published_students(self):
        for name, count, expected in (
            ("tiny-sd", 4, [999, 749, 499, 249]), ("tiny-sd", 1, [999]), ("tiny-sd3", 2, [1.0, 0.75 * 1.0015]),
        ):  # fmt: skip
            schedule = load(name).denoiser.schedule
            own = begin.times_of(DMD2Config(teacher=name, student_steps=count), schedule, None)
            assert own.tolist() == pytest.approx(expected, rel=2e-3)

    def test_edms_lie_on_the_grid_of_diffusers(self):
        schedule = EDMSchedule()
        own = begin.times_of(DMD2Config(student_steps=4), schedule, None)
        grid = schedule.point(torch.tensor([0, 10, 20, 30]), 39)
        assert torch.allclose(own, grid.double(), rtol=1e-6)

    @pytest.mark.parametrize("schedule", [EDMSchedule(), FlowSchedule(3.0), TableSchedule.from_config({})], ids=lambda s: type(s).__name__)
    def test_shares_of_the_range(self, schedule):
        own = schedule.at(torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))
        assert schedule.fraction(own).tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-3)
        for step, (stretch, noisier) in enumerate((((0.75, 0.98), 0.75), ((0.5, 0.75), 0.5), ((0.25, 0.5), 0.25), ((0.02, 0.25), 0.02))):
            assert maths.shares("stretch", schedule, own, step, 0.02, 0.98) == pytest.approx(stretch, abs=1e-3)
            assert maths.shares("noisier", schedule, own, step, 0.02, 0.98) == pytest.approx((noisier, 0.98), abs=1e-3)
            assert maths.shares("range", schedule, own, step, 0.02, 0.98) == (0.02, 0.98)

    def test_a_student_told_an_earlier_time_begins_with_pure_noise_all_the_same(self):
        own = torch.tensor([399.0], dtype=torch.float64)
        assert maths.shares("stretch", TableSchedule.from_config({}), own, 0, 0.02, 0.98) == (0.02, 0.98)

    def test_a_stretch_is_where_its_step_is_matched(self):
        one = of(matching_times="stretch", t_low=0.0, t_high=1.0)
        for step in range(4):
            low, high = maths.shares("stretch", one.schedule, one.own, step, 0.0, 1.0)
            _, t = one.noised(torch.zeros(200, 3, 16, 16), drawn(200), "matching", low, high)
            after = one.own[step + 1] if step < 3 else 0.0
            assert after * 0.99 <= t.min()
            assert t.max() <= one.own[step] * 1.01

    def test_the_fake_score_learns_a_steps_images_in_its_stretch(self):
        one, seen = of(matching_times="stretch"), []
        one.trained["fake"].module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
        for turn in range(4):
            made = one.batch(0, drawn(), turn)
            one.fake_loss(made)
            after = one.own[made.step + 1] if made.step < 3 else 0.0
            assert after * 0.99 <= seen[-1].min()
            assert seen[-1].max() <= one.own[made.step] * 1.01


class TestSimulation:
    def test_it_is_sampling(self):
        """The images of step k are those of few_step in k + 1 steps with the same noise; every step comes once in four turns."""
        one = of(fake_steps=4)
        assert sorted(one.step_of(7, turn) for turn in range(4)) == [0, 1, 2, 3]
        for turn in range(4):
            made, own = one.batch(7, drawn(), turn), Draws(3, [4 * i + turn for i in range(4)])
            assert made.step == one.step_of(7, turn)
            with torch.no_grad():
                x = few_step(
                    one.network("student"), one.schedule, one.schedule.prior(one.own[0].item()) * own.normal("noise", (3, 16, 16)),
                    one.own[: made.step + 1], made.condition, sigma_min=one.schedule.floor,
                    noise=lambda k, own=own: own.normal("solver", (3, 16, 16), turn=k), project=one.teacher.codec.project,
                )  # fmt: skip
            assert torch.equal(made.x, x)

    def test_the_exact_consistency_function_gives_the_mixture(self):
        """Measured: 10,000 points are 0.012, 0.007, 0.012 and 0.010 of the standard deviation away from fresh ones at steps 0 to 3, and
        other fresh ones 0.017. The teacher's own estimate of x0, in the place of the function, is 0.82 away at step 0."""

        class Exact(Plane):
            def forward(self, x, t, condition):
                return exact(x, t[0].item()).float()

        class Whole(NetworkDenoiser):
            def forward(self, x, t, condition):
                return self.network(x, t, condition)

        network = Whole(Exact(), SCHEDULE, scales=Scales(0.7, 0.02))
        teacher = Model(network, ClassConditioner(), Lineage(name="plane"), codec=PlaneCodec())
        one = of("mixture", model=teacher, fake_steps=4, batch_size=10_000)
        fresh = sampled(12)
        std = fresh.std(0).mean()
        for turn in range(4):
            made = one.batch(0, drawn(10_000), turn)
            assert sliced_wasserstein(made.x.flatten(1), fresh) / std < 0.05
        x = SCHEDULE.sigma_max * drawn(10_000).normal("prior", (2, 1, 1))
        mean = MIXTURE(x, torch.full((10_000,), SCHEDULE.sigma_max)).flatten(1)
        assert sliced_wasserstein(mean, fresh) / std > 0.5

    def test_real_images_may_take_its_place(self):
        """input=data: a real image with noise of the step's time; at the first step pure noise."""
        one = of(data="digits", input="data", fake_steps=4)
        assert one.discriminator == "none"
        seen = []
        one.trained["student"].module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
        for turn in range(4):
            made, own = one.batch(0, drawn(), turn), Draws(3, [4 * i + turn for i in range(4)])
            x, t, condition = seen[-1]
            time = one.own[made.step].item()
            assert (t == pytest.approx(time)) if isinstance(t, float) else torch.allclose(t, torch.tensor(time).float())
            assert torch.equal(condition.parts["class_labels"], made.real[1].parts["class_labels"])
            noise = (
                own.normal("solver", (3, 16, 16), turn=made.step) * math.sqrt(time**2 - 0.002**2)
                if made.step
                else 80 * own.normal("noise", (3, 16, 16))
            )
            assert torch.allclose(x, noise + (made.real[0] if made.step else 0), atol=1e-4)
        assert len(seen) == 4


def sampled(seed):
    """10,000 points (N, 2) of the mixture."""
    draws = Draws(seed, range(10_000))
    place = (draws.uniform("label")[:, None] > WEIGHTS.cumsum(0)).sum(1)
    return MEANS[place] + STD * draws.normal("prior", (2,))


class TestBeginnings:
    def test_a_student_goes_on(self, tmp_path):
        """Weights and times of a trained student; of a LoRA with another alpha, the same change of the weights."""
        first = of(fake_steps=1)
        made = first.model(first.network("student"), 0)
        with torch.no_grad():
            for parameter in made.denoiser.parameters():
                parameter.add_(0.01)
        then = of(student=made)
        assert then.own.tolist() == list(made.sampler.times)
        for ours, theirs in zip(then.network("student").parameters(), made.denoiser.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        lora = of("tiny-sd", lora=2, lora_alpha=4.0)
        trained = lora.model(lora.network("student"), 0)
        for parameter in trained.backbone.parameters():
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        again = of("tiny-sd", student=trained, lora=2, lora_alpha=1.0)
        x, t, condition = torch.randn(2, *trained.shape), torch.full((2,), 749.0), trained.example(2, "cpu")
        close = dict(rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert torch.allclose(again.network("student")(x, t, condition), trained.denoiser(x, t, condition), **close)

    def test_regression_comes_first(self, tiny_pairs):
        from distill_cli.pairs.store import PairStore

        store = PairStore(tiny_pairs)
        config = DMD2Config(
            teacher="tiny", device="cpu", batch_size=4, student_steps=1, init_pairs=tiny_pairs, init_steps=2, init_loss="l2"
        )
        one = DMD2(config, load("tiny"), pairs=store)
        assert [(phase.steps, phase.result, phase.anew) for phase in one.phases] == [(2, "start", False), (1000, "student", True)]
        (loss,) = one.turns(1, drawn())
        stored = store.batch([one.of_pairs[i] for i in range(4)])
        with torch.no_grad():
            made = one.network("student")(80 * stored["noise"], torch.full((4,), 80.0), Condition({"class_labels": stored["label"]}))
        assert loss.value.item() == pytest.approx((made - stored["x0"]).square().mean().item(), rel=1e-5)
        assert len([*one.turns(2, drawn())]) == 6
        assert str(one.calls(1)) == "trains student on 4 images"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"student_steps": 1, "fake_steps": 2},
        {"student_steps": 2, "data": "digits", "fake_steps": 3, "r1_weight": 1.0},
        {"student_steps": 1, "fake_steps": 1, "guidance_scale": 2.0, "guidance_times": "range"},
    ],
    ids=str,
)
def test_both_sides_of_bench_call_the_networks_alike(options, tmp_path, monkeypatch):
    """Over a whole cycle: images without gradient, with one, networks that got one, optimizer steps."""
    config = DMD2Config(teacher="tiny", batch_size=4, device="cpu", **options)
    ours, raw = calls_of(cases.training("dmd2", config, tmp_path), monkeypatch)
    assert ours == raw


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gan": "fake"}, "gan fake needs real images"),
        ({"input": "data"}, "input data needs real images"),
        ({"data": "digits", "gan": "none"}, "data has no use here"),
        ({"times": [80, 80]}, "they must decrease"),
        ({"times": [80, 2], "student_steps": 4}, "times has 2 numbers, and student_steps is 4"),
        ({"gan_weight": 1.0}, "gan_weight is for a discriminator"),
        ({"init_steps": 5}, "init_pairs and init_steps go together"),
        ({"init_steps": 5, "init_pairs": "x"}, "for a student of one step, not of 4"),
        ({"matching_weight": 0, "guidance_weight": 0}, "leave the student without a teacher"),
        ({"classes": [0, 1], "data": "digits"}, "classes: not with data"),
    ],
)
def test_conflicts_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        DMD2Config(**options)


def test_what_means_nothing_without_guidance_is_refused():
    with pytest.raises(UsageError, match="matching_weight 0: without guidance nothing else"):
        of("digits", matching_weight=0.0)
    with pytest.raises(UsageError, match="guidance_times has no use here"):
        of("digits", guidance_times="range")


def test_pairs_keep_their_own_prompts_beside_captioned_images(tmp_path, distill):
    from distill_cli.pairs.store import PairStore

    (tmp_path / "p.txt").write_text("one red thing\nanother\n")
    made = distill("pairs", "--teacher", "tiny-sd", "--prompts", "p.txt", "--num", 4, "--steps", 2, "--out", "pairs")
    assert made.code == 0, made.err
    begun = dict(student_steps=1, init_pairs=tmp_path / "pairs", init_steps=1, data="shapes", out=tmp_path / "run")
    config = DMD2Config(teacher="tiny-sd", device="cpu", batch_size=2, **begun)
    one = DMD2(config, load("tiny-sd"), open_images("shapes"), pairs=PairStore(tmp_path / "pairs"))
    assert list(one.paired.prompts)[:2] == list(one.teacher.conditioner.prompts)[:2] == ["one red thing", "another"]
    assert len(one.source.model.conditioner.prompts) == 864


def test_times_that_nobody_has_are_refused():
    with pytest.raises(UsageError, match="student_steps 1500: tiny-sd has not so many times"):
        of("tiny-sd", student_steps=1500)
    with pytest.raises(UsageError, match="times 100: digits has times above 0.002, up to 80"):
        of("digits", times=[100.0, 3.0])
    with pytest.raises(UsageError, match="times 3.5: tiny-sd has whole times above 0, up to 999"):
        of("tiny-sd", times=[999, 3.5])
    first = of()
    made = first.model(first.network("student"), 0)
    with pytest.raises(UsageError, match="times 7: student run was trained at 80, "):
        of(student=made, times=[80, 7.0])
    assert of(student=of(student_steps=2).model(of().network("student"), 0)).own.tolist() == pytest.approx([80, 2.24], rel=1e-2)
    with pytest.raises(UsageError, match="trained at 80, "):  # a list longer than its training
        of(student=made, student_steps=8)
    with pytest.raises(UsageError, match="not a student of digits"):
        of("digits", student=made)
    with pytest.raises(UsageError, match="a student"):
        of(model=made)
    whole = of("tiny-sd").model(of("tiny-sd").network("student"), 0)
    with pytest.raises(UsageError, match="no LoRA, lora=2 begins with one of its rank"):
        of("tiny-sd", student=whole, lora=2)

"""Consistency objectives against the papers' own programs and closed forms."""

import math

import pytest
import torch
from torch import nn

from distill_cli.data import open_images
from distill_cli.data.images import split
from distill_cli.diffusion import consistency as maths
from distill_cli.diffusion.condition import NOTHING
from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
from distill_cli.diffusion.losses import distance
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, expand
from distill_cli.errors import UsageError
from distill_cli.methods.cm.config import CMConfig
from distill_cli.models import load
from distill_cli.models.formats import save
from distill_cli.models.sampler import Sampler
from distill_cli.recipes import resolve
from tests.conditions import labels_of, of
from tests.options import consistency, options


class Raw(nn.Module):
    """The golden files' raw network: tanh(W x + b cos(time))."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x, time, condition):
        return torch.tanh(torch.einsum("dc,bchw->bdhw", self.weight, x) + self.bias[:, None, None] * time.cos().view(-1, 1, 1, 1))


def objective(tiny, **given):
    config = options("cm", **dict(teacher="tiny", data="digits", device="cpu") | given)
    return consistency(config, tiny.copy() if config.teacher else None, open_images("digits"))


def close(ours, theirs, relative):
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.mark.parametrize("method", ["cd", "ct"])
@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("weighting", ["uniform", "karras", "snr+1"])
def test_golden_consistency(method, metric, weighting, golden, tiny):
    g = golden("consistency")
    h = g.header
    cm = objective(tiny, method=method, metric=metric, weighting=weighting)
    scales = Scales(h["sigma_data"], h["sigma_min"])
    schedule = EDMSchedule(h["sigma_min"], h["sigma_max"], h["rho"])
    student, target = (
        NetworkDenoiser(Raw(g[f"{n}.weight"], g[f"{n}.bias"]), schedule, "consistency", scales) for n in ("student", "target")
    )
    cm.trained["student"].module, cm.kept["target"], cm.real = student, target, g.mixture("teacher")
    t, r = (schedule.point(g["index"] + k, h["num_scales"] - 1) for k in (0, 1))
    with torch.no_grad():
        close(cm.errors(g["x"], g["noise"], t, r, NOTHING), g[f"{method}.{metric}.{weighting}"], 1e-4)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("c", [0.0, 0.06])
def test_golden_ect(stage, c, golden, tiny):
    g = golden("ect")
    h = g.header
    cm = objective(tiny, method="ect", huber_c=c)
    student = NetworkDenoiser(Raw(g["student.weight"], g["student.bias"]), EDMSchedule(), "edm", Scales(h["sigma_data"]), "ln sigma / 4")
    cm.trained["student"].module = student
    t = (h["P_mean"] + h["P_std"] * g["u"]).exp()
    close(t, g["t"], 1e-9)
    r = maths.ect_neighbour(t, stage, h["q"], h["k"], h["b"])
    close(r, g[f"r.stage{stage}"], 1e-9)
    with torch.no_grad():
        close(cm.errors(g["x"], g["noise"], t, r, NOTHING), g[f"loss.stage{stage}.c{c}"], 1e-9)


def test_the_grid_of_18():
    grid = EDMSchedule().point(torch.arange(18), 17)
    assert torch.allclose(grid, EDMSchedule().times(18))
    assert grid[0].item() == pytest.approx(80)
    assert grid[-1].item() == pytest.approx(0.002)


def test_schedules_of_consistency_training():
    """2303.01469: N from 2 to 151, mu from mu0^(s0/2) towards 1; 2310.14189: N doubles from 11 to 1281."""
    scales = [maths.ct_scales(k, 1000, 2, 150) for k in range(1001)]
    assert scales[0] == 2
    assert scales[-1] == 151
    assert scales == sorted(scales)
    assert scales[500] == math.ceil(math.sqrt(0.5 * (151**2 - 4) + 4) - 1) + 1 == 107
    assert maths.ct_decay(2, 2, 0.9) == pytest.approx(0.9)
    assert maths.ct_decay(151, 2, 0.9) == pytest.approx(0.9 ** (2 / 151))
    assert maths.ct_decay(2, 2, 0.9, "N-1") == pytest.approx(0.81)  # OpenAI's program
    assert maths.ct_decay(151, 2, 0.9, "N-1") == pytest.approx(0.9 ** (2 / 150))
    improved = [maths.ict_scales(k, 800, 10, 1280) for k in range(800)]
    assert sorted(set(improved)) == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert [improved.count(n) for n in (11, 21, 641)] == [100, 100, 100]


def test_times_of_improved_training_are_lognormal():
    """The share of each interval is the normal mass of ln sigma between its ends."""
    schedule, intervals = EDMSchedule(), 20
    index = maths.lognormal_index(schedule, torch.linspace(0, 1 - 1e-9, 200_001, dtype=torch.float64), intervals, -1.1, 2.0)
    ends = schedule.point(torch.arange(intervals + 1), intervals).log()
    normal = torch.distributions.Normal(torch.tensor(-1.1).double(), torch.tensor(2.0).double()).cdf(ends)
    expected = (normal[:-1] - normal[1:]) / (normal[0] - normal[-1])
    assert torch.allclose(torch.bincount(index, minlength=intervals).double() / 200_001, expected, atol=1e-4)


def test_times_are_drawn_as_often_as_their_weights_say(tiny):
    """The noisiest interval first; an interval of weight 0 never."""
    cm = objective(tiny, scales=4, time_weights=[3.0, 0.0, 1.0])
    t, r = cm.times(Draws(0, range(4000)), 0)
    grid = cm.schedule.point(torch.arange(4), 3)
    drawn = [((t == grid[k]) & (r == grid[k + 1])).sum().item() for k in range(3)]
    assert drawn[1] == 0
    assert drawn[0] + drawn[2] == 4000
    assert abs(drawn[0] - 3000) < 110  # four standard deviations


def test_the_students_own_times(tiny):
    """Those of the recipe, known to be right before training; at first the published ones."""
    cm = objective(tiny, scales=40)
    assert cm.model(cm.trained["student"].module, 0).sampler.times == pytest.approx([80, 1.38237], rel=1e-5)
    cm = objective(tiny, times="sigma:80,4,0.5")
    assert cm.model(cm.trained["student"].module, 0).sampler.times == (80, 4, 0.5)
    with pytest.raises(UsageError, match="^times sigma:4,80: noise levels must decrease"):
        objective(tiny, times="sigma:4,80")


def test_a_student_by_distillation_counts_its_times_on_the_grid_it_was_distilled_on(tiny, tmp_path):
    cm = objective(tiny, scales=10, times="index:0,4")
    student = cm.model(cm.trained["student"].module, 0)
    assert list(student.sampler.times) == EDMSchedule().point(torch.tensor([0, 4]), 9).tolist()
    save(student, tmp_path / "m")
    again = load(str(tmp_path / "m"))
    even = EDMSchedule().point(torch.tensor([0, 3, 6]), 9)
    assert torch.equal(again.sampler.times_for(again.denoiser.schedule, "few-step", 3), even)
    assert tiny.denoiser.schedule.grid == 40
    eased = objective(tiny, method="ect")
    assert eased.model(eased.trained["student"].module, 0).denoiser.schedule.grid == 40


def test_steps_of_the_teacher():
    """Heun's two evaluations integrate a slope that is linear in sigma exactly, Euler's one a constant one."""
    x, t, r = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.tensor([5.0, 3, 2, 1]).double(), torch.tensor([3.0, 2, 0.5, 0.1]).double()
    for power, expected in ((0, [True, True]), (1, [True, False]), (2, [False, False])):

        def denoiser(x, s, condition, power=power):
            return x - expand(s, x) * expand(s, x) ** power  # so that dx / dsigma is sigma^power

        true = x + expand((r ** (power + 1) - t ** (power + 1)) / (power + 1), x)
        near = [(maths.ode_step(denoiser, EDMSchedule(), x, t, r, None, solver) - true).abs().max() < 1e-12 for solver in ("heun", "euler")]
        assert near == expected


def test_several_steps_of_the_teacher_lie_evenly_on_the_grid():
    """At two to an interval it is called on the points of a grid twice as fine, and errs by a quarter on a normal distribution."""
    schedule, x, called = EDMSchedule(), torch.ones(1, 1, 1, 1, dtype=torch.float64), []

    def denoiser(x, s, condition):
        called.append(s.item())
        return x / (1 + expand(s, x) ** 2)

    t, middle, r = (schedule.at(torch.tensor([f], dtype=torch.float64)) for f in (0.6, 0.58, 0.56))
    exact = x * ((1 + r**2) / (1 + t**2)).sqrt()
    one, two = (maths.ode_steps(denoiser, schedule, x, t, r, NOTHING, "heun", steps) - exact for steps in (1, 2))
    assert called == pytest.approx([v.item() for v in (t, r, t, middle, middle, r)], rel=1e-12)
    assert (one / two).item() == pytest.approx(4, rel=0.1)


def test_huber_is_between_the_norms():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert distance("huber", x, torch.zeros(2, 2), 1.0).tolist() == pytest.approx([26**0.5 - 1, 0])
    assert distance("huber", x, torch.zeros(2, 2), 0.0).tolist() == pytest.approx([5, 0])
    zero = torch.zeros(1, 2, requires_grad=True)
    distance("huber", zero, torch.zeros(1, 2), 0.0).sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize(("method", "pairs"), [("cd", 17), ("ct", 1), ("ict", 10)])
def test_pairs_of_times_are_neighbours_on_the_grid(method, pairs, tiny):
    cm = objective(tiny, method=method, steps=100)
    t, r = cm.times(Draws(0, range(500)), 0)
    grid = EDMSchedule().point(torch.arange(pairs + 1), pairs)
    place = torch.searchsorted(-grid, -t, right=False)
    assert torch.equal(grid[place], t)
    assert torch.equal(grid[place + 1], r)
    assert place.max() == pairs - 1


def test_times_of_easy_tuning_come_nearer_stage_by_stage(tiny):
    cm = objective(tiny, method="ect", steps=100, stages=4)
    ratios = []
    for step in (0, 24, 25, 99):
        t, r = cm.times(Draws(0, range(100)), step)
        ratios.append((r / t)[t > 10].mean().item())
    assert ratios[0] == ratios[1] == pytest.approx(0.5, abs=0.01)
    assert ratios[2] == pytest.approx(0.75, abs=0.01)
    assert ratios[3] == pytest.approx(1 - 1 / 16, abs=0.01)


def test_the_boundary_is_the_identity(tiny):
    """f(x, sigma_min) = x, whatever the network says."""
    cm = objective(tiny)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        out = cm.trained["student"].module(x, torch.full((4,), 0.002), of(torch.arange(4)))
    assert (out - x).abs().max() < 1e-6


@pytest.mark.parametrize(("method", "over"), [("cd", "N"), ("ct", "N"), ("ct", "N-1")])
def test_the_target_follows_the_student_once_a_step(method, over, tiny):
    only = {"decay_over": over} if method == "ct" else {}
    cm = objective(tiny, method=method, target_decay=0.75, batch_size=4, accumulate=2, steps=10, **only)
    turns = [cm.turns(1, Draws(0, part)) for part in (range(4, 6), range(6, 8))]
    before = cm.kept["target"].network.unet.conv_out.weight.clone()
    for turn in turns:
        next(turn)
    with torch.no_grad():
        cm.trained["student"].module.network.unet.conv_out.weight.add_(1.0)  # the engine's step
    for turn in turns:
        assert next(turn, None) is None
    assert torch.equal(cm.kept["target"].network.unet.conv_out.weight, before)
    cm.after(1)
    decay = 0.75 if method == "cd" else 0.75 ** (2 / (cm.scales(1) - (over == "N-1")))
    assert torch.allclose(cm.kept["target"].network.unet.conv_out.weight - before, torch.full_like(before, 1 - decay), atol=1e-5)


def test_student_and_target_drop_the_same(tiny):
    """With equal weights and both times alike their estimates are equal, dropout and all."""
    network = dict(channels=[16, 16], attention=[False, False], groups=4, head=8)
    cm = objective(tiny, method="ict", teacher=None, dropout=0.5, metric="l1", weighting="uniform", network=network)
    x, noise, t = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.full((4,), 1.0)
    torch.manual_seed(3)
    first = cm.trained["student"].module(x, t, of(torch.arange(4)))
    assert not torch.equal(first, cm.trained["student"].module(x, t, of(torch.arange(4))))  # it does drop
    assert cm.errors(x, noise, t, t, of(torch.arange(4))).abs().max() == 0


def test_guided_teachers(tiny):
    cm = objective(tiny, guidance_scale=2.0)
    x, t, labels = torch.randn(2, 3, 16, 16), torch.full((2,), 3.0), torch.tensor([1, 2])
    with torch.no_grad():
        cond, uncond = tiny.denoiser(x, t, of(labels)), tiny.denoiser(x, t, of(torch.full((2,), 10)))
        assert torch.allclose(cm.real(x, t, of(labels)), uncond + 2 * (cond - uncond), atol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "ect", "scales": 5}, "--scales: not a key of method ect"),
        ({"method": "ct", "time_weights": [1.0]}, "--time-weights: not a key of method ct"),
        ({"scales": 4, "time_weights": [1.0, 2.0]}, "time_weights has 2 numbers, and 4 scales have one interval less"),
        ({"scales": 3, "time_weights": [0.0, 0.0]}, "time_weights are all 0"),
        (
            {"method": "ect", "scales": 5, "solver": "euler", "huber_c": 1, "metric": "l1"},
            "(?s)scales: not a.*solver: not a.*huber_c is for",
        ),
        ({"method": "cd", "stages": 5}, "--stages: not a key of method cd"),
        ({"method": "ct", "guidance_scale": 2}, "--guidance-scale: not a key of method ct"),
        ({"method": "ct", "scales": 20, "scales_end": 10}, "scales_end 10 is below scales 20"),
        ({"method": "ct", "solver": "euler"}, "--solver: not a key of method ct"),
        ({"method": "cd", "p_mean": 0}, "--p-mean: not a key of method cd"),
        ({"method": "ct", "target_decay": 0}, "target-decay: input should be greater than 0"),
        ({"metric": "l2", "huber_c": 0.1}, "huber_c is for metric=huber"),
        ({"method": "ct", "teacher": "tiny", "network.layers": 2}, "network is for a student without a teacher"),
        ({"method": "ct", "network.dropout": 0.1}, "the key dropout sets it"),
        ({"lpips_weights": "x"}, "lpips_weights is for metric=lpips"),
        ({"lpips_pooling": "average"}, "lpips_pooling is for metric=lpips"),
        ({"lpips_resize": "below-256", "metric": "l2"}, "lpips_resize is for metric=lpips"),
        ({"method": "cd", "decay_over": "N-1"}, "--decay-over: not a key of method cd"),
        ({"method": "ict", "decay_over": "N-1"}, "--decay-over: not a key of method ict"),
    ],
)
def test_options_of_other_methods_are_refused(given, says):
    with pytest.raises(UsageError, match=says):
        resolve(CMConfig, flags=given)


def test_defaults_are_the_methods():
    assert (options("cm").teacher, options("cm").scales, options("cm").target_decay) == ("digits", 18, 0.95)
    ct = options("cm", method="ct")
    assert (ct.teacher, ct.scales, ct.scales_end, ct.target_decay) == (None, 2, 150, 0.9)
    assert options("cm", method="ict").weighting == "inverse-step"
    assert options("cm", **options("cm", method="ict").model_dump()) == options("cm", method="ict")


def test_students_are_no_teachers(tiny):
    """Their estimates are no E[x0 | x]: the ODE would go elsewhere."""
    student = tiny.copy(sampler=Sampler.consistency([80.0]))
    for method in ("cd", "ect"):
        with pytest.raises(UsageError, match="--teacher tiny: a student"):
            consistency(options("cm", teacher="tiny", method=method), student, open_images("digits"))


def test_held_out_images_are_never_seen(tiny):
    cm = objective(tiny, holdout=0.5, batch_size=7)
    _, held_out = split(cm.images, 0.5, 0)
    seen = {cm.examples.seen[cm.order[i]] for i in range(4000)}
    assert len(held_out) == 898
    assert not seen & set(held_out)
    assert len(seen) == 1797 - 898
    with pytest.raises(UsageError, match="leaves none of 1797 images"):
        objective(tiny, holdout=0.9999)


def test_a_null_class_that_was_not_learned_is_not_kept(tiny):
    cm = objective(tiny, label_dropout=0)
    assert cm.model(cm.trained["student"].module, 0).conditioner.null_label is None
    cm = objective(tiny, label_dropout=0.5)
    assert cm.model(cm.trained["student"].module, 0).conditioner.null_label == 10


def test_labels_are_dropped(tiny):
    cm = objective(tiny, label_dropout=0.25)
    seen = []
    cm.errors = lambda x, noise, t, r, condition: seen.append(condition) or x.new_zeros(len(x))
    next(cm.turns(0, Draws(0, range(2000))))
    assert (labels_of(seen[0]) == 10).double().mean() == pytest.approx(0.25, abs=0.03)


def test_students_of_easy_tuning_are_saved_with_diffusers_scalings(tiny):
    cm = objective(tiny, method="ect")
    student = cm.model(cm.trained["student"].module, 0)
    assert student.denoiser.parameterisation == "consistency"
    assert cm.trained["student"].module.parameterisation == "edm"
    x, t, labels = torch.randn(2, 3, 16, 16), torch.full((2,), 1.38), torch.tensor([1, 2])
    with torch.no_grad():
        assert (student.denoiser(x, t, of(labels)) - cm.trained["student"].module(x, t, of(labels))).abs().max() < 5e-3


@pytest.mark.parametrize("method", ["cd", "ict", "ect"])
def test_all_weights_learn_in_half_precision(method, tiny):
    """The target's call without gradient must not leave casts that the student's call then uses."""
    options = {} if method != "ict" else dict(teacher=None, network=dict(channels=[8, 16], attention=[False, True], groups=4, head=8))
    cm = objective(tiny, method=method, **options)
    torch.nn.init.normal_(cm.trained["student"].module.network.unet.conv_out.weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next(cm.turns(0, Draws(0, range(2))))
    loss.value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cm.trained["student"].module.parameters() if p.ndim == 4)


def test_images_that_do_not_fit_are_refused(tiny, tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "x.png")
    with pytest.raises(UsageError, match="2 classes, the teacher has 10"):
        consistency(options("cm", teacher="tiny"), tiny.copy(), open_images(str(tmp_path), 16))
    with pytest.raises(UsageError, match=r"images of \(3, 8, 8\), the teacher's are \(3, 16, 16\)"):
        consistency(options("cm", teacher="tiny"), tiny.copy(), open_images(str(tmp_path), 8))

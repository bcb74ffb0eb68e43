"""Progressive distillation's mathematics: the paper's numbers, and what a perfect teacher makes exact."""

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from distill_cli.data.shapes import Shapes
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import PARAMETERISATIONS, MixtureDenoiser, NetworkDenoiser, Scales
from distill_cli.diffusion.guidance import guided
from distill_cli.diffusion.losses import distance
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule, add_noise, expand
from distill_cli.diffusion.solvers import ddim
from distill_cli.errors import UsageError
from distill_cli.methods.pd import maths
from distill_cli.methods.pd.config import PDConfig
from distill_cli.methods.pd.objective import open
from distill_cli.models import load
from distill_cli.pairs.store import PairStore
from distill_cli.runs import Run
from distill_cli.training import checkpoint
from distill_cli.training.engine import Engine
from distill_cli.training.job import Job
from tests.methods.test_consistency import Raw

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {
    "edm": EDMSchedule(),
    "table": TableSchedule.from_config(TABLE),
    "zero snr": TableSchedule.from_config(TABLE | {"rescale_betas_zero_snr": True}),
    "flow": FlowSchedule(),
}
SHAPE = (2, 3, 3)


def mixture(schedule):
    means = Draws(3, range(3)).normal("label", SHAPE).double()
    return MixtureDenoiser(means, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.3, schedule)


def test_a_table_has_only_so_many_times():
    """Two steps at one time would divide nothing by nothing."""
    maths.check_falling(maths.grid(SCHEDULES["table"], 32, "angle"), "angle")
    with pytest.raises(UsageError, match="first_steps 512: the table has too few times for spacing angle"):
        maths.check_falling(maths.grid(SCHEDULES["table"], 512, "angle"), "angle")


def noises(count=4):
    return Draws(1, range(count)).normal("prior", SHAPE).double()


def columns(times, k, count=4):
    return (times[j].expand(count) for j in (k, k + 1, k + 2))


def step(schedule, x, x0, t, r):
    """One DDIM step, as the paper writes it (eq. 8)."""
    (a, s), (a1, s1) = maths.coefficients(schedule, t), maths.coefficients(schedule, r)
    return expand(a1, x) * x0 + expand(s1 / s, x) * (x - expand(a, x) * x0)


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_golden(metric, golden):
    """The paper's target and weights: to 1e-8 with the reference program's float32 times and scalings, to 1e-4 with float64's."""
    g = golden("consistency")
    h = g.header
    schedule, scales = EDMSchedule(h["sigma_min"], h["sigma_max"], h["rho"]), Scales(h["sigma_data"], h["sigma_min"])
    high, low = h["sigma_max"] ** (1 / h["rho"]), h["sigma_min"] ** (1 / h["rho"])
    theirs = [(high + (g["index"] + k) / h["num_scales"] * (low - high)) ** h["rho"] for k in (0, 0.5, 1)]
    network = Raw(g["student.weight"], g["student.bias"])

    def errors(times, estimate):
        t, middle, end = (time.double() for time in times)
        x = add_noise(schedule, g["x"], g["noise"], t)
        return distance(metric, estimate(x), maths.target(g.mixture("teacher", schedule), schedule, x, t, middle, end), 0.0).detach()

    def single(x):
        t, norm = expand(theirs[0], x.float()), expand(theirs[0], x.float()) ** 2 + scales.sigma_data**2
        return scales.sigma_data**2 / norm * x + t * scales.sigma_data / norm**0.5 * network(1 / norm**0.5 * x, 250 * theirs[0].log(), None)

    assert (errors(theirs, single) / g[f"pd.{metric}.uniform"] - 1).abs().max() < 1e-8
    ours = [schedule.point(g["index"] + k, h["num_scales"]) for k in (0, 0.5, 1)]
    found = errors(ours, lambda x: NetworkDenoiser(network, schedule, "edm", scales)(x, ours[0]))
    assert (maths.weight("snr+1", schedule, ours[0]) * found / g[f"pd.{metric}.snr+1"] - 1).abs().max() < 1e-4


@pytest.mark.parametrize("spacing", ["schedule", "angle"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_by_the_target_arrives_where_two_of_the_teacher_do(name, spacing):
    """So a student that equals the target samples, in half the steps, the teacher's own images."""
    schedule = SCHEDULES[name]
    teacher, x = mixture(schedule), schedule.prior_std * noises()
    times = maths.grid(schedule, 8, spacing)
    reached = ddim(teacher, schedule, x, times[:-1])
    for k in range(0, 8, 2):
        t, middle, end = columns(times, k)
        x = step(schedule, x, maths.target(teacher, schedule, x, t, middle, end), t, end)
    assert (x - reached).abs().max() < 1e-10 * reached.abs().max()


@pytest.mark.parametrize("row", [row for row in PARAMETERISATIONS if row != "consistency"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_row_of_the_table_teaches_the_same_target(name, row):
    """A network of any parameterisation whose estimate is the mixture's: eps divides by alpha, so it is asked short of alpha 0."""
    schedule = SCHEDULES[name]
    exact = mixture(schedule)

    class Network(torch.nn.Module):
        def forward(self, x, time, condition):
            return self.owner.prediction(self.point, time, exact(self.point, time))

    network = Network()
    teacher = NetworkDenoiser(network, schedule, row, time_input="t")
    network.__dict__["owner"] = teacher

    def told(x, t, condition):
        network.point = x
        return teacher(x, t, condition)

    t, middle, end = columns(maths.grid(schedule, 8, "angle")[1:], 0)
    x = add_noise(schedule, exact.means[:1].expand(4, *SHAPE), noises(), t)
    ours, theirs = maths.target(told, schedule, x, t, middle, end), maths.target(exact, schedule, x, t, middle, end)
    assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_target_of_small_steps_is_the_posterior_mean(name):
    """With ever smaller steps x~ tends to the teacher's own estimate, in first order: what makes halving stable."""
    schedule = SCHEDULES[name]
    teacher, x = mixture(schedule), noises()
    errors = []
    for steps in (256, 512, 1024):
        t, middle, end = columns(maths.grid(schedule, steps, "angle")[steps // 4 :], 0)
        x_t = add_noise(schedule, teacher.means[:1].expand(4, *SHAPE), x, t)
        errors.append((maths.target(teacher, schedule, x_t, t, middle, end) - teacher(x_t, t)).abs().max().item())
    if schedule.bins is None:
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
        assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)
    assert errors[1] < 0.02


def test_the_last_target_is_the_teachers_last_estimate():
    schedule = EDMSchedule()
    teacher, x = mixture(schedule), noises()
    t, middle, end = columns(maths.grid(schedule, 4, "angle"), 2)
    assert end[0] == maths.END
    last = teacher(step(schedule, x, teacher(x, t), t, middle), middle)
    assert torch.equal(maths.target(teacher, schedule, x, t, middle, end), last)


@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_of_one_batch_have_times_of_their_own(name):
    schedule = SCHEDULES[name]
    teacher, x = mixture(schedule), noises()
    times = maths.grid(schedule, 8, "angle")
    index = torch.tensor([0, 2, 4, 6])
    together = maths.target(teacher, schedule, x, times[index], times[index + 1], times[index + 2])
    for k, i in enumerate(index):
        alone = maths.target(teacher, schedule, x[k : k + 1], *(times[i + j].view(1) for j in range(3)))
        assert torch.allclose(together[k : k + 1], alone, rtol=0, atol=1e-12)


def test_float32_at_large_noise():
    """The weighted mean loses nothing at sigma 80, where the paper's difference of two points loses digits."""
    schedule = EDMSchedule()
    exact = mixture(schedule)

    def single(x, t, condition):
        return exact(x.double(), t.double(), condition).float()

    x = 80 * noises()
    t, middle, end = columns(maths.grid(schedule, 256, "schedule"), 0)
    wide = maths.target(exact, schedule, x, t, middle, end)
    assert (maths.target(single, schedule, x.float(), t, middle, end) - wide).abs().max() < 1e-6


def test_weights():
    """snr+1 is the plain error of the velocity in a variance-preserving table, truncated-snr that of x0 or of the noise, the larger."""
    schedule = SCHEDULES["zero snr"]
    t = torch.tensor([0.0, 300.0, 800.0, 999.0], dtype=torch.float64)
    a, s = schedule.alpha(t), schedule.sigma(t)
    assert torch.allclose(maths.weight("snr+1", schedule, t), s**-2)
    assert torch.allclose(maths.weight("truncated-snr", schedule, t), torch.maximum((a / s) ** 2, torch.ones(4)))
    assert maths.weight("snr+1", schedule, t)[-1] == 1


def test_grids():
    """The student's times are every second one of the teacher's; the angle's are the paper's cosine schedule."""
    angle = maths.grid(EDMSchedule(), 4, "angle")
    assert torch.allclose(angle[1:4], torch.tensor([2.4139, 1.0, 0.4142], dtype=torch.float64), rtol=0.03)
    assert angle[0] == 80
    for schedule in SCHEDULES.values():
        for spacing in ("schedule", "angle"):
            times = maths.grid(schedule, 16, spacing)
            assert times[0] == schedule.t_max
            assert (times.diff() < 0).all()
    assert maths.grid(SCHEDULES["table"], 16, "schedule")[:-1:4].tolist() == [999, 749, 499, 249]  # diffusers' trailing times of 4 steps


def test_rounds():
    assert maths.rounds(32, 1) == [16, 8, 4, 2, 1]
    assert maths.rounds(12, 3) == [6, 3]
    for first, last, said in [(18, 4, "16 or 32"), (4, 4, "8"), (3, 4, "8"), (10, 1, "8")]:
        with pytest.raises(UsageError) as caught:
            maths.rounds(first, last)
        assert said in caught.value.hint


# the objective


def options(**changes):
    given = dict(teacher="tiny", data="digits", first_steps=8, last_steps=2, steps=6, batch_size=4, device="cpu", lr=1e-3, ema_halflife=20)
    return PDConfig(**given | dict(lr_schedule="constant", label_dropout=0.0) | changes)


def objective(tmp_path, **changes):
    opened = open(options(out=tmp_path / "run", **changes), Job("pd"))
    opened.prepare(torch.device("cpu"), Run(tmp_path / "run"))
    return opened


def only(turns):
    (loss,) = turns
    return loss


@pytest.mark.parametrize("loss", ["truncated-snr", "snr+1", "huber"])
def test_the_loss_is_the_distance_to_two_steps_of_the_teacher(loss, tmp_path, tiny):
    """Written out for the digits of a step: two Euler steps in sigma, solved for x0."""
    pd = objective(tmp_path, loss=loss)
    pd.before(0)
    draws = Draws(0, range(4))
    found = only(pd.turns(0, draws))
    x, condition = pd.examples.batch(draws, torch.device("cpu"))
    noise, k = draws.normal("noise", (3, 16, 16)), (draws.uniform("time") * 4).long()
    s, s1, s2 = (maths.grid(EDMSchedule(), 8, "angle")[2 * k + j].clamp(min=0).float() for j in (0, 1, 2))
    z = x + expand(s, x) * noise
    with torch.no_grad():
        first = tiny.denoiser(z, s, condition)
        z1 = first + expand(s1 / s, x) * (z - first)
        second = tiny.denoiser(z1, s1, condition)
        z2 = second + expand(s2 / s1, x) * (z1 - second)
        wanted = (z2 - expand(s2 / s, x) * z) / (1 - expand(s2 / s, x))
        error = (first - wanted).flatten(1)  # the student begins as the teacher
    c = 0.00054 * 768**0.5
    by = {
        "truncated-snr": (s**-2).clamp(min=1) * error.square().mean(1),
        "snr+1": (s**-2 + 1) * error.square().mean(1),
        "huber": ((error.square().sum(1) + c * c).sqrt() - c) / 768**0.5,
    }
    assert found.value.item() == pytest.approx(by[loss].mean().item(), rel=1e-3)
    assert found.metrics["x0_error"].item() == pytest.approx(error.square().mean().item(), rel=1e-3)
    assert found.metrics["student_steps"] == 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two rounds, 8 -> 4 -> 2 steps, the first of 4 optimizer steps and the second of 2."""
    folder = tmp_path_factory.mktemp("pd") / "run"
    AcceleratorState._reset_state(True)
    pd = open(options(out=folder, shares=[2, 1]), job := Job("pd"))
    engine = Engine(pd.config, pd)
    job.begin(engine)
    engine.train()
    return engine


def test_the_average_of_a_round_is_the_teacher_of_the_next(trained, tiny):
    folder = trained.run.folder
    first = load(str(folder), 4).denoiser.state_dict()
    last = load_file(checkpoint.path_of(folder / "checkpoints", 6) / "teacher.safetensors")
    before = load_file(checkpoint.path_of(folder / "checkpoints", 4) / "teacher.safetensors")
    start = tiny.denoiser.state_dict()
    assert all(torch.equal(last[name], first[name]) for name in first)
    assert all(torch.equal(before[name], start[name]) for name in start)
    assert any(not torch.equal(first[name], start[name]) for name in start)


def test_the_student_of_each_round_is_taken_by_its_steps(trained):
    folder = str(trained.run.folder)
    grid = maths.grid(EDMSchedule(), 8, "angle")
    for steps, stride in ((4, 2), (2, 4)):
        student = load(folder, steps)
        assert student.sampling.steps == steps
        assert student.sampler.times == pytest.approx(grid[:-1:stride].tolist())
        assert (student.denoiser.parameterisation, student.lineage.method) == ("edm", "pd")
    with pytest.raises(UsageError, match="--steps 3: .* has students of 4, 2 steps"):
        load(folder, 3)
    with pytest.raises(UsageError, match="this student takes 2 steps"):
        load(folder).with_defaults(None, 5, None)


def test_the_comparison_has_the_teacher_and_the_students_of_few_steps(trained):
    rows = trained.objective.compared(trained.objective.model(trained.ema.network, 6))
    assert {name: sampling.evaluations for name, (_, sampling) in rows.items()} == {
        "teacher, 8 steps": 8, "student, 4 steps": 4, "student, 2 steps": 2,
    }  # fmt: skip
    (teacher, asked) = rows["teacher, 8 steps"]
    walked = teacher.sample(Draws(5, range(2)), torch.tensor([3, 4]), asked)
    label, x = Condition({"class_labels": torch.tensor([3, 4])}), 80 * Draws(5, range(2)).normal("prior", (3, 16, 16))
    with torch.no_grad():
        by_hand = ddim(load("tiny").denoiser, EDMSchedule(), x, maths.grid(EDMSchedule(), 8, "angle")[:-1], label)
    assert (walked - by_hand.clamp(-1, 1)).abs().max() < 1e-5


def test_guidance_goes_into_the_student_of_the_first_round(tmp_path, tiny):
    """The later rounds' teacher is a student, whose guidance is inside."""
    pd = objective(tmp_path, guidance_scale=2.0, loss="snr+1")
    draws = Draws(0, range(4))
    pd.before(0)
    first = only(pd.turns(0, draws)).metrics["x0_error"]
    assert pd.calls().forwards == [("teacher", 8)] * 2
    pd.before(4)
    x, condition = pd.examples.batch(draws, torch.device("cpu"))
    for number, scale in ((0, 2.0), (1, 1.0)):
        teacher = guided(tiny.denoiser, scale, tiny.conditioner.null)
        pd.number = number
        n = pd.rounds[number]
        t, middle, end = (pd.times(number)[2 * (draws.uniform("time") * n).long() + j].float() for j in (0, 1, 2))
        noisy = add_noise(pd.schedule, x, draws.normal("noise", (3, 16, 16)), t)
        with torch.no_grad():
            wanted = maths.target(teacher, pd.schedule, noisy, t, middle, end, condition)
            error = (tiny.denoiser(noisy, t, condition) - wanted).square().mean()
        assert only(pd.turns(0, draws)).metrics["x0_error"].item() == pytest.approx(error.item(), rel=1e-4)
    assert pd.model(pd.trained["student"].module, 0).conditioner.null is None
    assert first > 0
    with pytest.raises(UsageError, match="goes into the student, which has no null class"):
        open(options(out=tmp_path / "other", guidance_scale=2.0, label_dropout=0.1), Job("pd"))


def test_pairs_are_what_noise_is_added_to(tmp_path, tiny_pairs):
    pd = objective(tmp_path, data=str(tiny_pairs))
    draws = Draws(0, range(4))
    x, condition = pd.examples.batch(draws, torch.device("cpu"))
    stored = PairStore(tiny_pairs).batch([pd.source.seen[pd.order[i]] for i in range(4)])
    assert torch.equal(x, stored["x0"])
    assert torch.equal(condition.parts["class_labels"], stored["label"])


def test_latents_of_captioned_pictures(tmp_path):
    """They are encoded once; the student's own times are diffusers' trailing ones."""
    images = Shapes()
    pd = objective(tmp_path, teacher="tiny-sd", data="shapes", guidance_scale=1.0)
    draws = Draws(0, range(2))
    x, condition = pd.examples.batch(draws, torch.device("cpu"))
    positions = [pd.source.seen[pd.order[i]] for i in range(2)]
    mean, spread = pd.teacher.codec.encode(images.batch(positions, Draws(0, positions))[0])
    assert (x - (mean + spread * draws.normal("augment", pd.teacher.shape))).abs().max() < 1e-4
    said = pd.teacher.conditioner.encode(images.captions(positions))
    assert (condition.parts["encoder_hidden_states"] - said.parts["encoder_hidden_states"]).abs().max() < 1e-2  # stored in half precision
    student = pd.model(pd.trained["student"].module, 0)
    assert (student.sampling.solver, student.sampler.times) == ("ddim", (999, 749, 499, 249))
    assert student.scheduler["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(first_steps=12), "halving does not lead to 2 steps"),
        (dict(shares=[1, 2, 3]), "3 numbers for 2 rounds"),
        (dict(steps=1), "too few for 2 rounds"),
        (dict(teacher="tiny-sd"), "the teacher's are"),
    ],
)
def test_refusals(changes, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        open(options(out=tmp_path / "run", **changes), Job("pd"))


def test_a_student_is_no_teacher(trained, tmp_path):
    with pytest.raises(UsageError, match="a student") as caught:
        open(options(out=tmp_path / "run", teacher=str(trained.run.folder)), Job("pd"))
    assert "its own teacher" in caught.value.hint

"""Classifiers of noised data: what they are trained on, what they are refused for, and where their guidance goes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill_cli.cli.common import compare
from distill_cli.config import SampleConfig
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.guidance import Guided, Steered, Unconditional
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from distill_cli.errors import UsageError
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.models import classifier, formats, load, noisy_classifier
from distill_cli.models.noisy_classifier import ClassifierGuide, NoisyClassifier, NoisyInfo, described
from distill_cli.models.pixel import create
from distill_cli.models.sampler import Sampling
from distill_cli.models.steering import led, led_by
from distill_cli.training import identity, rehearsal
from tests.cli.test_bad_input import one_line
from tests.contracts.running import lines

DIGITS = tuple(str(i) for i in range(10))
INFO = NoisyInfo((3, 16, 16), DIGITS, 8, "digits", model="tiny", schedule=described(EDMSchedule()))
DMD = ("dmd", "--teacher", "tiny", "batch_size=4", "--steps", 4, "lr=1e-3", "warmup_steps=0", "log_every=1", "save_every=2",
       "sample_every=0", "device=cpu", "--classifier-guidance", "c", "--classifier-scale", 3)  # fmt: skip


def made(info=INFO):
    torch.manual_seed(0)
    network = NoisyClassifier(info).eval().requires_grad_(False)
    network.head.weight.mul_(20)
    return network


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "c-classifier"
    made().save(folder)
    return folder


def config(folder, **more):
    return SampleConfig(classifier_guidance=str(folder), **more)


def test_schedules_are_told_apart():
    linear, cosine = (TableSchedule.from_config({"beta_schedule": kind}) for kind in ("linear", "squaredcos_cap_v2"))
    every = [EDMSchedule(), EDMSchedule(sigma_max=40), linear, cosine, FlowSchedule(), FlowSchedule(3.0)]
    assert len({json.dumps(described(each), sort_keys=True) for each in every}) == len(every)
    assert described(EDMSchedule(grid=18)) == described(EDMSchedule())
    moved = replace(linear, alphas_cumprod=linear.alphas_cumprod + 1e-12)
    assert described(moved) == described(linear)


def test_it_is_saved_with_what_it_was_trained_for(kept, tmp_path):
    again = noisy_classifier.load(str(kept))
    assert again.info == INFO
    x, ones = torch.randn(4, 3, 16, 16), torch.ones(4)
    assert torch.allclose(again(x, ones, 2 * ones), made()(x, ones, 2 * ones), rtol=5e-3, atol=5e-3)
    assert (again(x, ones, 2 * ones) - again(x, ones, 0.1 * ones)).abs().max() > 0.1  # it is told the level
    rehearsal.rehearse(lambda network: network, again, "", tmp_path / "r")  # it is read again by its own reader


def test_the_shift_of_an_estimate_stays_bounded():
    """sigma^2 / alpha times the gradient, at levels from 1 to 80: a plain network's grows by 80."""
    network, x = made(), torch.randn(8, 3, 16, 16)
    guide = ClassifierGuide(network, EDMSchedule(), 1.0, "c", None)
    condition = Condition({guide.part: guide.told(torch.arange(8), ())})
    shifts = []
    for sigma in (1.0, 10.0, 80.0):
        _, gradient = guide(lambda x, t, c: x, sigma * x, torch.full((8,), sigma), condition)
        shifts.append((sigma**2 * gradient).norm().item())
    assert max(shifts) < 10 * shifts[0]


def test_the_gradient_is_that_of_the_log_probability():
    network, generator = made(), torch.Generator().manual_seed(1)
    x, way = (torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2))
    guide, t = ClassifierGuide(network, EDMSchedule(), 1.0, "c", None), torch.tensor([0.1, 0.5, 2.0, 9.0])
    with torch.no_grad():
        _, gradient = guide(lambda x, t, c: x, x, t, Condition({guide.part: guide.told(torch.tensor([3, 1, 4, 10]), ())}))
    network.double()

    def score(x):
        return network(x.double(), torch.ones(4).double(), t.double()).log_softmax(1)[range(4), [3, 1, 4, 0]]

    slope = (score(x.double() + 1e-5 * way.double()) - score(x.double() - 1e-5 * way.double())) / 2e-5
    found = (gradient * way).flatten(1).sum(1).double()
    assert torch.allclose(found[:3], slope[:3], rtol=1e-3, atol=1e-4)
    assert found[3] == 0  # the null label asks for nothing


def test_without_a_guidance_scale_the_unconditional_estimate_is_led(tiny, kept, capsys):
    model = led(tiny, config(kept, classifier_scale=2.0))
    assert "scale 2 leads the unconditional estimate of tiny" in capsys.readouterr().err
    usual, asked = model.with_defaults(None, 3, None), model.with_defaults(None, 3, 4.0)
    assert (usual.guidance_scale, usual.evaluations, asked.evaluations) == (0, 5, 10)
    one, other = model.guided(usual), model.guided(asked)
    assert (type(one), type(one.denoiser), type(other.denoiser)) == (Steered, Unconditional, Guided)
    labels, draws = torch.tensor([3, 5]), Draws(0, range(2))
    made_, plain = model.sample(draws, labels, usual), tiny.sample(draws, torch.tensor([10, 10]), Sampling(steps=3))
    assert (made_ - plain).abs().max() > 1e-3
    none = model.with_guides()
    none.guides[0].scale = 0.0
    assert torch.allclose(none.sample(draws, labels, usual), plain, atol=1e-6)  # without its guide it is the null class
    assert tiny.guides == ()


def test_a_student_is_told_its_class_and_has_no_guide(tiny, kept):
    model = led(tiny, config(kept))
    assert model.conditioner(torch.tensor([3])).seen.parts.keys() == {"class_labels"}
    assert model.conditioner.taught([3]).guides == ()
    assert model.weights_hash() == tiny.weights_hash()
    assert set(model.guidance()) == {"classifier_guidance", "classifier_scale"}


def test_a_model_without_classes_counts_labels_by_the_classifiers(tiny, kept, tmp_path):
    blank = replace(tiny, conditioner=replace(tiny.conditioner, classes=(), null_label=None))
    model = led(blank, config(kept))
    assert model.with_defaults(None, 2, None).guidance_scale == 1
    assert model.conditioner.labels(3, [7, 2]).tolist() == [7, 2, 7]
    assert model.conditioner.labels(12).tolist() == [*range(10), 0, 1]
    assert model.conditioner.named(7) == {"label": 7, "class": "7"}
    assert model.conditioner(torch.tensor([7])).parts["guide class"].argmax().item() == 7
    assert not model.conditioner(torch.tensor([7])).seen
    taught = model.conditioner.taught([7])
    assert (taught.learned, taught.asked) == (None, ())
    with pytest.raises(UsageError, match="no classes to tell a student"):
        led(blank, config(kept), teaching=True)
    teacher, asked = led(blank, config(kept, classes=[7]), teaching=True), Sampling(solver="heun", steps=2)
    shape = {"resolution": 16, "channels": [8, 8], "attention": [False, False], "groups": 4, "head": 8, "classes": []}
    network = create(**shape, schedule=EDMSchedule(), parameterisation="edm", lineage=tiny.lineage)
    teacher = replace(network, conditioner=teacher.conditioner)
    student = replace(network, conditioner=teacher.conditioner.taught([7]))
    compare({"teacher": (teacher, asked), "student": (student, asked)}, DMDConfig(device="cpu"), tmp_path / "c.png", [7])
    assert (tmp_path / "c.png").exists()
    with pytest.raises(UsageError, match="no class 10"):
        led(blank, config(kept, classes=[10]))


def test_prompts_have_a_class_each_in_turn(kept):
    latent = load("tiny-sd")
    info = replace(INFO, shape=latent.shape, schedule=described(latent.denoiser.schedule))
    model = led(latent, config(save(info, kept.parent / "sd"), classes=[4, 2]))
    model = model.with_prompts(["a", "b", "c"])
    assert model.conditioner(torch.arange(3)).parts["guide class"].argmax(1).tolist() == [4, 2, 4]
    assert model.guidance()["classifier_classes"] == "4,2"  # no label of a model of prompts says it
    assert model.with_defaults(None, 2, None).guidance_scale == 0
    images = model.sample(Draws(0, range(2)), model.conditioner.labels(2, [4, 2]), model.with_defaults(None, 2, None))
    assert images.isfinite().all()


def save(info, folder):
    made(info).save(folder)
    return folder


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"shape": (3, 8, 8)}, "of data of shape (3, 8, 8), those of tiny are (3, 16, 16)"),
        ({"classes": DIGITS[::-1]}, "its classes are 9, 8"),
        ({"schedule": described(FlowSchedule())}, "of another noise schedule (flow of tiny) than tiny's"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(wrong, says, tiny, tmp_path):
    with pytest.raises(UsageError) as error:
        led(tiny, config(save(replace(INFO, **wrong), tmp_path / "c")))
    assert says in error.value.message


def test_bad_input_is_one_line(distill, kept, tmp_path, tiny):
    shutil.copytree(kept, tmp_path / "c")
    sample = ("sample", "--model", "tiny", "--num", 2, "--out", "s")
    one_line(distill(*sample, "--classifier-guidance", "digits-x"), 2, "--classifier-guidance digits-x: no classifier")
    one_line(distill(*sample, "--classifier-guidance", "digits"), 2, "digits: a classifier of clean pictures")
    classifier.load("digits").save(tmp_path / "clean")
    one_line(distill(*sample, "--classifier-guidance", "clean"), 2, "clean: a classifier of clean pictures", "distill classifier --noisy")
    one_line(distill(*sample, "--classifier-scale", "2"), 2, "classifier_scale needs classifier_guidance")
    one_line(distill("classifier", "--model", "tiny", "--out", "o"), 2, "model is for noisy=true")
    one_line(distill("evaluate", "--model", "tiny", "--classifier", "c", "--num", 2, "--out", "e"), 2, "a classifier of noised pictures")
    one_line(distill("cm", "--method", "ect", "--classifier-guidance", "c"), 2, "not a key of method ect")
    assert distill(*DMD[:3], "batch_size=2", "--steps", 1, "sample_every=0", "device=cpu", "--out", "student").code == 0
    one_line(distill("sample", "--model", "student", "--num", 2, "--classifier-guidance", "c"), 2, "is a student", "guide its teacher")


def test_pairs_and_samples_are_of_their_guides(distill, kept, tmp_path):
    shutil.copytree(kept, tmp_path / "c")
    led_, guide = ("--teacher", "tiny", "--num", 4, "--steps", 2, "device=cpu"), ("--classifier-guidance", "c", "--classifier-scale", 3)
    assert distill("pairs", *led_, *guide, "--out", "p").code == 0
    manifest = json.loads((tmp_path / "p/manifest.json").read_text())
    assert (manifest["guidance_scale"], manifest["guides"]["classifier_scale"], len(manifest["guides"]["classifier_guidance"])) == (
        0,
        3,
        64,
    )
    again = distill("pairs", *led_, "--classifier-guidance", "c", "--out", "p")
    one_line(again, 2, "made with other settings")
    one_line(distill(*DMD[:-4], "--pairs", "p", "--out", "o"), 2, "made under another classifier_guidance and scale")
    assert distill(*DMD, "--pairs", "p", "--out", "o").code == 0
    shown = ("trace", "--model", "digits", "--num", 1, "--steps", 2, "device=cpu", "--show", "reverse", "--out", "t")
    assert distill(*shown, *guide).code == 0
    other = made()
    other.head.bias.add_(torch.arange(10))
    other.save(tmp_path / "c")
    one_line(distill(*shown, *guide), 2, "--out t: made with other settings")


def test_dmd_of_a_guided_teacher_goes_on_and_is_shared(distill, kept, tmp_path, workers):
    """The same losses after a resume to the last digit, and in two processes to rounding; another classifier is refused."""
    shutil.copytree(kept, tmp_path / "c")
    assert distill(*DMD, "--out", "one").code == 0
    one = lines(tmp_path / "one")
    assert one[0]["student_loss"] > 1e-4  # unguided it is 0: student and fake score begin as the teacher
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/student")
    shutil.rmtree(tmp_path / "two/checkpoints/step-000004")
    assert distill("dmd", "--resume", "two").code == 0
    assert [each["student_loss"] for each in lines(tmp_path / "two")][-2:] == [each["student_loss"] for each in one][-2:]
    workers.finish([*map(str, DMD[:-3]), str(tmp_path / "c"), "--classifier-scale", "3", "--out", str(tmp_path / "shared")], 2)
    for ours, theirs in zip(one, lines(tmp_path / "shared"), strict=True):
        assert theirs["student_loss"] == pytest.approx(ours["student_loss"], rel=1e-4)
    other = made()
    other.head.bias.add_(torch.arange(10))
    shutil.rmtree(tmp_path / "c")
    other.save(tmp_path / "c")
    shutil.rmtree(tmp_path / "two/student")
    one_line(distill("dmd", "--resume", "two", "--steps", 6), 2, "classifier_guidance", "its content is not what the run has begun with")


def test_a_resume_sees_a_guide_that_came_or_went(tiny, kept):
    plain, guided = led_by(tiny), led_by(led(tiny, config(kept)))
    for now, then in ((plain, guided), (guided, plain)):
        with pytest.raises(UsageError, match="classifier_guidance"):
            identity.refuse(DMDConfig(), now, then)
    identity.refuse(DMDConfig(), plain, {})  # a run of an older version


def test_a_classifier_of_a_models_folder_goes_on_with_that_model_alone(distill, tmp_path, tiny):
    """The folder may be given by a relative path; another model in its place is seen."""
    formats.save(replace(load("digits"), lineage=tiny.lineage), tmp_path / "m")
    begun = ("classifier", "--noisy", "--model", "m", "--steps", 2, "batch_size=4", "width=8", "save_every=2", "device=cpu", "--out", "c")
    assert distill(*begun).code == 0
    assert distill("classifier", "--resume", "c", "--steps", 3).code == 0
    shutil.rmtree(tmp_path / "m")
    formats.save(tiny, tmp_path / "m")
    one_line(distill("classifier", "--resume", "c", "--steps", 4), 2, "model", "its content is not what the run has begun with")


def test_a_negative_prompt_has_no_place_where_a_guide_alone_asks(kept):
    latent = load("tiny-sd").with_prompts(["a"], "ugly")
    model = led(latent, config(save(replace(INFO, shape=latent.shape, schedule=described(latent.denoiser.schedule)), kept.parent / "sd")))
    with pytest.raises(UsageError, match="--negative-prompt: a guide leads the estimate without a prompt"):
        model.with_defaults(None, 2, None)
    assert model.with_defaults(None, 2, 3.0).guidance_scale == 3


@pytest.mark.slow
@pytest.mark.skipif("digits-noisy" not in classifier.folders(), reason="recipes/digits-noisy-classifier.yaml is not trained yet")
def test_digits_without_their_classes_are_what_the_classifier_asks_for(distill, tmp_path):
    """The null label alone gives a tenth."""
    from tests.judge import judge

    asked = ("--num", 100, "--steps", 9, "--format", "npz", "device=cpu", "--out", "s")
    assert distill("sample", "--model", "digits", "--classifier-guidance", "digits-noisy", "--classifier-scale", 2, *asked).code == 0
    with np.load(tmp_path / "s/samples.npz") as stored:
        assert judge(stored["arr_0"], stored["arr_1"])["accuracy"] > 0.7

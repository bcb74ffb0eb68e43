"""Health by pictures: what is measured, when and at what cost, that it changes nothing, and which step becomes the result."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill_cli.data.pictures import from_uint8, to_uint8
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import behind, remedies
from distill_cli.models.model import Model
from distill_cli.training import checkpoint, pictures, signs
from distill_cli.training.pictures import FILE, LOOKS, SHARE, drift, measures, scheduled, spread
from tests.options import options
from tests.training.test_engine import engine_of, same, weights


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_spread_is_that_inside_a_class():
    images = torch.zeros(6, 1, 2, 2)
    labels = torch.tensor([3, 3, 3, 3, 5, 5])
    images[4:] = 7.0  # another class, elsewhere, without any spread of its own
    assert spread(images, labels) == 0
    images[:2] = 1.0
    assert spread(images, labels) == pytest.approx((4 * 0.25 / 6) ** 0.5)
    assert spread(images[:4], labels[:4]) == pytest.approx(0.5)


def test_measures_of_pictures_with_known_ones():
    """A checkerboard of single pixels is all finest octave, stripes of two pixels have nothing of it; pure red has BT.709's luminance."""
    down, across = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    board, stripes = (1.0 - 2.0 * ((down + across) % 2)), (1.0 - 2.0 * (across // 2 % 2))
    grey = measures(0.5 * board.expand(1, 3, 8, 8), torch.zeros(1))
    assert grey == pytest.approx({"luminance": 0.5, "saturation": 0, "contrast": 0.25, "sharpness": 0.25, "spread": 0}, abs=1e-9)
    assert measures(0.5 * stripes.expand(1, 3, 8, 8), torch.zeros(1)) == pytest.approx({**grey, "sharpness": 0}, abs=1e-9)
    red = measures(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8), torch.zeros(1))
    assert red == pytest.approx({"luminance": 0.2126, "saturation": 1, "contrast": 0, "sharpness": 0, "spread": 0}, abs=1e-6)
    assert drift({"luminance": math.e, "contrast": 1 / math.e}) == pytest.approx(1)
    assert drift({"luminance": 1.0, "contrast": math.e}) == pytest.approx(0.5**0.5)


def test_by_default_looks_cost_at_most_two_percent(tmp_path, tiny, tiny_pairs):
    """A short run has none, a long one LOOKS; between them as many as the share allows, at lines of the log."""
    plans = {}
    for steps in (100, 3800, 5000, 100_000):
        plans[steps] = scheduled(engine_of("dmd", tmp_path / str(steps), tiny, tiny_pairs, steps=steps, log_every=50).objective)
    assert plans[100].every == 0
    assert "health_every=N asks for it" in str(plans[100])
    assert all(plan.share <= SHARE and plan.every % 50 == 0 for plan in plans.values())
    assert 100_000 // plans[100_000].every == LOOKS
    assert 5 <= 3800 // plans[3800].every < 5000 // plans[5000].every <= LOOKS


def test_the_cost_is_what_a_run_pays(tmp_path, tiny, tiny_pairs):
    """Images that go through the networks in looks, counted by hooks, over those of the steps, where a gradient counts as two more."""
    engine = engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, steps=4, health_every=2)
    seen, whole = Counter(), sum(engine.objective.calls(step).evaluations() for step in range(4))
    look = engine._look

    def count(module, arguments):
        if type(module).__name__ == "NetworkDenoiser":
            seen["images"] += len(arguments[0])

    def counted():
        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        look()
        hook.remove()

    engine._look = counted
    engine.train()
    assert [look["step"] for look in engine.pictures.history] == [0, 2, 4]
    assert seen["images"] / whole == pytest.approx(engine.pictures.plan.share)


def test_looks_change_nothing_and_resume_exactly(tmp_path, tiny, tiny_pairs, monkeypatch, capsys):
    """The weights of a run that does not look; after a stop the same lines, and the teacher's pictures are read, not made."""
    given = dict(steps=6, health_every=2)
    engine_of("dmd", tmp_path / "blind", tiny, tiny_pairs, steps=6).train()
    engine_of("dmd", tmp_path / "whole", tiny, tiny_pairs, **given).train()
    assert same(*({k: v for k, v in weights(tmp_path / run, 6).items() if k != "optimizers"} for run in ("blind", "whole")))
    begun = engine_of("dmd", tmp_path / "parts", tiny, tiny_pairs, **given)
    for _ in range(4):
        begun.advance()
    begun.save()
    made, generate = [], Model.generate
    monkeypatch.setattr(Model, "generate", lambda model, *rest: made.append(model.lineage.kind) or generate(model, *rest))
    again = engine_of("dmd", tmp_path / "parts", tiny, tiny_pairs, resume=True, **given)
    again.train()
    assert set(made) == {"student"}
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole") if "health_drift" in line] == [2, 4, 6]
    assert again.pictures.history[0]["step"] == 0
    path = tmp_path / "parts" / FILE
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    longer = engine_of("dmd", tmp_path / "parts", tiny, tiny_pairs, resume=True, steps=8, health_every=2)
    longer.train()
    assert "checksum does not match: the teacher's pictures are made again" in capsys.readouterr().err
    assert path.read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_the_best_checkpoint_becomes_the_result(tmp_path, tiny, tiny_pairs, monkeypatch, capsys):
    """The average of the step with the lowest drift, which is kept; the command's last line says which it is."""
    drifts = iter([9.0, 3.0, 5.0, 1.0, 4.0, 2.0, 7.0])  # of step 0, 1, ...
    monkeypatch.setattr(pictures, "drift", lambda ratios: next(drifts))
    given = dict(steps=6, save_every=1, keep=1, keep_best=1, best_by="drift", result="best", lr=1e-2, warmup_steps=0)
    engine = engine_of("dmd", tmp_path / "run", tiny, tiny_pairs, **given)
    engine.train()
    assert (engine.chosen, checkpoint.steps(engine.run.checkpoints)) == (3, [3, 6])
    saved = load_file(tmp_path / "run/student/unet/diffusion_pytorch_model.safetensors")
    best, last = (weights(tmp_path / "run", step)["average.safetensors"] for step in (3, 6))
    named = {key.removeprefix("network.unet."): value for key, value in best.items()}
    assert saved.keys() == named.keys()
    assert all(torch.equal(value, named[key]) for key, value in saved.items())
    assert not same(best, last)
    assert "result: step 3 of 6, with the lowest drift of the checkpoints, 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(result="best"), "result best: keeps the best checkpoint: keep_best=1"),
        (dict(best_by="drift", health_every=0), "best_by drift: looks at pictures, and health_every is 0"),
        (dict(best_by="drift", save_every="10m"), "best_by drift: save_every 10m is a time; give steps"),
    ],
)
def test_options_that_do_not_go_together(given, says):
    with pytest.raises(ValueError, match=says):
        DMDConfig(**given)


def test_runs_that_have_nothing_to_look_at_refuse_it(tmp_path, tiny, tiny_pairs):
    with pytest.raises(UsageError, match="health_every 5: no teacher's pictures to look at"):
        scheduled(engine_like("cm", method="ct", data="digits", health_every=5))
    assert scheduled(engine_like("cm", method="ct", data="digits")) is None


def engine_like(command, **given):
    """An objective without a teacher, as far as its looks are concerned."""
    from distill_cli.training.objective import Objective

    return Objective(options(command, **given), "student")


WELL = {"step": 0, "luminance": 1.0, "saturation": 1.0, "contrast": 1.0, "sharpness": 1.0, "spread": 1.0, "drift": 0.1}


@pytest.mark.parametrize(
    ("now", "names"),
    [
        ({}, []),
        ({"saturation": 1.3}, ["over-saturated"]),
        ({"luminance": 0.7}, ["darkening"]),
        ({"luminance": 1.4}, ["too bright"]),
        ({"sharpness": 0.6}, ["blurred"]),
        ({"sharpness": 0.6, "contrast": 0.7}, []),  # pale, but as sharp as its contrast lets it be
        ({"spread": 0.6}, ["collapsing"]),
        ({"drift": 0.24}, []),
        ({"drift": 0.5, "spread": 0.1}, ["diverging"]),  # of pictures that are nothing yet no more is said
    ],
)
def test_each_sign_by_itself(now, names):
    assert [name for name, _ in signs.found([WELL, {**WELL, "step": 10, **now}], 0.1)] == names


def test_a_beginning_is_no_sign_and_a_lasting_one_is():
    """One step of a teacher makes blurred means: only what gets worse is said at first; after a quarter of the run what stays, too."""
    begun = {**WELL, "sharpness": 0.5, "spread": 0.5, "drift": 0.4}
    same = {**begun, "step": 10, "sharpness": 0.55, "spread": 0.55}
    assert list(signs.found([begun, same], 0.2)) == []
    assert [name for name, _ in signs.found([begun, same], 0.3)] == ["blurred", "collapsing"]
    assert [name for name, _ in signs.found([begun, {**same, "spread": 0.4}], 0.2)] == ["collapsing"]
    near = {**WELL, "step": 20}
    assert [name for name, _ in signs.found([begun, near, {**WELL, "step": 30, "drift": 0.3}], 0.3)] == ["swinging"]
    said = list(signs.shown([WELL, {**WELL, "saturation": 1.3}], 0.1, {"over-saturated": "Do this"}))
    assert said == ["the student's pictures are over-saturated: their colours are 1.30 times as strong as the teacher's. Do this"]


RECORDED = json.loads((Path(__file__).parents[2] / "docs/curves.json").read_text())


def warned(name):
    """Every look of a recorded run with a sign: its share of the run, the names of the signs, the look, and the first remedy."""
    run = RECORDED[name]
    for count in range(2, len(run["looks"]) + 1):
        look = run["looks"][count - 1]
        done = look["step"] / run["steps"]
        ratio = run["error_ratio"].get(str(look["step"] // 10 * 10), 0.0)
        found = [sign for sign, _ in signs.found(run["looks"][:count], done)]
        if found:
            yield done, found, look, remedies({"real_error": 1.0, "fake_error": ratio}, 1.0, name not in ("no-regression", "lagging"))


@pytest.mark.parametrize("name", ["healthy", "slow-fake", "digits-cd", "shapes-dmd2", "healthy-cd", "healthy-pd"])
def test_runs_that_are_well_raise_nothing(name):
    assert list(warned(name)) == []
    assert signs.guided(RECORDED[name]["looks"][0]) == ""
    assert all(behind({"real_error": 1.0, "fake_error": ratio}) == "" for ratio in RECORDED[name]["error_ratio"].values())


@pytest.mark.parametrize("name", ["healthy", "slow-fake", "digits-cd", "healthy-cd", "healthy-pd", "guidance"])
def test_the_step_that_is_chosen_by_drift_is_near_the_best(name):
    """Its Fréchet distance, which drift does not know, is within 5% of the lowest of all steps that were looked at."""
    looks = [look for look in RECORDED[name]["looks"] if look["step"] > RECORDED[name].get("last_round", 0)]
    chosen = min(looks, key=lambda look: look["drift"])
    assert chosen["frechet"] < 1.05 * min(look["frechet"] for look in looks)


@pytest.mark.parametrize(
    ("name", "sign", "change"),
    [("rates", "diverging", "Lower lr"), ("no-regression", "swinging", "give pairs"), ("lagging", "collapsing", "fake score lags")],
)
def test_runs_that_were_made_sick_are_named(name, sign, change):
    """Within a quarter of the run, and before the judge's score has fallen by a tenth."""
    done, found, look, known = next(warned(name))
    assert done <= 0.25
    assert found[0] == sign
    assert change in known.get(sign, signs.GENERAL[sign])
    assert look["accuracy"] > 0.9


def test_the_run_whose_teacher_was_guided_too_strongly_is_named_at_its_first_line():
    """Its student follows the teacher closely, so nothing else is said."""
    run = RECORDED["guidance"]
    assert "the teacher's pictures are too bright: their luminance is 1.43 times" in signs.guided(run["looks"][0])
    assert not any(set(found) & {"diverging", "swinging"} for _, found, _, _ in warned("guidance"))


def test_a_teacher_that_is_guided_too_strongly_is_named(tmp_path, tiny, capsys):
    """All ratios are to the teacher as the run guides it, so only this number shows it: it is that of pictures made apart."""
    given = dict(method="cd", steps=4, health_every=2, log_every=2)
    engine = engine_of("cm", tmp_path / "run", tiny, None, guidance_scale=40, **given)
    engine.train()
    labels = engine.pictures.labels
    found = []
    for scale in (40, 1):
        pictures = tiny.copy().sample(Draws(0, range(2**40, 2**40 + len(labels))), labels, tiny.with_defaults(None, None, scale))
        found.append(measures(from_uint8(to_uint8(pictures)), labels))
    ratio = {name: found[0][name] / found[1][name] for name in found[0]}
    first = engine.pictures.history[0]
    assert {name: first[f"guided_{name}"] for name in ratio} == pytest.approx(ratio)
    assert ratio["saturation"] > 1.2
    said = f"pictures are over-saturated: their colours are {ratio['saturation']:.2f} times as strong as the teacher's under its usual"
    assert all(any(said in text for text in line["warnings"]) for line in lines(tmp_path / "run"))
    assert capsys.readouterr().err.count(said) == 1
    again = engine_of("cm", tmp_path / "run", tiny, None, resume=True, guidance_scale=40, **given | dict(steps=6))
    again.train()
    assert said in lines(tmp_path / "run")[-1]["warnings"][0]
    plain = engine_of("cm", tmp_path / "plain", tiny, None, **given)
    plain.train()
    assert not any(name.startswith("guided") for name in plain.pictures.history[0])
    assert signs.guided({"guided_saturation": 1.19, "guided_luminance": 1.29}) == ""
    assert "are too bright: their luminance is 1.31 times the teacher's under" in signs.guided(
        {"guided_saturation": 1.19, "guided_luminance": 1.31}
    )

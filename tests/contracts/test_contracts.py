"""What holds for every method on every family that it takes, seen in one process."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from distill_cli.diffusion.noise import Draws
from distill_cli.models.model import Model
from distill_cli.training.rehearsal import READERS, save, unmeasured
from tests.contracts import diffusers_alone, refused, running
from tests.contracts.families import TRANSFORMERS
from tests.contracts.running import LOOKED, METHODS, STEPS, STILL, apart, call, hashes, words
from tests.looking import few

PAIRS = running.pairs()
TAKEN = [(method, family) for method, family in PAIRS if family not in refused.recorded().get(method, [])]
FIRST = dict(reversed(TAKEN))
"""The first family that each method takes."""


def left_to_all(method, family, share, of_transformers):
    """Whether a pair runs with -m contracts_all alone: all but a method's first family, and every `share`th pair of the others.

    The families of models/family.py have all but their data in common: their share is another.
    """
    place = list(running.METHODS).index(method) + list(running.FAMILIES).index(family)
    return FIRST[method] != family and place % (of_transformers if family.removesuffix("-lora") in TRANSFORMERS else share) != 0


def taken(share, of_transformers):
    pairs = [(pair, pytest.mark.contracts_all if left_to_all(*pair, share, of_transformers) else ()) for pair in TAKEN]
    return pytest.mark.parametrize(("method", "family"), [pytest.param(*pair, id="-".join(pair), marks=marks) for pair, marks in pairs])


SHARES = 3, 12
every_pair = taken(*SHARES)


def alike(metrics, expected):
    """The losses and gradient norms of networks are equal to rounding; parts of a loss may vanish, and are less so."""
    found, wanted = (
        {name: value for name, value in each.items() if name.endswith(("_loss", "_grad_norm"))} for each in (metrics, expected)
    )
    assert found == pytest.approx(wanted, rel=1e-3)
    trained = {name for name in wanted if name.endswith("_grad_norm") or f"{name.removesuffix('_loss')}_grad_norm" in wanted}
    assert {name: found[name] for name in trained} == pytest.approx({name: wanted[name] for name in trained}, rel=5e-5)
    assert len(trained) >= 2


@pytest.mark.parametrize(("method", "family"), [pytest.param(*pair, id="-".join(pair)) for pair in PAIRS])
def test_a_pair_is_taken_or_refused_in_one_line(method, family, runs):
    """As recorded, by the plan; a refused run leaves no folder, and is refused in the same words."""
    plan = runs.plan(method, family, counted=not left_to_all(method, family, *SHARES))
    is_taken = plan.code == 0
    assert is_taken == ((method, family) in TAKEN), f"{plan.err} python -m tests.contracts.refused records it"
    if not is_taken:
        run = runs.whole(method, family)
        assert run.ended.refused(), run.ended.err
        assert run.ended.out == ""
        assert not run.folder.exists()
        assert plan.err.splitlines()[-2:] == run.ended.err.splitlines()[-2:]


@taken(1, 3)
def test_a_pair_that_is_taken_trains(method, family, runs):
    run = runs.whole(method, family)
    run.ended.check()
    assert run.seen.steps == STEPS
    assert all((run.folder / name).exists() for name in run.seen.results)


@every_pair
def test_stopped_and_resumed_is_uninterrupted(method, family, runs):
    """At a random step of the first phase, and of a later one: weights, averages, moments, metrics, pictures, results, bit for bit."""
    whole, chance = runs.whole(method, family), random.Random(f"{method} {family}")
    border = next(iter(whole.seen.results.values()))
    for step in [chance.randrange(1, border), *([chance.randrange(border, STEPS)] if border < STEPS else [])]:
        parts = runs.run(method, family, stop_after=step)
        assert f"stopped at step {step} of {STEPS}" in parts.ended.check().err
        running.resume(method, parts.folder).check()
        one, other = found(whole.folder), found(parts.folder)
        extra = tuple(f"checkpoints/step-{k:06d}/" for k in range(1, STEPS))  # the stop's, and the one for which it made way
        for name in [name for name in {**one, **other} if name.startswith(extra) and not (name in one and name in other)]:
            one.pop(name, None), other.pop(name, None)
        assert [name for name in {**one, **other} if one.get(name) != other.get(name)] == []
        assert len(one) > 6


def found(run):
    """Hashes of a run's files; the states of its checkpoints are read, without the mean loss since the checkpoint before."""
    out = hashes(run)
    for file in run.glob("checkpoints/*/state.json"):
        content = json.loads(file.read_text())
        content["state"].pop("score")
        out[str(file.relative_to(run))] = {key: content[key] for key in ("step", "sha256", "state")}
    return out


@every_pair
def test_accumulation_is_the_same_step(method, family, runs):
    """The losses, gradient norms and weights of batches in one part and in two."""
    one, two = runs.still(method, family).seen, runs.run(method, family, LOOKED, accumulate=2, **STILL)
    two.ended.check()
    alike(two.seen.metrics, one.metrics)
    for name, start in one.start.items():
        assert apart(one.moved[name], two.seen.moved[name], start) < 3e-4, name  # rounding grows where estimates follow estimates


@every_pair
def test_half_precision_trains(method, family, runs):
    """Losses and weights near those of float32, and not the same; the weights stay float32."""
    if "precision" not in METHODS[method].fields:
        pytest.skip("has no precision")
    exact, half = runs.still(method, family).seen, runs.run(method, family, LOOKED, precision="bf16", **STILL)
    half.ended.check()
    path = half.folder / f"checkpoints/step-{LOOKED:06d}"
    weights = [value for file in path.glob("*.safetensors") for value in load_file(file).values()]
    assert {value.dtype for value in weights if value.is_floating_point()} == {torch.float32}
    for name, start in exact.start.items():
        loss = f"{name}_loss"
        # eps at the end of a table magnifies rounding, whose square is 2^-16
        assert half.seen.metrics[loss] == pytest.approx(exact.metrics[loss], rel=0.1, abs=2**-16)
        assert 1e-4 < apart(exact.moved[name], half.seen.moved[name], start) < 0.3  # most where two estimates are near


def planned(text, key):
    """What a plan says of `key`; None where it says nothing."""
    found = re.search(rf"^#   {key}: (.*)$", text, re.MULTILINE)
    return found and found[1]


@every_pair
def test_the_plan_is_what_happens(method, family, runs):
    """Parameters of every network, calls of each in every step, and the bytes of the checkpoints that are kept."""
    whole, plan = runs.whole(method, family), runs.plan(method, family).check().out
    said = dict(re.findall(r"(\S+) ([\d,]+\d|\d)(?:, |$)", planned(plan, "parameters")))
    assert {name: int(count.replace(",", "")) for name, count in said.items()} == whole.seen.parameters
    assert whole.seen.forwards == calls_of(planned(plan, "each step"))
    stored = sum(bytes_of(file) for file in whole.folder.glob("checkpoints/*/*"))
    number, unit = re.search(r"about ([\d.,]+) (kB|MB|GB)", planned(plan, "disk")).groups()
    assert float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit] == pytest.approx(stored, rel=5.1e-3)  # three digits


def calls_of(text):
    """Images that go through each network in each step, by what a plan says of its calls."""
    first, *later = re.split(r"; after step (\d+) ", text)
    said = {0: first, **dict(zip(map(int, later[::2]), later[1::2], strict=True))}
    out = []
    for step in range(STEPS):
        calls = Counter()
        for verb, rest in re.findall(r"(trains|passes through|evaluates) ([^;]*)", said[max(begin for begin in said if begin <= step)]):
            for name, count in re.findall(r"(\S+) on (\d+) images", rest):
                calls[name, verb != "evaluates"] += int(count)
        out.append(calls)
    return out


def bytes_of(file):
    """Those of the numbers in a checkpoint's file, without its headers, which count with networks so small."""
    if file.suffix == ".safetensors":
        return sum(value.nbytes for value in load_file(file).values())
    if file.suffix == ".pt":
        states = torch.load(file, weights_only=True).values()
        values = [value for state in states for moments in state["state"].values() for value in moments.values()]
        return sum(value.nbytes for value in values if value.ndim)
    return 0


FILLED = {f"{part}{n}" for n in ("", "_2") for part in ("text_encoder", "tokenizer")}
FILLED = {f"{part}/{'tokenizer_' * part.startswith('tok')}config.json" for part in FILLED}
"""In which transformers writes more of a thing that it has read than of one that was made in memory."""


@every_pair
def test_a_result_is_saved_as_it_was_trained(method, family, runs, tmp_path):
    """It opens, makes the same pictures as the average in memory, and what is saved again are the same bytes; those of rounds too."""
    whole = runs.whole(method, family)
    result = unmeasured(lambda network: network, whole.seen.result)
    kind = type(result)
    for number, name in enumerate(whole.seen.results):
        folder, first, second = whole.folder / name, tmp_path / f"{number}", tmp_path / f"{number} again"
        save(kept(READERS[kind](folder), kind), first)
        save(kept(READERS[kind](first), kind), second)
        written, again = hashes(folder), hashes(first)
        assert {name for name in {**written, **again} if written.get(name) != again.get(name)} <= FILLED
        assert hashes(second) == again
    if isinstance(result, Model):
        model = READERS[Model](folder)
        if model.text is not None:
            model = model.with_prompts(result.text.prompts)
        apart = (model.examples(0, 3, few(model))[0] - result.examples(0, 3, few(result))[0]).abs().max()
        assert apart <= (0 if model.text is None else 3e-4)  # in training texts are embedded once, in half precision
    else:
        save(result, tmp_path / "result")
        assert hashes(tmp_path / "result") == written


def kept(thing, kind):
    """An autoencoder's network is read without what it is in while it is trained."""
    return thing if isinstance(thing, kind) else kind(thing)


PROMPTS = ["a red circle", "a small blue square", "a green triangle"]


@every_pair
def test_the_same_pictures_in_plain_diffusers(method, family, runs):
    """What the card's program makes, to 1e-4; where that is another picture, the card and `distill models show` say so."""
    whole = runs.whole(method, family)
    if not isinstance(whole.seen.result, Model):
        pytest.skip("makes no pictures")
    for name in whole.seen.results:
        folder = whole.folder / name
        model = READERS[Model](folder)
        if model.text is not None:
            model = model.with_prompts(PROMPTS)
        draws, labels = Draws(0, range(3)), torch.tensor([2, 0, 1])
        ours = model.sample(draws, labels)
        assert ours.std() > 0.01
        theirs = diffusers_alone.pictures(folder, draws, model.shape, labels.tolist(), [PROMPTS[k] for k in labels])
        same = theirs is not None and bool((ours - theirs).abs().max() < 1e-4)
        said = json.loads(call(["models", "show", str(folder), "--json"]).check().out)["in_diffusers"]
        assert f"| in diffusers | {said} |" in (folder / "README.md").read_text()
        assert same == (said == "as distill samples it"), said
        assert same or said.startswith("not as distill samples it: ")


def test_words():
    assert words({"a": [1, 2], "b": "c", "d": None}) == ["a=[1, 2]", "b=c", "d=null"]

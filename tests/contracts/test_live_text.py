"""dmd with text=live: as with stored text, but for the disk; exact under stops, kills and several processes; its errors are one line."""

import random
import threading

import pytest
import torch

from distill_cli.data.prompts import PromptFile
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import DMD
from distill_cli.models import conditioners, cost, load
from distill_cli.models.conditioners import ClassConditioner, PromptConditioner
from distill_cli.training.memory import memory
from distill_cli.training.objective import Call
from tests.contracts.families import Made, prompts
from tests.contracts.running import LOOKED, STEPS, apart, call, hashes, lines, resume
from tests.contracts.test_contracts import alike, found

PROMPTS = ["a small red circle", "a large blue cross", "a yellow square"]
GIVEN = dict(pairs=None, prompts=Made("prompts.txt", prompts))


@pytest.fixture
def live(runs):
    """The uninterrupted run on tiny-sd."""
    if "live" not in runs.wholes:
        runs.wholes["live"] = runs.run("dmd", "tiny-sd", text="live", **GIVEN)
        runs.wholes["live"].ended.check()
    return runs.wholes["live"]


@pytest.mark.parametrize("family", ["tiny-sd", "tiny-sdxl"])
def test_live_text_trains_as_stored_text(family, runs, request):
    """The same losses and weights, nothing on disk; the text encoders are frozen networks of the run."""
    given = {**GIVEN, "steps": STEPS if family == "tiny-sd" else LOOKED}
    live = request.getfixturevalue("live") if family == "tiny-sd" else runs.run("dmd", family, text="live", **given)
    stored = runs.run("dmd", family, **given)
    assert list(stored.folder.glob("text-*/shard-*"))
    assert not list(live.folder.rglob("text-*"))
    for ours, theirs in zip(lines(live.folder), lines(stored.folder), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name, start in stored.seen.start.items():
        assert apart(live.seen.moved[name], stored.seen.moved[name], start) < 1e-4, name
    encoders = {"text_encoder", "text_encoder_2"} if family == "tiny-sdxl" else {"text_encoder"}
    assert live.seen.parameters.keys() - stored.seen.parameters.keys() == encoders


def test_beside_the_stored_text_of_pairs(runs):
    """The pairs' own text comes from disk, which ends with the encoder on the CPU; that of other prompts is live all the same."""
    given = {**GIVEN, "pairs": Made("pairs-tiny-sd", None), "steps": 2}
    live, stored = (runs.run("dmd", "tiny-sd", text=text, **given) for text in ("live", "stored"))
    for ours, theirs in zip(lines(live.folder), lines(stored.folder), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_stopped_and_resumed_is_uninterrupted(live, runs):
    parts = runs.run("dmd", "tiny-sd", stop_after=2, text="live", **GIVEN)
    assert f"stopped at step 2 of {STEPS}" in parts.ended.check().err
    resume("dmd", parts.folder).check()
    assert found(parts.folder) == found(live.folder)


def test_killed_and_resumed_is_uninterrupted(live, runs, workers):
    chance = random.Random(0)
    killed = False
    while not killed:
        folder = runs.new("dmd-live")

        def due(folder=folder):
            return (folder / "metrics.jsonl").exists() and "\n" in (folder / "metrics.jsonl").read_text()

        command = runs.command("dmd", "tiny-sd", text="live", **GIVEN)
        killed = workers.killed([*command, "--out", str(folder)], due, chance.uniform(0, 0.1))
    resume("dmd", folder).check()
    assert hashes(folder) == hashes(live.folder)


def test_two_processes_and_two_parts_train_as_one(live, runs, workers):
    two = runs.new("dmd-live")
    workers.finish([*runs.command("dmd", "tiny-sd", text="live", **GIVEN), "accumulate=2", "--out", str(two)], 2)
    for ours, theirs in zip(lines(live.folder), lines(two), strict=True):
        alike(theirs, ours)


def test_prompts_are_encoded_in_a_thread_while_the_step_goes_on(monkeypatch):
    """Rounded as on disk, equal prompts once, in the order in which they are announced, also where they never are."""
    conditioner = load("tiny-sd").with_prompts(PROMPTS).conditioner
    encode, go, calls = PromptConditioner.encode, threading.Event(), []

    def watched(self, texts):
        assert go.wait(10)
        calls.append((list(texts), threading.current_thread() is threading.main_thread()))
        return encode(self, texts)

    monkeypatch.setattr(PromptConditioner, "encode", watched)
    live = conditioner.live("float16")
    live.ahead(torch.tensor([2, 0, 2]))
    live.ahead(torch.tensor([1]))
    assert calls == []  # the step goes on
    go.set()
    first, other, last = (live(torch.tensor(labels)).parts[live.part] for labels in ([2, 0, 2], [0], [1]))
    assert calls == [([PROMPTS[2], PROMPTS[0]], False), ([PROMPTS[1]], False), ([PROMPTS[0]], False)]
    exact = conditioner(torch.tensor([0, 1, 2])).parts[live.part]
    for seen, expected in ((first, exact[[2, 0, 2]]), (other, exact[:1]), (last, exact[1:2])):
        assert torch.equal(seen, seen.half().float())
        assert (seen - expected).abs().max() < 2e-3
        assert not torch.equal(seen, expected)
    assert len(live(torch.tensor([], dtype=torch.long)).parts[live.part]) == 0


def test_a_step_announces_what_the_next_one_asks_for_and_the_last_one_nothing():
    """Of the same part of the batch."""
    config = DMDConfig(teacher="tiny-sd", device="cpu", text="live", steps=3, batch_size=4, accumulate=2, seed=7)
    dmd = DMD(config, load("tiny-sd"), None, PROMPTS * 9)
    coming = dmd.teacher.conditioner.table.coming
    for step in range(3):
        for part in (0, 2):
            list(dmd.turns(step, Draws(7, range(4 * step + part, 4 * step + part + 2))))
        later = [Draws(7, range(4 * step + part, 4 * step + part + 2)).uniform("label") for part in (4, 6)]
        assert [*coming] == [tuple((27 * uniform).long().tolist()) for uniform in later if step < 2]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("no such kernel"), 3, "error: RuntimeError: no such kernel"),
        (torch.OutOfMemoryError("tried to allocate"), 1, "error: out of memory (tried to allocate)"),
        (None, 1, "error: --prompts {file}: has changed since the run began"),
    ],
)
def test_what_fails_in_the_thread_ends_the_run_in_one_line(error, code, said, tmp_path, monkeypatch):
    file, encode, calls = tmp_path / "p.txt", PromptConditioner.encode, []
    prompts(file)

    def failing(self, texts):
        if threading.current_thread() is not threading.main_thread():
            calls.append(texts)
            if len(calls) == 3 and error is not None:
                raise error
            if len(calls) == 3:
                file.write_text("other prompts")
        return encode(self, texts)

    monkeypatch.setattr(PromptConditioner, "encode", failing)
    options = ["--teacher", "tiny-sd", "--prompts", str(file), "steps=9", "batch_size=2", "sample_every=0", "device=cpu", "text=live"]
    ended = call(["dmd", *options, "--out", str(tmp_path / "run")], again=True)
    assert (ended.code, ended.err.count("error:")) == (code, 1)
    assert said.format(file=file) in ended.err


def test_millions_of_prompts_are_neither_listed_nor_all_tokenized(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("".join(f"a circle {'very ' * 20 * (k % 4 == 0)}{k}\n" for k in range(20_000)))
    conditioner = load("tiny-sd").with_prompts(PromptFile(tmp_path / "p.txt")).conditioner
    uniform = Draws(0, range(64)).uniform("label")
    assert torch.equal(conditioner.at_random(uniform), conditioner.every()[(uniform * 20_000).long()])
    monkeypatch.setattr(conditioners, "CUT", 1000)
    monkeypatch.setattr(PromptFile, "__iter__", None)
    monkeypatch.setattr(PromptConditioner, "every", None)
    conditioner.at_random(uniform)
    conditioner.say_cut(range(20_000))
    assert (
        capsys.readouterr().err
        == "1000 of 1000 prompts, one in 20 of 20000, are longer than the 16 tokens that the text encoder reads: cut there\n"
    )


def test_classes_are_drawn_at_random():
    some = ClassConditioner(tuple("abcdef"))
    assert some.at_random(torch.tensor([0.0, 0.49, 0.5, 0.999]), [2, 5]).tolist() == [2, 2, 5, 5]
    assert ClassConditioner().at_random(torch.tensor([0.0, 0.999])).tolist() == [0, 0]


def test_a_changed_file_is_noticed(tmp_path):
    prompts(tmp_path / "p.txt")
    (tmp_path / "p.json").write_text('["a", "b"]')
    for name in ("p.txt", "p.json"):
        file = PromptFile(tmp_path / name)
        file.check()
    with (tmp_path / "p.txt").open("a") as more:
        more.write("a line more\n")
    file.check()  # of the JSON array a copy is read
    opened = PromptFile(tmp_path / "p.txt")
    opened.check()
    (tmp_path / "p.txt").write_text("less")
    with pytest.raises(DistillError, match="p.txt: has changed"):
        opened.check()


def test_the_plan_counts_the_text_encoders_on_the_gpu(runs):
    teacher = load("tiny-sdxl").with_prompts(PROMPTS)
    live, stored = (
        DMD(DMDConfig(teacher="tiny-sdxl", device="cpu", text=text, out=runs.new("plan")), teacher, None, PROMPTS)
        for text in ("live", "stored")
    )
    size = 4 * sum(value.numel() for part in teacher.conditioner.parts().values() for value in part.parameters())
    integers = sum(value.nbytes for part in teacher.conditioner.parts().values() for value in part.buffers())
    counted = 0, Call("student", 1)
    assert memory(live, 1, counted).weights - memory(stored, 1, counted).weights == size + integers
    assert cost.text_cost(teacher.conditioner, "live", 3, 8)["text embeddings"] == (
        f"live: none on disk; text_encoder and text_encoder_2 on the GPU ({size / 1000:.0f} kB), evaluated on 8 prompts a step, ahead of it"
    )
    assert cost.text_cost(teacher.conditioner, "stored", 12_000_000, 8)["text embeddings"] == (
        "1 kB a prompt in fp16, of all prompts, before the first step: 11.1 GB of disk for 12,000,000 prompts, if all differ"
    )
    assert cost.text_cost(ClassConditioner(), "stored", 0, 8) == {}


def test_live_text_where_there_is_none(tiny, runs):
    with pytest.raises(UsageError, match="text live: tiny has no text"):
        DMD(DMDConfig(teacher="tiny", device="cpu", text="live"), tiny, None)
    ended = call(["dmd", "--teacher", "tiny-sd", "pairs=pairs", "text=live", "--out", str(runs.new("none"))])
    assert ended.refused()
    assert "text live: the text of the pairs' prompts is stored beside them" in ended.err

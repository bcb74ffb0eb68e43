"""Text of someone else's files: no control character reaches a terminal, a card, a page or JSON, and none makes a run unsavable."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from distill_cli import watch
from distill_cli.errors import printable, printable_lines
from distill_cli.models import load
from distill_cli.models.formats import save
from distill_cli.models.lineage import Lineage
from distill_cli.runs import Run

EVIL = "a\x1b[31mred\x07\u202etxt\u2066\u200b\u2028\x9b|\n| licence | MIT"
BYTES = b"caf\xe9"


def clean(text):
    """No character but line breaks that a terminal does not show as it is."""
    return all(c.isprintable() or c == "\n" for c in text)


def test_printable():
    assert printable("caf\udce9") == "caf\\udce9"
    assert printable("a\nb\tc\r") == "a b c"
    assert printable("\x1b[1m\u202e") == "\\x1b[1m\\u202e"
    assert printable("naïve 猫 x") == "naïve 猫 x"
    assert printable("x" * 5000, 100) == "x" * 97 + "..."
    assert printable_lines("a: 1\n  b: \x1b\n") == "a: 1\n  b: \\x1b\n"
    assert clean(printable(EVIL))


def test_a_foreign_folders_text(tmp_path, distill):
    """Names, licence, classes and recipe of another's distill.json, in all that is printed and written of them."""
    save(load("tiny"), tmp_path / "m")
    stored = json.loads((tmp_path / "m/distill.json").read_text())
    stored["lineage"] |= dict.fromkeys(("name", "method", "teacher", "licence", "data"), EVIL)
    stored |= {"classes": [EVIL, *stored["classes"][1:]], "recipe": f"a: 1\n{EVIL}\n```\n# x\n"}
    (tmp_path / "m/distill.json").write_text(json.dumps(stored))
    model = load("m")
    assert clean(model.recipe)
    assert model.recipe.startswith("a: 1\n")
    for options in ((), ("--json",)):
        shown = distill("models", "show", "m", *options)
        assert shown.code == 0
        assert clean(shown.out)
    save(model, tmp_path / "again")
    assert clean((tmp_path / "again/distill.json").read_text())
    card = (tmp_path / "again/README.md").read_text()
    assert clean(card)
    assert card.count("```") == 2
    rows = [line for line in card.partition("The recipe that made it")[0].splitlines() if line.startswith("| ")]
    assert sum(line.startswith("| licence") for line in rows) == 1
    assert all(line.count("|") == 3 for line in rows)


def test_errors_about_a_foreign_file(tmp_path, distill):
    save(load("tiny"), tmp_path / "m")
    for file, change in (("model_index.json", {"_class_name": EVIL}), ("distill.json", {EVIL: 1}), ("distill.json", {"time_input": EVIL})):
        old = (tmp_path / "m" / file).read_text()
        (tmp_path / "m" / file).write_text(json.dumps(json.loads(old) | change))
        result = distill("sample", "--model", "m", "--num", 1)
        assert result.code == 1
        assert clean(result.err)
        assert len(result.err.splitlines()) <= 2
        (tmp_path / "m" / file).write_text(old)


def test_the_licence_of_a_card(tmp_path):
    save(load("tiny-sd"), tmp_path / "m")
    (tmp_path / "m/distill.json").unlink()
    (tmp_path / "m/README.md").write_text("---\nlicense: mit\x1b[31m\u202e\n---\n")
    assert load(str(tmp_path / "m")).lineage.licence == "mit\\x1b[31m\\u202e"
    assert Lineage(name="x", licence=EVIL).licence == printable(EVIL)


def test_the_page_of_a_foreign_run(tmp_path):
    run = Run(tmp_path / "run")
    (run.folder / "checkpoints" / f"step-1{EVIL.partition('|')[0]}").mkdir(parents=True)
    run.recipe.write_bytes(b"command: dmd\nsteps: 2\n# \xe2\x80\xae\xe2\x80\x8b\n")  # YAML itself refuses most others
    run.metrics.write_text(json.dumps({"step": 1, "loss\x1b\u202e": 0.5}) + "\n")
    html, _ = watch.page(run)
    assert clean(html)
    assert "\\u202e\\u200b" in html
    assert "step-1a\\x1b[31mred" in html


@pytest.fixture
def pictures(tmp_path):
    """Two classes, whose folders' names are no UTF-8 and hold a control character, in a folder whose name is none either."""
    folder = os.fsencode(tmp_path) + b"/d\xe9"
    for name in (BYTES, b"caf\xe8", b"x\x1b[31m\ny"):
        os.makedirs(folder + b"/" + name)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(os.fsdecode(folder + b"/" + name + b"/%d.png" % i))
    return os.fsdecode(folder)


def test_a_run_on_classes_that_are_no_utf8_is_saved(distill, pictures, tmp_path):
    """From the data to the student, its page and its report; the labels are those of the names as they stand on the disk."""
    small = ("batch_size=2", "sample_every=0", "resolution=16")
    network = ("network.channels=[8]", "network.attention=[false]", "network.groups=4", "network.head=8")
    run = distill("train", "--data", pictures, *small, *network, "--steps", 1, "--out", "t")
    assert run.code == 0, run.err
    assert load("t").conditioner.classes == ("caf\\udce8", "caf\\udce9", "x\\x1b[31m y")
    assert distill("train", "--resume", "t", "--steps", 2).code == 0
    assert clean((tmp_path / "t/teacher/README.md").read_text())
    student = distill("cm", "method=ct", "--teacher", "t", "--data", pictures, *small, "--steps", 1, "--out", "s")
    assert student.code == 0, student.err
    assert clean(student.err + student.out)
    classifier = distill("classifier", "--data", pictures, "resolution=16", "batch_size=2", "width=8", "--steps", 1, "--out", "c")
    assert classifier.code == 0, classifier.err
    options = ("--data", pictures, "resolution=16", "--classifier", "c", "--num", 4, "neighbours=1")
    report = distill("evaluate", "--model", "s", *options, "--out", "e")
    assert report.code == 0, report.err
    assert clean(report.out + (tmp_path / "e/report.md").read_text())
    shutil.move("s", os.fsdecode(b"s\xe9"))
    assert distill("watch", os.fsdecode(b"s\xe9")).code == 0

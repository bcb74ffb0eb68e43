"""Prompt files as people have them: their content says how prompts stand in them, and what is left out or assumed is said."""

import io
import json
import os
import subprocess
import sys
import threading

import pytest

from distill_cli.data import reading
from distill_cli.data.prompts import PromptFile, digest_of, open_prompts
from distill_cli.errors import DistillError, UsageError


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = PromptFile(path)
    assert list(found) == [found[k] for k in range(len(found))]
    assert found.digest == digest_of(list(found))
    return list(found), found.about.replace(str(path), path.name)


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.txt"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("Prompt\tCategory\tnote\na, b\tShapes\t\nc\tShapes\tx\n", "2 prompts, column Prompt of NAME"),
        ('id,TEXT\n1,"a, b"\n2,c\n3,\n', "2 prompts, column TEXT of NAME; 1 empty row left out"),
        ("n;caption;Text\r\n1;a, b;\r\n2;c;\r\n", "2 prompts, column caption of NAME"),
        ("Prompt|n\ra, b|1\rc|2\r", "2 prompts, column Prompt of NAME"),
        ('prompt,Caption\n"a, b",x\n\u200b,c\n,\n', "2 prompts, columns prompt (1) and Caption (1) of NAME; 1 empty row left out"),
        ('\ufeff"prompt"\n"a, b"\nc\n', "2 prompts, column prompt of NAME"),
    ],
)
def test_tables(tmp_path, name, content, said):
    assert read(tmp_path / name, content) == (["a, b", "c"], said.replace("NAME", name))


@pytest.mark.parametrize(
    ("name", "content", "prompts", "said"),
    [
        ("p.txt", "text, bold, on a wall\na photo, red, blue\n", ["text, bold, on a wall", "a photo, red, blue"], "taken for a prompt"),
        ("p.txt", "a cat\tat home\nmy prompt\tyours\n", ["a cat\tat home", "my prompt\tyours"], ""),
        ("p.txt", "prompt\na cat, at home\n", ["a cat, at home"], "; its first line, prompt, is taken for a header"),
        ("p.txt", "id,prompt\n1,a\n2,b,c\n", ["id,prompt", "1,a", "2,b,c"], "its first line names a column, but it is no table (line 3: "),
        ("p.txt", "a\rb\nc\r\n\r\nd", ["a", "b", "c", "d"], ""),
        ("p.txt", "\u200b\n\u2800\n\ufe0f\n\x07\na\n", ["a"], "; 4 lines without a visible letter left out"),
        ("p.txt", "[best], a cat\n{red|blue} dog\n", ["[best], a cat", "{red|blue} dog"], ""),
        ("p.txt", '["neon"] on a wall\n', ['["neon"] on a wall'], ""),
        ("p.txt", '{"TEXT": "a"}\n{"TEXT": "b"}\n', ["a", "b"], ""),
        ("p.tsv", 'Prompt\tn\n"go" sign\t1\n"open\t2\n', ['"go" sign', '"open'], "; quotes are taken as they stand"),
        ("p.jsonl", '{"text": null, "caption": "a"}\n{"prompt": "", "Text": "b"}\n{"prompt": null}\n', ["a", "b"], "1 empty line left out"),
        ("p.json", '["a", "b"]', ["a", "b"], ""),
        ("p.txt", '\ufeff [\n {"prompt": "a"},\n {"Caption": "b"},\n null ]\n', ["a", "b"], "; 1 empty element left out"),
    ],
)  # fmt: skip
def test_lines_and_json(tmp_path, name, content, prompts, said):
    found, about = read(tmp_path / name, content)
    assert found == prompts
    assert said in about
    assert said or about.endswith(f"of {name}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "URL,a\x1b[31mTITLE\nx,y\n", "which has URL, a.x1b.31mTITLE$"),
        ("p.jsonl", '{"name": "a", "id": 3}\n', "line 1: no text under prompt, text or caption; it has name, id"),
        ("p.json", '["a", 3]', "element 2: no text"),
        ("p.json", '["a", "b', "no JSON array .cut off"),
        ("p.json", '["a"]\n["b"]', "no JSON array .something follows"),
        ("p.txt", '{"prompt": "a"}\nb\n', "line 2: not JSON"),
        ("p.tsv", "prompt\tn\na\t1\nb\n", "line 3: 1 columns, the first line has 2"),
        ("p.txt", "a\n".encode("utf-16"), "UTF-16, not UTF-8"),
        ("p.csv", "prompt,n\na,1\n".encode("utf-16-le"), "UTF-16, not UTF-8"),
        ("p.txt", "a\nschön\n".encode("latin-1"), "no UTF-8 at byte 5"),
    ],
)
def test_refused(tmp_path, name, content, message):
    with pytest.raises(DistillError, match=message) as caught:
        read(tmp_path / name, content)
    assert caught.value.message.isprintable()


def test_a_large_array_is_read_a_piece_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 7)
    texts = [f"picture, [number] {k}" for k in range(200)]
    assert read(tmp_path / "p.json", json.dumps(texts, indent=1))[0] == texts
    assert list(reading.elements(io.StringIO(' [ 1,22 ,\n{"a": [3]}] '))) == [1, 22, {"a": [3]}]


def test_own_copies_keep_every_prompt(tmp_path):
    """The prompts of a store count as they did when it was written, whatever is thought of them today."""
    texts = ["\u200b", "a", "[b]"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert list(PromptFile(tmp_path / "prompts.jsonl", own=True)) == texts
    assert list(PromptFile(tmp_path / "prompts.jsonl")) == texts[1:]


def test_pipes_are_read_once_and_used_often(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=lambda: (tmp_path / "fifo").write_text("a\nb\n"))
    writer.start()
    found = open_prompts(tmp_path / "fifo")
    writer.join()
    assert list(found) == list(found) == found[:] == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Prompt\tn\na\t1\n")))
    found = open_prompts("-")
    assert (list(found), found.about) == (["a"], "1 prompt, column Prompt of standard input")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DistillError, match="--prompts -: cannot be read"):
        open_prompts("-")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="a pipe has one reader"):
        open_prompts("-")


def test_a_pipe_is_shared_by_the_processes_that_one_command_starts(tmp_path, monkeypatch, distill):
    """The command reads it; those that it starts find a copy under the same name."""
    from distill_cli import processes

    seen = []

    def start(count, arguments):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        seen.extend(list(open_prompts("-")) for _ in range(count))
        return 0

    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert distill("sample", "--model", "tiny-sd", "--prompts", "-", "--num-processes", 2, "--out", "s").code == 0
    assert seen == [["a", "b"]] * 2
    assert reading.COPY not in os.environ


def test_the_command_says_what_it_read(distill, tmp_path, monkeypatch):
    (tmp_path / "x.tsv").write_text("Prompt\tCategory\na small red circle\tShapes\na large blue square\tShapes\n\t\n")
    made = distill("sample", "--model", "tiny-sd", "--prompts", "x.tsv", "--steps", 1, "--out", "s")
    assert made.code == 0, made.err
    assert made.err.splitlines()[0].endswith("2 prompts, column Prompt of x.tsv; 1 empty row left out")
    listed = [json.loads(line)["prompt"] for line in (tmp_path / "s/samples.jsonl").read_text().splitlines()]
    assert listed == ["a small red circle", "a large blue square"]
    built_in = distill("pairs", "--teacher", "tiny-sd", "--prompts", "shapes-held", "--num", 4, "--dry-run", "--out", "p")
    assert built_in.err.splitlines()[0].endswith("96 prompts of shapes-held")


def test_a_run_keeps_the_prompts_of_a_pipe(distill, tmp_path, monkeypatch):
    """So it is resumed from its folder alone."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a red circle\na blue square\n")))
    job = ("dmd", "--teacher", "tiny-sd", "batch_size=2", "save_every=1", "sample_every=0", "warmup_steps=0")
    made = distill(*job, "--prompts", "-", "--steps", 1, "--out", "r")
    assert made.code == 0, made.err
    assert made.err.splitlines()[0].endswith("2 prompts of standard input")
    assert [json.loads(line)["prompt"] for line in (tmp_path / "r/prompts.jsonl").read_text().splitlines()] == [
        "a red circle",
        "a blue square",
    ]
    monkeypatch.setattr(sys, "stdin", None)
    assert distill("dmd", "--resume", "r", "--steps", 2).code == 0


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="no /dev/stdin here")
def test_standard_input_of_a_real_process(tmp_path):
    code = "from distill_cli.data.prompts import open_prompts; import sys; print([list(open_prompts(name)) for name in sys.argv[1:]])"
    for name in ("-", "/dev/stdin"):
        done = subprocess.run([sys.executable, "-c", code, name], input="a\nb\n", capture_output=True, text=True)
        assert done.stdout == "[['a', 'b']]\n", done.stderr

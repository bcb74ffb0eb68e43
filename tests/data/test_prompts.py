"""Prompt files: what is read, what is refused with its line, and that memory does not grow with them."""

import json
import tracemalloc

import pytest

from distill_cli.data.prompts import PromptFile, chosen, digest_of, open_prompts
from distill_cli.data.shapes import HELD, TRAINED
from distill_cli.errors import DistillError, UsageError

WANTED = ["a cat", "two words, and a comma", "schön"]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a cat\n\n  two words, and a comma \r\nschön"),
        ("p.txt", "\ufeffa cat\ntwo words, and a comma\nschön\n"),
        ("p.jsonl", "".join(json.dumps({"id": 1, "prompt": text}) + "\n" for text in WANTED)),
        ("p.jsonl", "".join(json.dumps(text) + "\n\n" for text in WANTED)),
        ("p.csv", 'id,caption\n1,a cat\n2,"two words, and a comma"\n\n3,schön\n'),
    ],
)
def test_files(tmp_path, name, content):
    prompts = PromptFile(write(tmp_path / name, content))
    assert [prompts[k] for k in (2, 0, 1)] == [WANTED[k] for k in (2, 0, 1)]
    assert list(prompts) == prompts[:] == WANTED
    assert digest_of(prompts) == digest_of(WANTED)


def test_a_table_may_break_lines(tmp_path):
    prompts = PromptFile(write(tmp_path / "p.csv", 'prompt,n\n"a\nb",1\nc,2\n'))
    assert list(prompts) == ["a\nb", "c"]
    assert prompts[1] == "c"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "no prompts"),
        ("p.txt", "\n \n", "no prompts"),
        ("p.txt", b"\x89PNG\r\n\0\0", "not a text file"),
        ("p.txt", b"good\n\xff\xfe bad\n", "not a text file"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "line 3: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"name": "b"}\n', "line 2: no text"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1: no text"),
        ("p.csv", "name\nb\n", "no column"),
        ("p.csv", "prompt,n\na,1\nb\n", "line 3: 1 columns"),
        ("p.csv", 'prompt\na\n"b' + "c" * 200_000, "line 3: no table"),
        ("p.jsonl", '"a"\n"\\ud83d"\n', "line 2: no text"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(tmp_path, name, content, message):
    with pytest.raises(DistillError, match=message):
        PromptFile(write(tmp_path / name, content))


def test_missing(tmp_path):
    with pytest.raises(DistillError, match="no such file"):
        open_prompts(tmp_path / "p.txt")
    with pytest.raises(UsageError) as caught:
        open_prompts("shapes-helt")
    assert "shapes-held" in caught.value.hint


def test_lines_take_eight_bytes_each(tmp_path):
    lines = 200_000
    with open(tmp_path / "p.txt", "w") as handle:
        handle.writelines(f"a picture of the number {k} in oil on a very large canvas\n" for k in range(lines))
    tracemalloc.start()
    prompts = PromptFile(tmp_path / "p.txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(prompts) == lines
    assert prompts[187_654].split()[5] == "187654"
    assert peak < 20 * lines  # the file has 62 bytes a line; growing an array holds the old one too


def test_built_in_sets():
    assert list(open_prompts("shapes")) == [thing.caption for thing in TRAINED]
    assert not set(open_prompts("shapes")) & set(open_prompts("shapes-held"))
    assert chosen(None, "shapes") == open_prompts("shapes")
    assert chosen("shapes-held", "shapes") == [thing.caption for thing in HELD]
    assert chosen(None, "laion") == ()

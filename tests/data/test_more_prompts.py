"""Quotes that are not closed, headers with blanks, other codes than UTF-8: what is assumed is said, and no row goes into another."""

import io
import zipfile

import numpy as np
import pytest

from distill_cli.data.npz import read_npz
from distill_cli.errors import DistillError
from tests.data.test_prompt_files import read

QUOTES = "; quotes are taken as they stand"


@pytest.mark.parametrize(
    ("name", "content", "prompts", "said"),
    [
        ("p.csv", 'prompt,n\na,1\n"b,2\nc,3\n', ["a", '"b', "c"], QUOTES),
        ("p.txt", 'prompt,n\na,1\n"b,2\nc,3\n', ["a", '"b', "c"], QUOTES),
        ("p.csv", 'prompt\na\n"go" sign\n', ["a", '"go" sign'], QUOTES),
        ("p.csv", 'prompt,n\n"a\nb, ""c""",1\nd,2\n', ['a\nb, "c"', "d"], ""),
        ("p.tsv", 'prompt\tn\n"a\t1\nb"\t2\nc\t3\n', ['"a', 'b"', "c"], QUOTES),
        ("p.tsv", 'prompt\tn\n"a\nb"\t1\nc\t3\n', ["a\nb", "c"], ""),
        ("p.tsv", 'prompt\tn\n"a ""b"""\t1\nc\t3\n', ['a "b"', "c"], ""),
        ("p.txt", "Prompt, Category\na cat, animals\na dog, animals\n", ["a cat", "a dog"], "column Prompt"),
        ("p.csv", 'id, "prompt"\n1, "a, b"\n2, c\n', ["a, b", "c"], "column prompt"),
        ("p.txt", "Prompt, Category\na cat, a dog, animals\n", ["Prompt, Category", "a cat, a dog, animals"], "no table (line 2: 3"),
        ("p.txt", "text, drawn on a wall\na, b\n", ["text, drawn on a wall", "a, b"], "its first line is taken for a prompt"),
        ("p.txt", '{"red"|"blue"} cat\na dog\n', ['{"red"|"blue"} cat', "a dog"], "its first line begins like JSON and is none"),
    ],
)  # fmt: skip
def test_rows(tmp_path, name, content, prompts, said):
    found, about = read(tmp_path / name, content)
    assert found == prompts
    assert said in about
    assert said == QUOTES or QUOTES not in about


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('prompt,n\na,1\n"b,2\n"c, d",3\n', "line 3: no table"),
        ('prompt,n\n"a, b",1\n"c,2\n', "line 3: no table .a quote that is not closed"),
    ],
)
def test_a_quote_that_is_not_closed_is_named(tmp_path, content, message):
    with pytest.raises(DistillError, match=message):
        read(tmp_path / "p.csv", content)


@pytest.mark.parametrize("code", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE", "UTF-16", "UTF-32"])
def test_the_code_of_a_text_is_named_as_it_is(tmp_path, code):
    with pytest.raises(DistillError, match=f"{code[:6]}, not UTF-8") as caught:
        read(tmp_path / "p.txt", "a small red circle\nschön\n漢字\n".encode(code))
    assert f"iconv -f {code} -t" in caught.value.hint


@pytest.mark.parametrize(
    "content", [bytes(1000), np.arange(400, dtype="<u2").tobytes(), b"\xff\xfe\0\xd8\0\xd8", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"]
)
def test_a_binary_file_has_no_code(tmp_path, content):
    with pytest.raises(DistillError, match="not a text file"):
        read(tmp_path / "p.txt", content)


def test_an_npz_that_claims_more_than_it_holds_is_corrupt(tmp_path):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 16, 16, 3)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as out:
        out.writestr("arr_0.npy", head.getvalue() + bytes(3000))
    with pytest.raises(DistillError, match="x.npz: corrupt"):
        read_npz(tmp_path / "x.npz")

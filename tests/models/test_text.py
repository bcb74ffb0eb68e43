"""Prompts as conditions: tokens, embeddings on the fly and from disk."""

import json

import pytest
import torch

from distill_cli.data.shapes import TRAINED
from distill_cli.diffusion.condition import Condition
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import embeddings, load
from distill_cli.models.embeddings import Embeddings, unique
from distill_cli.models.text import load_tokenizer, make_tokenizer, save_tokenizer

PART = "encoder_hidden_states"
PROMPTS = ["a small red circle", "a large blue cross", "a small red circle", "something else entirely"]


@pytest.fixture(scope="module")
def text():
    return load("tiny-sd").with_prompts(PROMPTS, "pink").text


def test_every_word_of_the_captions_is_one_token(text):
    for thing in TRAINED[::50]:
        tokens = text.readers["text_encoder"].tokens([thing.caption])[0].tolist()
        words = text.tokenizers()["tokenizer"].convert_ids_to_tokens(tokens)
        assert words[0] == "<|startoftext|>"
        assert words[1 : 1 + len(thing.caption.split())] == [f"{word}</w>" for word in thing.caption.split()]
        assert set(words[1 + len(thing.caption.split()) :]) == {"<|endoftext|>"}


def test_other_words_are_spelt_and_long_ones_cut_and_counted(text):
    assert text.readers["text_encoder"].tokens(["zoo " * 40]).shape == (1, 16)
    assert text.cut(["zoo " * 40, "a red circle", "a " * 14, "a " * 15]) == {"the 16 tokens that the text encoder reads": 2}
    assert text.readers["text_encoder"].tokens(["zoo"]).tolist() != text.readers["text_encoder"].tokens(["zap"]).tolist()


def test_a_saved_tokenizer_reads_the_same(text, tmp_path):
    save_tokenizer(text.tokenizers()["tokenizer"], tmp_path)
    assert {"vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}  # for older versions of transformers
    again = load_tokenizer(tmp_path)
    sentences = [thing.caption for thing in TRAINED[::97]] + ["", "Zoo, un café!"]
    assert again(sentences).input_ids == text.tokenizers()["tokenizer"](sentences).input_ids
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    assert load_tokenizer(tmp_path)(sentences).input_ids == text.tokenizers()["tokenizer"](sentences).input_ids


def test_labels_are_positions_in_turn(text):
    assert text.labels(6).tolist() == [0, 1, 2, 3, 0, 1]
    assert text.given(PROMPTS, "", 3).labels(5, start=2).tolist() == [0, 1, 1, 1, 2]
    with pytest.raises(UsageError, match="no classes"):
        text.labels(1, [3])
    with pytest.raises(UsageError, match="prompts"):
        text.given(()).labels(1)


def test_equal_prompts_are_encoded_once(text, monkeypatch):
    seen = []
    real = type(text).encode
    monkeypatch.setattr(type(text), "encode", lambda self, prompts: seen.append(list(prompts)) or real(self, prompts))
    out = text(torch.tensor([2, 3, 0]))
    assert seen == [[PROMPTS[0], PROMPTS[3]]]
    out = out.parts[PART]
    assert torch.equal(out[0], out[2])
    assert torch.allclose(out[1], real(text, [PROMPTS[3]]).parts[PART][0], atol=1e-5)


def test_unique():
    rows, firsts = unique(["b", "a", "b", "c", "a"])
    assert rows.tolist() == [0, 1, 0, 2, 1]
    assert firsts.tolist() == [0, 1, 3]


def test_embeddings_on_disk_are_those_of_the_encoder_and_are_made_once(text, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD", 2)
    table = Embeddings(text, tmp_path, "float32")
    assert table.shards == 2  # three different prompts
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.allclose(table(labels).parts[PART], text(labels).parts[PART], atol=1e-5)
    assert torch.allclose(table.null.parts[PART], text.null.parts[PART], atol=1e-6)
    files = sorted(table.folder.iterdir())
    before = [path.read_bytes() for path in files]
    monkeypatch.setattr(type(text), "encode", lambda self, prompts: Condition({PART: torch.zeros(len(prompts), 16, 16)}))
    again = Embeddings(text, tmp_path, "float32")
    assert torch.equal(again(labels).parts[PART], table(labels).parts[PART])
    assert torch.equal(again.null.parts[PART], table.null.parts[PART])  # which another number of threads would compute to other bits
    assert [path.read_bytes() for path in files] == before


def test_what_makes_other_embeddings_has_another_folder(text, tmp_path):
    folders = {Embeddings(other, tmp_path, kind).folder for other in (text, text.given(PROMPTS[:2], "pink"), text.given(PROMPTS, ""))
               for kind in ("float32", "float16")}  # fmt: skip
    assert len(folders) == 6


def test_a_damaged_shard_is_found(text, tmp_path):
    table = Embeddings(text, tmp_path, "float16")
    table.complete(torch.device("cpu"))
    path = table.path(0)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(DistillError, match="corrupt"):
        Embeddings(text, tmp_path, "float16")(torch.tensor([0]))


def test_a_new_vocabulary_is_the_same_again():
    """Pairs that are as frequent as others are merged in one order: a resumed run has the same numbers of words."""
    captions = [thing.caption for thing in TRAINED[::20]]
    made = {json.dumps(make_tokenizer(captions, 16).get_vocab(), sort_keys=True) for _ in range(12)}
    assert len(made) == 1

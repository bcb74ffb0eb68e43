"""A text encoder with its tokenizer; reading and writing CLIP's (Radford et al. 2103.00020)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_cli.config import TextConfig
from distill_cli.errors import DistillError, reason
from distill_cli.models.parts import check_file, has_vocabulary, plain, quiet, read_json
from distill_cli.tensors import write

START, END = "<|startoftext|>", "<|endoftext|>"
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
"""Names of CLIP's tokenizer class in versions of transformers."""


@dataclass
class Reader:
    """A text encoder with its tokenizer. It reads `length` tokens of a prompt."""

    tokenizer: Any
    encoder: Any
    length: int

    @property
    def place(self) -> torch.device:
        """The encoder's device."""
        return next(self.encoder.parameters()).device

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """(B, length) tokens, truncated or padded, on the CPU."""
        made = self.tokenizer(list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        return made.input_ids

    def cut(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the encoder reads."""
        made = self.tokenizer(list(prompts), truncation=True, max_length=self.length + 1).input_ids
        return sum(len(tokens) > self.length for tokens in made)

    def made_tokenizer(self, captions: Sequence[str]) -> Any:
        """A tokenizer of its kind with a vocabulary of these captions, where its own is not at hand."""
        return make_tokenizer(captions, self.length)


def clip_reader(tokenizer: Any, encoder: Any) -> Reader:
    """A reader of as many tokens as tokenizer and encoder know places for."""
    return Reader(tokenizer, encoder, min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings)))


def make_tokenizer(captions: Iterable[str], length: int) -> Any:
    """CLIP's tokenizer with a new vocabulary: every word of `captions` is one token, other text is spelt by letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = sorted(set(captions))
    letters = sorted(set("".join("".join(texts).split())))
    first = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
    ]  # else numbered at random, which orders equally frequent pairs
    trainer = trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False, special_tokens=first)
    trained.train_from_iterator(texts, trainer)
    pairs = merges_of(json.loads(trained.to_str())["model"])
    known = byte_letters()
    words = [*known, *(f"{letter}</w>" for letter in known), *("".join(pair.split()) for pair in pairs), START, END]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "bos_token": START, "eos_token": END, "unk_token": END}
    files = {
        "vocab.json": json.dumps({word: number for number, word in enumerate(dict.fromkeys(words))}),
        "merges.txt": merges_file(pairs),
        "tokenizer_config.json": json.dumps({**config, "pad_token": END}),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        return load_tokenizer(Path(folder))


def merges_of(model: dict[str, Any]) -> list[str]:
    """The merges of a tokenizer.json's model, which newer versions of tokenizers write as pairs."""
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]


def merges_file(merges: list[str]) -> str:
    return "\n".join(["#version: 0.2", *merges]) + "\n"


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in GPT-2's and CLIP's vocabularies (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + k) for k in range(len(hidden))]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a pipeline's folder. Raises DistillError if it has no vocabulary or no maximum length."""
    from transformers import CLIPTokenizer

    if not folder.is_dir():
        raise DistillError(f"{folder}: no such folder", "is the model complete?")
    for file in folder.iterdir():
        check_file(file)
    if not has_vocabulary(folder):
        raise DistillError(f"{folder}: no vocabulary: tokenizer.json, or vocab.json and merges.txt", "is the folder complete?")
    config = folder / "tokenizer_config.json"
    kind = read_json(config).get("tokenizer_class") if config.exists() else None
    if kind not in (None, *CLASSES):
        raise DistillError(f"{config}: tokenizer_class is {json.dumps(kind)}, not {CLASSES[0]}", "CLIP's text encoders are read")
    quiet()
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises errors of many classes for broken files
        raise DistillError(f"{folder}: no readable tokenizer ({reason(error)})", "is the folder complete?") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)  # transformers 4 has none here
    words = tokenizer.encoder if backend is None else backend.get_vocab(with_added_tokens=False)
    lacking = [word for word in (tokenizer.bos_token, tokenizer.eos_token, *byte_letters()) if word not in words]
    if lacking:
        raise DistillError(f"{folder}: its vocabulary lacks {lacking[0]!r} ({len(lacking)} in all)", "is it CLIP's, and complete?")
    length = tokenizer.model_max_length
    if type(length) not in (int, float) or not length >= 2 or length % 1 != 0:
        raise DistillError(f"{config}: model_max_length is {json.dumps(length)}, a whole number of 2 or more is expected")
    return tokenizer


def load_fast_tokenizer(folder: Path, classes: Sequence[str]) -> Any:
    """The tokenizer in a folder whose tokenizer.json holds all of it. Raises DistillError for one of another class than `classes`."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise DistillError(f"{folder}: no tokenizer.json", f"a {classes[0]}'s vocabulary is read from it")
    for file in folder.iterdir():
        check_file(file)
    config = folder / "tokenizer_config.json"
    kind = read_json(config).get("tokenizer_class") if config.exists() else None
    if kind is not None and str(kind).removesuffix("Fast") not in {name.removesuffix("Fast") for name in classes}:
        raise DistillError(f"{config}: tokenizer_class is {json.dumps(kind)}, not {classes[0]}", "is it of another model?")
    quiet()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises errors of many classes for broken files
        raise DistillError(f"{folder}: no readable tokenizer ({reason(error)})", "is the folder complete?") from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer for any version of transformers: older ones need CLIP's vocab.json and merges.txt."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # it keeps how it was called last, and the file would depend on whether prompts were embedded
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    if (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        if "merges" not in model:  # T5's, which all versions read as it is
            return
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
        (folder / "merges.txt").write_text(merges_file(merges_of(model)))


def create_encoder(text: TextConfig, tokenizer: Any, seed: int, kind: str = "CLIPTextModel") -> Any:
    """A text encoder of CLIP, of transformers' class `kind`, with random weights of `seed`."""
    import transformers

    config = text_config(text, tokenizer, text.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, kind)(config)


def text_config(text: TextConfig, tokenizer: Any, features: int) -> Any:
    """transformers' configuration of a text encoder of CLIP, whose projected embeddings have so many `features`."""
    import transformers

    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.length,
        projection_dim=features,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_encoder(encoder: Any, folder: Path) -> None:
    """Write a text encoder under the names of published files, which any version of transformers reads: each tensor once."""
    kind, tied, every = type(encoder).__name__, getattr(encoder, "_tied_weights_keys", None) or (), encoder.state_dict()
    first = {value.data_ptr() for name, value in every.items() if name not in tied}
    twice = {name for name in tied if name in every and every[name].data_ptr() in first}
    named = {name: value for name, value in every.items() if not name.endswith("position_ids") and name not in twice}
    weights = {f"text_model.{plain(name)}": value for name, value in named.items()} if kind == "CLIPTextModel" else named
    encoder.config.architectures = [kind]
    encoder.config.save_pretrained(folder)
    write(folder / "model.safetensors", weights, {"format": "pt"})

"""Language models as text encoders (Gemma, Qwen): how a pipeline asks them about a prompt, and what it takes of their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_cli.diffusion.condition import Condition
from distill_cli.errors import DistillError
from distill_cli.models.conditioners import PromptConditioner
from distill_cli.models.text import Reader, load_fast_tokenizer

MASK = "encoder_attention_mask"
"""The part of a condition (B, L) that is 1 at the tokens of the text and 0 where it is filled up."""
AT_A_TIME = 4
"""Prompts in a call of a language model, whose answers of all layers are kept."""
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""The class of a tokenizer that is all in its tokenizer.json, in two versions of transformers."""


@dataclass(frozen=True)
class Wording:
    """How a pipeline asks about a prompt. By default: the prompt as it is, and the last answer to `length` tokens."""

    length: int
    layers: tuple[int, ...] = (-1,)
    """The hidden states that stand side by side in the text: -1 are the last ones, normed, 0 the embeddings of the tokens."""
    chat: Mapping[str, Any] | None = None
    """Options of the tokenizer's chat template, in which the prompt is what a user says; None without a chat."""
    before: Callable[[], str] = str
    """What stands before a prompt, as the installed diffusers has it; not before a negative one."""
    kept: bool = False
    """Whether `before` is cut away from the answers again but for its first token: the text is then the last `length` - 1 of them."""
    lower: bool = False
    """Whether prompts are in small letters, without blanks around them."""
    masked: bool = True
    """Whether the network is told which tokens are filled up."""
    right: bool = False
    """Whether the text is filled up on the right, whatever the tokenizer says."""


@dataclass
class LanguageReader(Reader):
    """A language model with its tokenizer, asked in this wording."""

    wording: Wording = field(default_factory=lambda: Wording(1))
    instructed: int | None = None
    """The tokens of what stands before a prompt, without two that begin and end it; None before they are counted."""

    def asked(self, prompts: Sequence[str], negative: bool = False) -> list[str]:
        """What the model reads for prompts."""
        wording = self.wording
        texts = [prompt.lower().strip() for prompt in prompts] if wording.lower else list(prompts)
        if wording.chat is not None:
            turns = [[{"role": "user", "content": text}] for text in texts]
            return [self.tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True, **wording.chat) for each in turns]
        return texts if negative else [wording.before() + text for text in texts]

    def most(self, negative: bool = False) -> int:
        """The tokens that the model reads at most."""
        if not self.wording.kept or negative:
            return self.length
        if self.instructed is None:
            self.instructed = len(self.tokenizer.encode(self.wording.before(), verbose=False)) - 2
        return self.length + self.instructed

    def read(self, prompts: Sequence[str], negative: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens and mask (B, N) of prompts, on the CPU."""
        texts, most = self.asked(prompts, negative), self.most(negative)
        made = self.tokenizer(texts, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
        return made.input_ids, made.attention_mask

    def made_tokenizer(self, captions: Sequence[str]) -> Any:
        return make_tokenizer(captions, self.length)

    def cut(self, prompts: Sequence[str]) -> int:
        made = self.tokenizer(self.asked(prompts), truncation=True, max_length=self.most() + 1).input_ids
        return sum(len(tokens) > self.most() for tokens in made)

    def states(self, prompts: Sequence[str], negative: bool = False) -> tuple[Tensor, Tensor]:
        """The text (B, length, width) of prompts, and its mask (B, length), on the encoder's device: the filled-up tokens stand last."""
        tokens, mask = (each.to(self.place) for each in self.read(prompts, negative))
        answer = self.encoder.base_model(tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
        text = torch.cat([answer.hidden_states[layer] for layer in self.wording.layers], -1)
        if self.wording.kept:
            rows = [0, *range(1 - self.length, 0)]
            text, mask = text[:, rows], mask[:, rows]
        if self.wording.masked:
            order = mask.sort(dim=1, descending=True, stable=True).indices
            text, mask = text.gather(1, order[..., None].expand_as(text)), mask.gather(1, order)
        return text, mask


class LanguagePrompts(PromptConditioner):
    """Prompts through one language model: its text, and which of its tokens are filled up, if the network is told."""

    def __init__(self, reader: LanguageReader) -> None:
        wording = reader.wording
        width = len(wording.layers) * int(reader.encoder.config.hidden_size)
        self._reads({"text_encoder": reader}, {self.part: (reader.length, width), **({MASK: (reader.length,)} if wording.masked else {})})

    @property
    def asks(self) -> str:  # type: ignore[override]
        reader: Any = self.readers["text_encoder"]
        return json.dumps([reader.asked(["A b"]), reader.asked(["A b"], negative=True), reader.wording.layers])

    def encoded(self, prompts: Sequence[str], negative: bool = False) -> Condition:
        reader: Any = self.readers["text_encoder"]
        parts = [reader.states(prompts[first : first + AT_A_TIME], negative) for first in range(0, len(prompts), AT_A_TIME)]
        text, mask = (torch.cat([part[k] for part in parts]) for k in (0, 1))
        return Condition({self.part: text, MASK: mask} if MASK in self.shapes else {self.part: text})

    def without(self) -> Condition:
        with torch.no_grad(), torch.autocast(self.readers["text_encoder"].place.type, enabled=False):
            return self.encoded([self.negative or ""], negative=True).map(Tensor.float)

    def example(self, count: int, device: str | torch.device) -> Condition:
        made = super().example(count, device)
        return made.plus(MASK, torch.ones_like(made.parts[MASK])) if MASK in self.shapes else made


def planned(tensor: Tensor) -> bool:
    """Whether a tensor is of a plan, and has no numbers."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


def lengths_of(mask: Tensor) -> list[int]:
    """The number of tokens of each text, of its mask (B, L): all of them in a plan. On a GPU the host waits for it."""
    if planned(mask):
        return [mask.shape[1]] * len(mask)
    found: list[int] = (mask > 0).sum(1).tolist()
    return found


def load_reader(folder: Path, encoder: Any, wording: Wording, classes: Sequence[str]) -> LanguageReader:
    """A reader with the tokenizer in a pipeline's folder, which is of one of these classes. Raises DistillError where it does not fit."""
    tokenizer = load_fast_tokenizer(folder, (*classes, *PLAIN))
    if wording.right:
        tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        raise DistillError(f"{folder}: names no pad_token", "texts are filled up to one length")
    if wording.chat is not None and not tokenizer.chat_template:
        raise DistillError(
            f"{folder}: no chat template", "the pipeline asks as a user does: tokenizer_config.json or chat_template.jinja has it"
        )
    layers = int(encoder.config.num_hidden_layers)
    beyond = [layer for layer in wording.layers if not -layers <= layer <= layers]
    if beyond:
        raise DistillError(f"{folder.parent / 'text_encoder'}: {layers} layers, and the pipeline takes the answer of layer {beyond[0]}")
    return LanguageReader(tokenizer, encoder, wording.length, wording)


def named(tokenizer: Any) -> str:
    """A tokenizer's class, by the name that all versions of transformers have."""
    kind = type(tokenizer).__name__
    return PLAIN[0] if kind in PLAIN else f"{kind.removesuffix('Fast')}Fast"


GEMMA_2B = dict(
    vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
    head_dim=256,
)  # fmt: skip
QWEN3_4B = dict(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
"""The published configurations of gemma-2-2b and Qwen3-4B."""
TINY = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1)
PAD, FIRST, UNKNOWN = "<pad>", "<bos>", "<unk>"
CHAT = (
    "{% for message in messages %}<user> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<reply>{% if enable_thinking is defined and not enable_thinking %} <plain>{% endif %}{% endif %}"
)


def make_tokenizer(captions: Sequence[str], length: int) -> Any:
    """A tokenizer for tiny models: every word of `captions` is a token, others are spelt by letters; it begins with a token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [PAD, FIRST, UNKNOWN, "<user>", "<end>", "<reply>", "<plain>"]
    words = sorted({word for caption in captions for word in caption.split()})
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = {word: k for k, word in enumerate(dict.fromkeys([*special, *words, *letters, *(f"##{letter}" for letter in letters)]))}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single=f"{FIRST} $A", special_tokens=[(FIRST, vocabulary[FIRST])])
    tokens: Any = {"pad_token": PAD, "bos_token": FIRST, "unk_token": UNKNOWN}
    out = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **tokens)
    out.chat_template = CHAT
    return out

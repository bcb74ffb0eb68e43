"""Types of options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

BUILTIN_SETS = {
    "digits": "data.images:Digits",
    "shapes": "data.shapes:Shapes",
    "two-modes": "data.points:TwoModes",
    "s-curve": "data.points:SCurve",
    "moons": "data.points:Moons",
    "rings": "data.points:Rings",
}
"""Built-in sets of data by name; the class of each as "module:class" inside this package."""
PROMPT_SETS = ("shapes", "shapes-held")
"""Built-in sets of prompts (data/prompts.py)."""
Solver = Literal["heun", "heun-churn", "euler", "ddim", "ancestral", "few-step", "pndm", "dpm++"]
GuidanceRule = Literal["plain", "renormed rows"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
_VARIABLE = re.compile(r"\$(?:(\$|\w+)|\{([^}]*)\})", re.ASCII)


def expanded(value: Any) -> Any:
    """Expand `~`, $NAME and ${NAME} in a path or a name, as a shell does; $$ becomes $. Raises ValueError for an unset variable.

    A path that exists is returned unchanged, and so is a Path, which was expanded before.
    """
    if not isinstance(value, str):
        return value
    text = value
    if not text:
        raise ValueError("is empty")
    if "\0" in text:
        raise ValueError("contains a null character")
    if not os.path.exists(text):
        text = _VARIABLE.sub(_variable, text)
    out = os.path.expanduser(text)
    if out.startswith("~") and not os.path.exists(out):
        raise ValueError(f"{out.partition('/')[0]} is no user's home: give the whole path if the name begins with ~")
    return out


def unexpanded(value: str) -> str:
    """The text that `expanded` turns into `value`."""
    return (os.path.abspath(value) if value.startswith("~") else value).replace("$", "$$")


def _variable(found: re.Match[str]) -> str:
    """The value of $NAME or ${NAME}, and $ for $$; $1 and the like stay."""
    name = found[1] if found[2] is None else found[2]
    if name == "$":
        return "$"
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        if found[2] is None:
            return found[0]
        raise ValueError(f"{found[0]} is not the form $NAME or ${{NAME}}")
    if not os.environ.get(name):
        raise ValueError(f"${name} is {'empty' if name in os.environ else 'not set'} ($$ is a dollar sign)")
    return os.environ[name]


def _classes(value: Any) -> Any:
    """`0-3,7` -> [0, 1, 2, 3, 7]."""
    if value == []:
        raise ValueError("no class given")
    if not isinstance(value, str):
        return [value] if isinstance(value, int) else value
    out: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{value!r} is not like 0-3,7")
        out += range(int(first), int(last or first) + 1)
    return out


def _text(value: Any) -> Any:
    """Raise ValueError for text with bytes that are not UTF-8, which Python keeps as surrogates."""
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("contains a byte that is not UTF-8")
    return value


def seconds(every: int | str) -> float | None:
    """`10m` -> 600; None for a number of steps."""
    return None if isinstance(every, int) else float(every[:-1]) * {"s": 1, "m": 60, "h": 3600}[every[-1]]


def _every(value: Any) -> Any:
    """A number of steps, or a time such as 10m."""
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"(?=.*[1-9])(\d{1,9}|\d{1,9}(\.\d{1,9})?[smh])", text):
        raise ValueError(f"{value!r} is neither a number of steps nor a time such as 30s, 10m, 2h")
    return int(text) if text.isdigit() else text


UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def size(text: str) -> int:
    """`24GB` -> 24,000,000,000."""
    number, unit = text[: text.index(next(filter(str.isalpha, text)))], "".join(filter(str.isalpha, text))
    return int(float(number) * UNITS[unit])


def _size(value: Any) -> Any:
    """A number of bytes with its unit."""
    text = "".join(str(value).split())
    if not re.fullmatch(rf"(?=.*[1-9])\d{{1,9}}(\.\d{{1,9}})?({'|'.join(UNITS)})", text):
        raise ValueError(f"{value!r} is no size such as 24GB or 22.5GiB")
    return text


def numbers(value: Any) -> Any:
    """`8,16` -> ["8", "16"], and one number a list of it."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, bool | int | float) else value


def _names(value: Any) -> Any:
    """`a,b` -> ["a", "b"]; so is each text of a list."""
    texts = [value] if isinstance(value, str) else value
    return [part.strip() for text in texts for part in str(text).split(",")] if isinstance(texts, list) else texts


Numbers = BeforeValidator(numbers)
"""For a list that may stand without brackets."""
Names = BeforeValidator(_names)
"""For a list of names that may stand without brackets."""
Place = Annotated[Path, BeforeValidator(expanded)]
"""A file or folder."""
Name = Annotated[str, BeforeValidator(expanded)]
"""The name of a model or a set, which may be a file or folder."""
Text = Annotated[str, BeforeValidator(_text)]
"""Free text: a prompt, or a list of times."""
Every = Annotated[int | str, BeforeValidator(_every)]
Size = Annotated[str, BeforeValidator(lambda value: None if value is None else _size(value))]
"""Bytes with a unit: 24GB."""
Precision = Annotated[
    Literal["no", "tf32", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)  # as YAML reads no
]
Texts = Annotated[
    Literal["stored", "live"],
    Field(description="text-to-image: stored: all prompts are encoded before the first step, on disk; live: each step's, ahead of it"),
]
"""For methods that draw prompts."""
Range = Annotated[tuple[Rate, Rate], Numbers]
"""A range of guidance scales: LOW,HIGH."""
Compile = Literal["none", "blocks", "whole"]
Classes = Annotated[list[Count] | None, BeforeValidator(_classes)]


def outside(span: tuple[float, float] | None, scale: float | None) -> dict[str, bool]:
    """Possible faults of the keys guidance_range and guidance_scale: message -> whether there is one."""
    low, high = span or (1.0, 1.0)
    return {
        f"guidance_range {low:g},{high:g} does not rise from 1 or more": span is not None and not 1 <= low < high,
        f"guidance_scale {scale} is outside guidance_range {low:g},{high:g}": bool(span and scale)
        and low < high
        and not low <= (scale or 0) <= high,
    }


def check_range(span: tuple[float, float] | None, scale: float | None) -> None:
    """Raise ValueError for the first of these faults."""
    for problem, there in outside(span, scale).items():
        if there:
            raise ValueError(problem)


class Config(BaseModel):
    """Options of one command; extra keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Keys of other commands -> what this one has in their place, as a hint."""

    out: Place | None = Field(None, description="folder of the results; default runs/ and the name of the recipe or command")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random: noise, order, times")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where networks run; auto: a GPU if there is one")

    def changed(self, *keys: str) -> list[str]:
        """Those of some keys whose values are not their defaults."""
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]

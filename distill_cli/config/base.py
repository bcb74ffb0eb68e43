"""Kinds of options that several commands have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

BUILTIN_SETS = ("digits", "shapes")
"""Sets of images that are known by name (data/images.py)."""
PROMPT_SETS = ("shapes", "shapes-held")
"""Sets of prompts that are known by name (data/prompts.py)."""
Solver = Literal["heun", "euler", "ddim", "ancestral", "few-step", "pndm", "dpm++"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def _classes(value: Any) -> Any:
    """`0-3,7` -> [0, 1, 2, 3, 7]."""
    if isinstance(value, int):
        return [value]
    if not isinstance(value, str):
        return value
    out: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{value!r} is not like 0-3,7")
        out += range(int(first), int(last or first) + 1)
    return out


def _not_empty(value: list[int] | None) -> list[int] | None:
    if value is not None and not value:
        raise ValueError("no class given")
    return value


def _no(value: Any) -> Any:
    """YAML 1.1 reads `no` as false."""
    return "no" if value is False else value


_SECONDS = {"s": 1, "m": 60, "h": 3600}


def seconds(every: int | str) -> float | None:
    """`10m` -> 600; None for a number of steps."""
    return None if isinstance(every, int) else float(every[:-1]) * _SECONDS[every[-1]]


def _every(value: Any) -> Any:
    """Steps, or a time such as 10m."""
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"(?=.*[1-9])(\d{1,9}|\d{1,9}(\.\d{1,9})?[smh])", text):
        raise ValueError(f"{value!r} is neither a number of steps nor a time such as 30s, 10m, 2h")
    return int(text) if text.isdigit() else text


Every = Annotated[int | str, BeforeValidator(_every)]
Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_no)]
Classes = Annotated[list[Count] | None, BeforeValidator(_classes), AfterValidator(_not_empty)]


class Config(BaseModel):
    """Options of one command; extra keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    out: Path | None = Field(None, description="folder of the results; default runs/NAME")
    seed: int = Field(0, ge=0, lt=2**63, description="of all noise, orders and times")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where networks run")

"""Where a model came from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from distill_cli.errors import printable

Text = Annotated[str, AfterValidator(lambda text: printable(text))]
"""Text of a model that may be someone else's: shown on terminals, in cards and in JSON."""


class Lineage(BaseModel):
    """Where a model came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Text
    kind: Literal["teacher", "student"] = "teacher"
    method: Text = ""
    teacher: Text = ""
    teacher_hash: Text = ""
    licence: Text = ""
    data: Text = ""

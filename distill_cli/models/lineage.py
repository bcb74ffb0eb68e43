"""Where a model came from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from distill_cli.errors import printable

Text = Annotated[str, AfterValidator(lambda text: printable(text))]
"""Text from a model folder, which may be foreign: control characters are escaped for terminals, cards and JSON."""


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

"""The report of an evaluation as one HTML page: table, charts, pictures, settings. It needs no network and no script.

The page is made from the report and the pictures alone: what a measure adds to the report's columns and rows appears by itself.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from distill_cli.data.pictures import png
from distill_cli.errors import printable_lines
from distill_cli.evaluate import charts
from distill_cli.files import write_atomic

PAGE, TEMPLATE = "report.html", "report.html.jinja"
WHOLE, SHRUNK, QUALITY = 128, 384, 90
"""Pictures up to WHOLE pixels stand in the page as they are; larger ones as JPEG of at most SHRUNK pixels."""
SMALL, LARGE = 64, 192
"""Widths in pixels: small pictures are enlarged to SMALL by a whole number, large ones are shown at LARGE."""
TABLES = ("rows", "warnings", "columns")
"""Parts of a report that have a place of their own in the page."""

Strip = tuple[str, np.ndarray, Sequence[str]]
"""A row of pictures: its title, (B, H, W, 3) uint8, and captions."""


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """A value of the table as it stands in report.md; '' for one that a row does not have."""
    value = row.get(key)
    return "" if value is None else f"{value:{form}}"


def words(value: Any) -> str:
    """A setting in words."""
    return ", ".join(map(words, value)) if isinstance(value, list) else "none" if value is None else str(value)


def address(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data: address."""
    if max(picture.shape[:2]) <= WHOLE:
        return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
    small, buffer = Image.fromarray(picture), io.BytesIO()
    small.thumbnail((SHRUNK, SHRUNK))
    small.save(buffer, "jpeg", quality=QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def strip(title: str, images: np.ndarray, captions: Sequence[str]) -> dict[str, Any]:
    """A row of pictures as the template takes it."""
    width, longest = images.shape[2] * max(1, SMALL // images.shape[2]), max(images.shape[1:3])
    return {
        "title": title,
        "images": list(map(address, images)),
        "captions": captions,
        "width": min(width, LARGE),
        "large": longest > WHOLE,
    }


def shown(value: Any) -> Any:
    """Text from outside without control characters; what is HTML already stays."""
    return printable_lines(value) if type(value) is str else value


def page(
    name: str,
    report: dict[str, Any],
    sampled: dict[str, tuple[str, str]],
    settings: dict[str, Any],
    pictures: Sequence[tuple[str, np.ndarray]],
    captions: Sequence[str],
    worst: Sequence[Strip],
) -> str:
    """The page as HTML. `sampled` are the columns about sampling; `captions` are those of the columns of pictures; without them columns are numbered."""
    measured: dict[str, tuple[str, str]] = report["columns"]
    rows = report["rows"]
    columns = sampled | measured
    curves = list(dict.fromkeys(charts.curve_of(row["model"]) for row in rows))
    drawn = {title: [charts.chart(title, *column, axis, rows, curves) for axis in charts.AXES] for title, column in measured.items()}
    environment = Environment(
        loader=PackageLoader("distill_cli.evaluate", "."), autoescape=True, undefined=StrictUndefined, finalize=shown,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE).render(
        name=name,
        facts={key: words(value) for key, value in report.items() if isinstance(value, str | int | float)},
        warnings=report["warnings"],
        heads=list(columns),
        cells=[[cell(row, *column) for column in columns.values()] for row in rows],
        curves=curves,
        charts={title: [each for each in two if each] for title, two in drawn.items() if any(two)},
        at=charts,
        strips=[strip(title, images, ()) for title, images in pictures],
        same=" and the same prompt" if captions else "",
        heading=list(captions) or list(map(str, range(max((len(images) for _, images in pictures), default=0)))),
        worst=[strip(*each) for each in worst],
        about={"settings": settings} | {key: value for key, value in report.items() if isinstance(value, dict) and key not in TABLES},
        words=words,
    )


def write(folder: Path, *parts: Any) -> None:
    """Write the page of an evaluation into its folder; `parts` are the arguments of `page` after the name."""
    write_atomic(folder / PAGE, page(folder.resolve().name, *parts).encode(errors="backslashreplace"))

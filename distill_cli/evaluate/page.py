"""The report of an evaluation as one HTML page: table, charts, pictures, settings. It needs no network and no script.

The page is made from the report and the pictures alone: what a measure adds to the report's columns and rows appears by itself.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import groupby
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
SMALL, CAPTIONED, LARGE = 64, 128, 192
"""Widths in pixels: pictures are enlarged by a whole number to SMALL, to CAPTIONED under captions, and shown at LARGE at most."""
SPREAD = "_spread"
"""The end of the key of a score's spread: its standard error, or standard deviation over subsets or resamples."""
TABLES = ("rows", "warnings", "columns")
"""Parts of a report that have a place of their own in the page."""

Strip = tuple[str, np.ndarray, Sequence[str]]
"""A row of pictures: its title, (B, H, W, 3) uint8, and captions."""


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """A value of the table, here and in report.md, with its spread behind it; '' for one that a row does not have."""
    value, spread = row.get(key), row.get(key + SPREAD)
    return "" if value is None else f"{value:{form}}{'' if spread is None else f' ± {spread:{form}}'}"


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


def table(strips: Sequence[Strip], heading: Sequence[str] = ()) -> dict[str, Any]:
    """Rows of pictures as the template takes them. Neighbouring columns with the same heading share it; without one they are numbered."""
    widest, longest = (max(measured(images) for _, images, _ in strips) for measured in (lambda x: x.shape[2], lambda x: max(x.shape[1:3])))
    least = CAPTIONED if heading or any(captions for *_, captions in strips) else SMALL
    count = max(len(images) for _, images, _ in strips)
    return {
        "rows": [{"title": title, "images": list(map(address, images)), "captions": captions} for title, images, captions in strips],
        "heading": [(text, len(list(same))) for text, same in groupby(heading or map(str, range(count)))],
        "count": count,
        "width": min(LARGE, widest * max(1, least // widest)),
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
    """The page as HTML.

    `sampled` are the table's columns about sampling, as in the report. `captions` say what the pictures of a column have in common.
    """
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
        pictures=table([(title, images, ()) for title, images in pictures], captions) if pictures else None,
        prompted=bool(captions),
        worst=[table([each]) for each in worst],
        about={"settings": settings} | {key: value for key, value in report.items() if isinstance(value, dict) and key not in TABLES},
        words=words,
    )


def write(folder: Path, *parts: Any) -> None:
    """Write the page of an evaluation into its folder; `parts` are the arguments of `page` after the name."""
    write_atomic(folder / PAGE, page(folder.resolve().name, *parts).encode(errors="backslashreplace"))

"""A run's folder as one HTML page: losses, health, sample grids, throughput, warnings. The page needs no network and no script."""

from __future__ import annotations

import base64
import math
import re
import time
from collections.abc import Iterable
from html import escape as of_html
from pathlib import Path
from typing import Any

from distill_cli.errors import DistillError, UsageError, printable_lines
from distill_cli.files import write_atomic
from distill_cli.recipes import parse_yaml, text_of
from distill_cli.runs import Run, parsed

REPORT = "report.html"
WIDE, HIGH, LEFT, BOTTOM = 440, 190, 64, 22
POINTS, GRIDS = 400, 9
SMALL, LARGE = 1e-100, 1e100
"""Smallest and largest magnitude that a chart can show."""
HEALTH = "health_"
"""What the metrics of a look at the student's pictures begin with."""
TEACHERS = {f"{HEALTH}{name}": 1.0 for name in ("luminance", "saturation", "contrast", "sharpness", "spread")}
"""Metrics that are ratios to the teacher's -> the teacher's own value, drawn as a dashed line."""
Points = list[tuple[float, float]]
STYLE = """
:root { color-scheme: light dark; --line: #2563a8; --rule: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dt { opacity: .7; } dd { margin: 0; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
figcaption { font-size: .9rem; } svg text { font-size: 11px; fill: currentColor; }
svg .rule { stroke: var(--rule); } svg polyline { fill: none; stroke: var(--line); stroke-width: 1.5; }
svg .teacher { stroke: currentColor; stroke-dasharray: 4 3; opacity: .6; }
.warnings { color: #b3261e; } svg circle { fill: var(--line); } .grids { display: flex; flex-wrap: wrap; gap: 1rem; }
img { max-width: 100%; image-rendering: pixelated; } pre { overflow-x: auto; font-size: .85rem; }
"""


def escape(text: str) -> str:
    """Text as HTML, without control characters."""
    return of_html(printable_lines(text))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that a run may still be writing; a torn line is left out."""
    lines = []
    for text in path.read_bytes().split(b"\n") if path.is_file() else []:
        line = parsed(text)
        step = number(line.get("step")) if line else None
        if line and step is not None and 0 <= step < 2**53 and step == int(step):
            lines.append({**line, "step": int(step)})
    return lines


def number(value: Any) -> float | None:
    """`value` if a chart can show it, else None."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < LARGE:
        return None
    return value if abs(value) > SMALL else 0


def series(lines: Iterable[dict[str, Any]]) -> dict[str, Points]:
    """Each metric's finite values by step."""
    out: dict[str, Points] = {}
    for line in lines:
        for key, value in line.items():
            drawn = number(value)
            if key not in ("step", "images", "time") and drawn is not None:
                out.setdefault(key, []).append((line["step"], drawn))
    return out


def thinned(points: Points, most: int = POINTS) -> Points:
    """About `most` points at most: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    out: Points = []
    for first in range(0, len(points), size):
        part = points[first : first + size]
        out += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return out


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers between `low` and `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def warned(lines: Iterable[dict[str, Any]]) -> list[str]:
    """The warnings of the newest line, each with the step since which it has been shown."""
    since: dict[str, tuple[int, str]] = {}
    for line in lines:
        found = line.get("warnings")
        texts = {text.partition(":")[0]: text for text in found if isinstance(text, str)} if isinstance(found, list) else {}
        since = {name: (since.get(name, (line["step"], ""))[0], text) for name, text in texts.items()}
    return [f"since step {step:,}: {text}" for step, text in since.values()]


def chart(name: str, points: Points) -> str:
    """A metric as SVG, with the teacher's value where it is known; logarithmic if it spans more than a factor of 50."""
    level = TEACHERS.get(name)
    values = [value for _, value in points] + ([] if level is None else [level])
    logarithmic = min(values) > 0 and max(values) > 50 * min(values)
    shape = [(step, math.log10(value) if logarithmic else value) for step, value in thinned(points)]
    at = None if level is None else math.log10(level) if logarithmic else level
    heights = [y for _, y in shape] + ([] if at is None else [at])
    low, high = min(heights), max(heights)
    pad = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high, first, last = low - pad, high + pad, min(x for x, _ in shape), max(x for x, _ in shape)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return LEFT + (WIDE - LEFT - 8) * across, (HIGH - BOTTOM - 8) * (high - y) / (high - low) + 8

    parts = []
    for value in ticks(low, high):
        y = place(first, value)[1]
        shown = 10**value if logarithmic else value
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDE - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown:.3g}</text>')
    for step in sorted({first, last}):
        x, anchor = place(step, low)[0], "end" if step == last > first else "start"
        parts.append(f'<text x="{x:.1f}" y="{HIGH - 6}" text-anchor="{anchor}">{step:,.0f}</text>')
    if at is not None:
        y = place(first, at)[1]
        parts.append(f'<line class="teacher" x1="{LEFT}" x2="{WIDE - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in shape))
    x, y = place(*shape[-1])
    parts.append(f'<polyline points="{path}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>')
    scale = ", logarithmic" if logarithmic else ""
    title = f"{escape(name)}: {points[-1][1]:.4g} at step {points[-1][0]:,.0f}{scale}"
    svg = f'<svg viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{svg}</figure>"


def picture(path: Path, caption: str) -> str:
    """A PNG file as a figure, embedded in the page."""
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        return f"<figure><figcaption>{escape(caption)}: {escape((error.strerror or str(error)).lower())}</figcaption></figure>"
    return f'<figure><figcaption>{escape(caption)}</figcaption><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>'


def grids(run: Run) -> list[Path]:
    """At most `GRIDS` sample grids, spread evenly from the first to the newest."""
    found = sorted(path for path in run.samples.glob("*.png") if re.fullmatch(r"\d+\.png", path.name) and not path.is_symlink())
    if len(found) <= GRIDS:
        return found
    return [found[round(k * (len(found) - 1) / (GRIDS - 1))] for k in range(GRIDS)]


def facts(run: Run, recipe: dict[str, Any], lines: list[dict[str, Any]], speed: list[dict[str, Any]]) -> dict[str, str]:
    """The run's state: step, throughput, time left, checkpoints."""
    total, batch, step = number(recipe.get("steps")), number(recipe.get("batch_size")), lines[-1]["step"] if lines else 0
    out = {"command": str(recipe.get("command", "")), "step": f"{step:,}" if total is None else f"{step:,} of {total:,}"}
    newest = speed[-1] if speed else {}
    rate, written = number(newest.get("images_per_second")), number(newest.get("time"))
    if rate and rate > 0:
        out["throughput"] = f"{rate:,.1f} images a second"
        if total is not None and batch is not None and step < total:
            out["left"] = f"{(total - step) * batch / rate / 3600:.2f} hours at this rate"
    if written and 0 < written < 1e11:
        out["newest line"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
    if run.checkpoints.is_dir():
        out["checkpoints"] = ", ".join(sorted(p.name for p in run.checkpoints.glob("step-*"))) or "none yet"
    if lines and lines[-1].get("spikes"):
        out["loss spikes"] = f"{lines[-1]['spikes']} so far"
    if lines and lines[-1].get("skipped"):
        out["steps left out"] = f"{lines[-1]['skipped']} without a finite gradient"
    return {key: value for key, value in out.items() if value}


def page(run: Run, refresh: int = 0) -> tuple[str, bool]:
    """The run's page as HTML, and whether the run has ended. Until then the page reloads itself every `refresh` seconds (0: never)."""
    if not run.recipe.is_file():
        raise UsageError(f"{run.folder}: no run: {'it has no recipe.yaml' if run.folder.exists() else 'no such folder'}")
    try:
        text = text_of(run.recipe)
        loaded = parse_yaml(text, str(run.recipe))
    except UsageError as error:
        raise DistillError(f"{run.recipe}: not readable as YAML") from error
    recipe = loaded if isinstance(loaded, dict) else {}
    lines, speed = read_lines(run.metrics), read_lines(run.speed)
    known = facts(run, recipe, lines, speed)
    made = any((run.folder / name).exists() for name in ("comparison.png", "teacher", "classifier", "vae", "clip"))  # results of runs
    done = made and bool(lines) and lines[-1]["step"] == recipe.get("steps")
    metrics = series(lines)
    losses = [name for name in metrics if name.endswith("_loss")]
    looks = [name for name in metrics if name.startswith(HEALTH)]
    rest = [name for name in metrics if name not in losses and name not in looks]
    health = "".join(chart(name, metrics[name]) for name in looks)
    charts = [chart(name, metrics[name]) for name in (*losses, *rest)]
    rates = series(speed).get("images_per_second")
    if rates:
        charts.append(chart("images_per_second", rates))
    pictures = [picture(path, f"step {int(path.stem):,}") for path in grids(run)]
    compared = run.folder / "comparison.png"
    if compared.is_file() and not compared.is_symlink():
        pictures.insert(0, picture(compared, "comparison"))
    name = escape(run.folder.resolve().name)
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh and not done else ""
    described = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in known.items())
    nothing = "<p>Nothing is logged yet.</p>"
    warnings = "".join(f"<li>{escape(text)}</li>" for text in warned(lines))
    warnings = f'<h2>Warnings</h2><ul class="warnings">{warnings}</ul>' if warnings else ""
    told = "<p>The student's pictures beside the teacher's of the same noise; a dashed line is the teacher.</p>"
    health = f'<h2>Health</h2>{told}<div class="charts">{health}</div>' if health else ""
    html = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">{again}
<title>{name}</title><style>{STYLE}</style></head><body>
<h1>{name}</h1><dl>{described}</dl>{warnings}
<h2>Metrics</h2><div class="charts">{"".join(charts) or nothing}</div>{health}
<h2>Pictures</h2><div class="grids">{"".join(pictures) or "<p>None yet.</p>"}</div>
<h2>Recipe</h2><pre>{escape(text)}</pre>
</body></html>
"""
    return html, done


def write(folder: Path, out: Path | None = None, refresh: int = 0) -> tuple[Path, bool]:
    """Write the run's page, by default into its folder; returns its path and whether the run has ended."""
    html, done = page(Run(folder), refresh)
    path = out or folder / REPORT
    write_atomic(path, html.encode(errors="backslashreplace"))
    return path, done

"""What each method does to a distribution, in pictures and numbers: the whole of docs/gallery.md by one command.

    python -m docs.gallery [FOLDER]     # trains by the recipes plane-* and two-modes-*, in runs/gallery

What is there already is kept: runs in FOLDER, pictures in docs/gallery, numbers in docs/gallery/numbers.json. A number is the sliced
Wasserstein-1 distance of 10,000 samples to the set, as a share of the set's standard deviation, as `distill evaluate` gives it.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_cli.config import TraceConfig
from distill_cli.data import open_images
from distill_cli.evaluate.points import sliced_wasserstein, spread
from distill_cli.files import write_atomic
from distill_cli.models import load
from distill_cli.recipes import find, read
from distill_cli.trace.job import Traced
from distill_cli.trace.plane import Plane
from docs.asked import asked
from docs.figure3 import command

HEAD = """# A gallery: what each method does to a distribution

Models of [points of the plane](points.md) are small enough to look at whole: every sample is a point, every model a map from noise to
points. All pictures here are made by `distill trace` (or by what it is made of), and the whole page by one command. It takes 7 minutes and
42 seconds on two idle cores (AMD EPYC). What is there already is kept; without `docs/gallery` and `runs/gallery` all is made anew:

    python -m docs.gallery

The distance beside each picture is the sliced Wasserstein-1 distance of 10,000 samples to the set, as a share of the set's standard
deviation: the mean over 128 directions of the distance of the projections, which on a line is exact. The set against itself, drawn again,
is at 0.014: smaller differences say nothing."""
PICTURES = Path(__file__).with_name("gallery")
NUMBERS = PICTURES / "numbers.json"
RUNS = {
    "s-curve": "plane-s-curve", "moons": "plane-moons", "rings": "plane-rings", "two-modes": "two-modes-teacher",
    "s-curve-ddpm": "plane-s-curve-ddpm", "moons-pd": "plane-moons-pd", "moons-cd": "plane-moons-cd", "moons-ct": "plane-moons-ct",
    "moons-ect": "plane-moons-ect", "dmd-real": "two-modes-dmd-real", "dmd-fake": "two-modes-dmd-fake", "dmd": "two-modes-dmd",
}  # fmt: skip
"""A run's folder -> its recipe, in the order in which they are trained."""
TEACHERS = {"moons-pd": "moons", "moons-cd": "moons", "moons-ect": "moons", **dict.fromkeys(("dmd-real", "dmd-fake", "dmd"), "two-modes")}


@dataclass(frozen=True)
class Panel:
    """A model sampled in one way."""

    title: str
    run: str
    steps: int | None = None
    solver: str | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page: its text, what is measured, and how its pictures are drawn, by file name."""

    title: str
    text: str
    data: str
    panels: tuple[Panel, ...]
    drawn: dict[str, tuple[str, ...]]
    """The name of a picture -> what `distill trace` would call it, and the titles of its panels; without, all."""
    classes: tuple[int, ...] = ()


def several(run: str, solver: str, name: str, counts: Sequence[int]) -> tuple[Panel, ...]:
    return tuple(Panel(f"{name}, {count} steps", run, count, solver) for count in counts)


SECTIONS = [
    *(
        Section(
            f"A teacher: {name}",
            text,
            name,
            (Panel("teacher", name),),
            {f"{name}.gif": ("animation",)},
        )
        for name, text in {
            "s-curve": "Noise is added to the points of the set until nothing is left of it. The teacher has learned to estimate, at each"
            " amount of noise, where a point came from. Followed step by step, its estimates lead from pure noise back to the set.\n\n"
            "In all animations the points of the set are coloured by where they lie, and samples by the noise that they began with: a"
            " sampler is a map, and colours show which part of the noise becomes which part of the data. The square grows with the noise:"
            " a point is drawn at x_t over the spread of x_t.",
            "moons": "Two classes, one for each moon. Classes take turns, so that half of the noises are sent to each moon.",
            "rings": "Two classes again. The set has a hole, which the noise does not: somewhere the map has to tear.",
            "two-modes": "70% of the points lie around the left mode. The border between the noises of the two modes is sharp, which is"
            " hard for a student of one step: the map is nearly discontinuous there.",
        }.items()
    ),
    Section(
        "The score",
        "The score is the gradient of the log-density of x_t: it points to where data are more likely. Much noise: one arrow field towards"
        " the mean. Less noise: the field splits between the modes, then every point is led to the nearest one. Arrows are multiplied by"
        " sigma; grey points are the samples at that time.",
        "two-modes",
        (Panel("teacher", "two-modes"),),
        {"score.png": ("score",)},
    ),
    Section(
        "Solvers: DDPM, DDIM, Heun, and Heun with churn",
        "The same data and four ways from noise to a sample. DDPM's ancestral steps add new noise at each step: ways are"
        " ragged, many steps are needed. DDIM takes the same network without new noise: ways are smooth, and nearer to the set"
        " in all but the largest number of steps. Heun's method, on a network of another schedule, corrects each step by a"
        " second evaluation: with five steps it is lost, with 18 nearer than DDIM with 50. Churn adds noise before each of"
        " Heun's steps: farther in few steps, and in 50 nearest of all, since new noise makes good for errors of earlier steps."
        " Steps are not evaluations: Heun's N steps take 2N - 1 of them.",
        "s-curve",
        (
            *several("s-curve-ddpm", "ancestral", "DDPM", (5, 10, 20, 50, 200)),
            *several("s-curve-ddpm", "ddim", "DDIM", (5, 10, 20, 50, 200)),
            *several("s-curve", "heun", "Heun", (3, 5, 10, 18)),
            *several("s-curve", "heun-churn", "Heun with churn", (3, 5, 10, 18, 50)),
        ),
        {"solvers.png": ("trajectories", "DDPM, 20 steps", "DDIM, 20 steps", "Heun, 10 steps", "Heun with churn, 18 steps")},
    ),
    Section(
        "Students: progressive distillation, and consistency models",
        "Progressive distillation (PD) halves the teacher's steps round by round; its student walks the teacher's own way in longer steps."
        " Consistency models jump from any point of the way to its end: distilled from the teacher's ODE (CD), tuned from the teacher's"
        " weights on data (ECT), or trained from data alone (CT). The grid of noises shows what a student of one step has learned: the same"
        " map as the teacher's (CD and PD follow its ODE) or one of its own (CT, whose second step mends much of the first).",
        "moons",
        (
            Panel("teacher", "moons"),
            *(Panel(f"PD, {steps} step{'s' * (steps > 1)}", "moons-pd", steps) for steps in (4, 2, 1)),
            *(
                Panel(f"{name}, {steps} step{'s' * (steps > 1)}", run, steps)
                for name, run in (("CD", "moons-cd"), ("ECT", "moons-ect"), ("CT", "moons-ct"))
                for steps in (1, 2)
            ),
        ),
        {
            "students.png": ("map", "teacher", "PD, 1 step", "CD, 1 step", "ECT, 1 step", "CT, 1 step"),
            "students.gif": ("animation", "teacher", "PD, 4 steps", "CD, 1 step"),
        },
    ),
    Section(
        "Distribution matching: what each part of DMD is for",
        "Figure 3 of [Yin et al.](https://arxiv.org/abs/2311.18828). The real score alone drags all points to one place of a mode. The fake"
        " score, which learns the student's own distribution, pushes them apart again: they fill the mode, but never see the other one."
        " The regression on the teacher's pairs shows the student the whole set. Matching times end at a noise that does not bridge the"
        " modes (`t_high: 0.2`), as in the figure.",
        "two-modes",
        (
            Panel("teacher", "two-modes"),
            Panel("real score", "dmd-real"),
            Panel("with fake score", "dmd-fake"),
            Panel("with regression", "dmd"),
        ),
        {"dmd.png": ("map",)},
    ),
    Section(
        "Guidance",
        "Classifier-free guidance leads away from what both classes have in common. All samples are asked for the outer moon (grey), and"
        " the distance is to that moon. At scale 1 they follow the data; larger scales trade diversity for being unmistakable: points leave"
        " the places that the other moon is near, then the data altogether.",
        "moons",
        tuple(Panel(f"scale {scale}", "moons", scale=scale) for scale in (1, 2, 4, 8)),
        {"guidance.png": ("trajectories",)},
        classes=(0,),
    ),
]


def trained(folder: Path, run: str) -> Path:
    """The folder of a run, trained if it is not there; its teacher and pairs first."""
    place, recipe = folder / run, RUNS[run]
    if any((place / part).exists() for part in ("teacher", "student")):
        return place
    resumed = ("--resume", place) if (place / "recipe.yaml").exists() else ()
    teacher = ("--teacher", trained(folder, TEACHERS[run])) if run in TEACHERS else ()
    pairs: tuple[str | Path, ...] = ()
    if run == "dmd":
        command("pairs", "--recipe", "two-modes-pairs", *teacher, "--out", folder / "pairs")
        pairs = ("--pairs", folder / "pairs")
    command(str(read(find(recipe))["command"]), *(resumed or ("--recipe", recipe, *teacher, *pairs, "--out", place)))
    return place


def opened(section: Section, panels: Sequence[Panel], folder: Path) -> Plane:
    """The trace of some panels of a section."""
    traced = []
    for panel in panels:
        model = load(str(trained(folder, panel.run)), panel.steps)
        traced.append(Traced(panel.title, model, model.with_defaults(panel.solver, panel.steps, panel.scale)))
    options = {"classes": list(section.classes)} if section.classes else {}
    config = TraceConfig(model=[panel.title for panel in panels], num=10_000, batch_size=5000, data=section.data, **options)
    return Plane(config, traced, open_images(section.data))


def distance(work: Plane) -> float:
    """The distance of the samples of a trace of one panel to the data."""
    assert work.real is not None
    ((_, walk),) = work.walks
    return sliced_wasserstein(walk.end.flatten(1), work.real) / spread(work.real)


def made(section: Section, folder: Path, numbers: dict[str, dict[str, float]]) -> None:
    """Make what is missing of a section: numbers, then pictures."""
    own = numbers.setdefault(section.title, {})
    for panel in section.panels:
        if panel.title not in own:
            print(f"gallery: {section.title}: {panel.title}", file=sys.stderr)
            own[panel.title] = distance(opened(section, [panel], folder))
            write_atomic(NUMBERS, json.dumps(numbers, indent=2) + "\n")
    for name, (part, *titles) in section.drawn.items():
        if not (PICTURES / name).exists():
            print(f"gallery: {name}", file=sys.stderr)
            shown = [panel for panel in section.panels if panel.title in (titles or own)]
            write_atomic(PICTURES / name, opened(section, shown, folder).content(part))


def page(numbers: dict[str, dict[str, float]]) -> str:
    """The page: of each section the text, the pictures, and a table of its numbers."""
    lines = [HEAD]
    for section in SECTIONS:
        lines += [f"## {section.title}", *map(wrapped, section.text.split("\n\n"))]
        own = numbers[section.title]
        lines += [f"![{section.title}](gallery/{name})" for name in section.drawn]
        lines.append("\n".join(["| samples | distance |", "|---|---|", *(f"| {title} | {own[title]:.3f} |" for title in own)]))
    return "\n\n".join(lines) + "\n"


def wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 138, break_long_words=False, break_on_hyphens=False))


def main() -> None:
    folder = asked()
    PICTURES.mkdir(exist_ok=True)
    numbers = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    for section in SECTIONS:
        made(section, folder, numbers)
    path = Path(__file__).with_suffix(".md")
    write_atomic(path, page(numbers))
    print(f"page: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()

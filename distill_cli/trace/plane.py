"""The process of points of the plane, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distill_cli.config import TraceConfig
from distill_cli.data import Images
from distill_cli.data.points import STD
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.evaluate.points import sliced_wasserstein, spread
from distill_cli.processes import say
from distill_cli.trace import record
from distill_cli.trace.job import COLUMNS, FRAMES, Trace, Traced, labels_of
from distill_cli.trace.pictures import at, gif
from distill_cli.trace.record import Walk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDGE, INCHES, DPI = 1.8, 1.7, 90
"""Half the width of a panel in the data's coordinates, its width in inches, and pixels an inch."""
DRAWN, MOVED = 5000, 1500
"""Most points that are drawn, and that move in an animation; distances are those of all."""
REAL, GREY = "#c8c8c8", "#888888"
PATHS, ARROWS = 80, 17
"""Trajectories of a panel; arrows on a side of a field."""
LINES, ALONG, REACH = 17, 121, 2.4
"""The grid of noises that is mapped: lines each way, points of a line, and half its width in standard deviations."""
FIELDS = (0.75, 0.5, 0.3, 0.1)
"""Fractions of the range of times at which the score is shown."""


def panels(rows: int, columns: int, size: float = INCHES, lines: int = 1) -> tuple[Figure, Any]:
    """A figure with square panels, without ticks, under titles of some lines, and its axes (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size * columns, (size + 0.25 * lines) * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=(), yticks=(), aspect="equal")
        axis.spines[:].set_color("#dddddd")
    return figure, axes


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, the same each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def colours(x: Tensor) -> Any:
    """A colour for each of the points (N, 2), by its direction from the origin."""
    import matplotlib

    angle = torch.atan2(x[:, 1], x[:, 0]) / (2 * torch.pi) + 0.5
    return matplotlib.colormaps["hsv"](angle.numpy()) * np.array([0.85, 0.85, 0.85, 1])


def cloud(axis: Axes, points: Tensor, colour: Any, size: float = 3) -> Any:
    """Draw the first points of (N, 2) over what is there, in one colour or one each."""
    each = colour if isinstance(colour, str) else colour[:DRAWN]
    across, up = points[:DRAWN].numpy().T
    return axis.scatter(across, up, s=size, c=each, linewidths=0)


class Plane(Trace):
    """Plots of all points together. x_t is shown over its spread, so that it stays in the same square at all times.

    A point has one colour all along, by the direction of its noise; in the forward process by its own.
    """

    parts, usual = ("forward", "reverse", "animation", "trajectories", "score", "map"), 1000

    def __init__(self, config: TraceConfig, traced: list[Traced], images: Images | None) -> None:
        super().__init__(config, traced, images)
        self.mean = [each for each in traced if each.model.sampler.teaches]
        if "score" in self.show and not self.mean:
            if config.show:
                raise UsageError("--show score: no model estimates the mean at every time, as the score needs", "give the teacher too")
            self.show = [part for part in self.show if part != "score"]
        if "score" in self.show and len(self.mean) < len(traced):
            say("trace: score.png has the teachers alone: a student's answer is no mean, so it gives no score")

    def files(self) -> list[str]:
        return [f"{part}.gif" if part == "animation" else f"{part}.png" for part in self.show]

    def made(self, missing: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for name in missing:
            yield name, self.content(name.partition(".")[0])

    def content(self, part: str) -> bytes:
        """The bytes of a file: a GIF of the animation, a PNG of others."""
        plots: dict[str, Callable[[], Figure]] = {
            "forward": self.forward, "reverse": self.reverse, "trajectories": self.trajectories, "score": self.score, "map": self.map,
        }  # fmt: skip
        return png(plots[part]()) if part in plots else self.animation()

    @cached_property
    def indices(self) -> range:
        return range(self.config.num)

    @cached_property
    def walks(self) -> list[tuple[Traced, Walk]]:
        """The sampling of all noises by each model."""
        return [(each, each.walk(self.config, self.indices)) for each in self.traced]

    @cached_property
    def noise(self) -> Tensor:
        """The noises, (N, 2)."""
        return Draws(self.config.seed, self.indices).normal("prior", self.first.shape).flatten(1)

    @cached_property
    def real(self) -> Tensor | None:
        """The points of the set, (N, 2): of the classes that are asked for."""
        if self.images is None:
            return None
        every = range(len(self.images))
        x, labels = self.images.batch(every, Draws(0, every))
        return x.flatten(1) if self.config.classes is None else x[torch.isin(labels, torch.tensor(self.config.classes))].flatten(1)

    def scaled(self, each: Traced, walk: Walk) -> Tensor:
        """x_t over its spread, (K, N, 2)."""
        wide = record.spread(each.model.denoiser.schedule, walk.times, STD)
        return walk.x.flatten(2) / wide.to(walk.x)[:, None, None]

    def distance(self, points: Tensor) -> str:
        """The sliced Wasserstein distance of points (N, 2) to the data, as `evaluate` gives it; '' without data."""
        return "" if self.real is None else f", distance {sliced_wasserstein(points, self.real) / spread(self.real):.3f}"

    def finished(self, axis: Axes, points: Tensor, colour: Any) -> None:
        """The samples over the data, with their distance."""
        if self.real is not None:
            cloud(axis, self.real, REAL, 1.5)
        cloud(axis, points, colour)

    def states(self, each: Traced, walk: Walk) -> list[tuple[Tensor, str]]:
        """x_t over its spread, (N, 2), at each time of a sampling, and the samples; each with what is said of it."""
        x, end = self.scaled(each, walk), walk.end.flatten(1)
        return [*zip(x, map(at, walk.times.tolist()), strict=True), (end, f"samples{self.distance(end)}")]

    @cached_property
    def before(self) -> list[tuple[Tensor, str]]:
        """The data, (N, 2), and x_t of the data over its spread."""
        walk = self.past(self.indices)
        x = self.scaled(self.traced[0], walk)
        return [(walk.end.flatten(1), "data"), *zip(x, map(at, walk.times.tolist()), strict=True)]

    def forward(self) -> Figure:
        """The data, and x_t of the data."""
        shown = [self.before[k] for k in self.every(len(self.before), COLUMNS + 1)]
        figure, axes = panels(1, len(shown))
        for axis, (points, title) in zip(axes[0], shown, strict=True):
            cloud(axis, points, colours(self.before[0][0]))
            axis.set_title(title, fontsize=9)
        return figure

    def reverse(self) -> Figure:
        """Two rows a model: x_t, and the estimates of x0; the last panel of both has the samples."""
        shown = [(each, walk, self.every(len(walk), COLUMNS)) for each, walk in self.walks]
        columns = max(len(states) for *_, states in shown) + 1
        figure, axes = panels(2 * len(shown), columns)
        colour = colours(self.noise)
        for (above, below), (each, walk, states) in zip(axes.reshape(-1, 2, columns), shown, strict=True):
            own, said = record.places(len(states) + 1, columns), self.states(each, walk)
            for place in {*range(columns)} - {*own}:
                above[place].remove()
                below[place].remove()
            for place, k in zip(own[:-1], states, strict=True):
                cloud(above[place], said[k][0], colour)
                cloud(below[place], walk.x0[k].flatten(1), colour)
                above[place].set_title(said[k][1], fontsize=9)
            for row, name in ((above, f"{each.spec}\nx_t"), (below, "estimate of x0")):
                self.finished(row[-1], said[-1][0], colour)
                row[0].set_ylabel(name, fontsize=9)
            above[-1].set_title(said[-1][1], fontsize=9)
        return figure

    def trajectories(self) -> Figure:
        """The ways of some points: from the noise to the sample."""
        figure, axes = panels(1, len(self.walks), 3.6, lines=2)
        colour = colours(self.noise)[:PATHS]
        for axis, (each, walk) in zip(axes[0], self.walks):
            ways = torch.stack([points for points, _ in self.states(each, walk)])[:, :PATHS]
            self.finished(axis, walk.end.flatten(1), GREY)
            for line, own in zip(ways.transpose(0, 1), colour):
                axis.plot(*line.numpy().T, color=own, linewidth=0.7)
            cloud(axis, ways[0], "white", 9)
            cloud(axis, ways[0], colour, 5)
            cloud(axis, ways[-1], colour, 14)
            axis.set_title(f"{each.spec}\n{each.cost}", fontsize=9)
        return figure

    def score(self) -> Figure:
        """The score times sigma, v, as arrows over x_t, at some times: it points to where data lie. Arrows are as long as v / (1 + |v|)."""
        figure, axes = panels(len(self.mean), len(FIELDS), 2.6)
        side = torch.linspace(-0.92 * EDGE, 0.92 * EDGE, ARROWS)
        grid = torch.cartesian_prod(side, side)
        for row, (each, walk) in zip(axes, [pair for pair in self.walks if pair[0] in self.mean]):
            schedule = each.model.denoiser.schedule
            labels = labels_of(each.model, [0], self.config.classes).expand(len(grid))
            task = each.model.task(Draws(self.config.seed, [0] * len(grid)), labels, each.sampling)
            states = [int((schedule.fraction(walk.times) - fraction).abs().argmin()) for fraction in FIELDS]
            for axis, k in zip(row, states):
                t, x = walk.times[k], self.scaled(each, walk)[k]
                wide = record.spread(schedule, t, STD).item()
                where = (grid * wide)[:, :, None, None].to(task.x)
                with torch.no_grad():
                    arrows = schedule.sigma(t).item() * record.score(task.denoiser, schedule, where, t, task.condition).flatten(1).cpu()
                cloud(axis, x, REAL)
                short = arrows / (1 + arrows.norm(dim=1, keepdim=True)) * 1.6 * (side[1] - side[0])
                axis.quiver(*grid.numpy().T, *short.numpy().T, color="#222266", angles="xy", scale_units="xy", scale=1, width=0.004)
                axis.set_title(at(t.item()), fontsize=9)
            row[0].set_ylabel(f"{each.spec}{self.asked(0)}", fontsize=9)
        return figure

    def map(self) -> Figure:
        """Where each model maps a grid of noises of one class; where a step adds new noise, it is the same for all."""
        u, v = torch.linspace(-REACH, REACH, LINES), torch.linspace(-REACH, REACH, ALONG)
        upright = torch.stack([u[:, None].expand(-1, ALONG), v.expand(LINES, -1)], 2)
        lines = torch.cat([upright, upright.flip(2)])
        noises = lines.reshape(-1, 2)
        figure, axes = panels(1, 1 + len(self.traced), 3.6)
        colour = colours(noises)
        cloud(axes[0][0], noises * STD * 1.4, colour, 1.5)
        axes[0][0].set_title(f"noises up to {REACH:g} standard deviations", fontsize=9)
        for axis, each in zip(axes[0][1:], self.traced):
            draws = Draws(self.config.seed, [0] * len(noises))
            labels = labels_of(each.model, [0], self.config.classes).expand(len(noises))
            end = record.backward(each.model, draws, labels, each.sampling, noises[:, :, None, None]).end.flatten(1)
            if self.real is not None:
                cloud(axis, self.real, REAL, 1.5)
            for line, own in zip(end.reshape(*lines.shape), colour.reshape(*lines.shape[:2], 4)):
                axis.plot(*line.numpy().T, color="#bbbbbb", linewidth=0.5)
                cloud(axis, line, own, 1.5)
            axis.set_title(f"{each.spec}{self.asked(0)}", fontsize=9)
        return figure

    def animation(self) -> bytes:
        """Forward, then backward, a panel a model; shorter processes are slower. The end of each is held."""
        there = [] if self.images is None else [self.before[k] for k in self.every(len(self.before), FRAMES)]
        ways = [self.states(each, walk) for each, walk in self.walks]
        steps = max(map(len, ways))
        back = [[own[k * len(own) // steps] for own in ways] for k in self.every(steps, FRAMES)]
        figure, axes = panels(1, len(ways), 2.6)
        dots, frames = [cloud(axis, self.noise[:MOVED], "black") for axis in axes[0]], []
        scenes = [([state] * len(ways), there[0][0]) for state in there] + [(states, self.noise) for states in back]
        for scene, coloured in scenes:
            for axis, dot, (each, _), (x, said) in zip(axes[0], dots, self.walks, scene, strict=True):
                dot.set_offsets(x[:MOVED].numpy())
                dot.set_facecolor(colours(coloured[:MOVED]))
                axis.set_title(f"{each.spec}\n{said}", fontsize=9)
            frames.append(drawn(figure))
        return gif(frames, self.durations(len(there), len(frames)), colours=48)


def drawn(figure: Figure) -> np.ndarray:
    """A figure as (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

"""The interface between a training method and the engine."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from distill_cli.config import TrainingConfig
from distill_cli.data import Images
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.errors import UsageError
from distill_cli.launch import HALF
from distill_cli.models import formats
from distill_cli.models.lineage import Lineage
from distill_cli.models.lora import adapted
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampling
from distill_cli.models.sources import names
from distill_cli.models.sources.registry import REGISTRY
from distill_cli.processes import say
from distill_cli.runs import Run

Row = tuple[Model, Sampling]
"""A model, and how it is sampled."""
Rows = dict[str, Row]
"""Rows of a comparison, by their titles."""


@dataclass
class Loss:
    """A loss that is minimised over `network`. `metrics` are further scalars to log."""

    network: str
    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Trained(Protocol):
    """A network that is trained, whole (Full) or through adapters on a frozen base."""

    module: nn.Module
    """The module that the objective calls. The engine puts its wrapper for several processes here."""
    rate: float
    """The learning rate."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """The weights that the optimizer steps."""

    def state(self) -> nn.Module:
        """The module whose weights are averaged and saved in checkpoints: the network itself, or its adapters alone."""

    def merged(self, state: nn.Module) -> nn.Module:
        """The network with the weights of `state`, a copy of `state()` such as its average."""


class Full:
    """A network whose weights are all trained."""

    def __init__(self, module: nn.Module, rate: float) -> None:
        self.module, self.rate, self.network = module, rate, module

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.module.parameters()

    def state(self) -> nn.Module:
        return self.network

    def merged(self, state: nn.Module) -> nn.Module:
        return state


class Phase(NamedTuple):
    """A part of a run: its optimizer steps, and the folder of its result, the average at its end."""

    steps: int
    result: str
    anew: bool = False
    """Whether the main network begins as the average of the phase before, with new moments, averages and learning-rate schedule."""


def phase_at(phases: Sequence[Phase], step: int) -> int:
    """The number of the phase that step 0, 1, ... belongs to; past the end the last phase."""
    ends = [*accumulate(phase.steps for phase in phases)]
    return min(bisect_right(ends, step), len(phases) - 1)


def span_at(phases: Sequence[Phase], step: int) -> tuple[int, int]:
    """First step and number of steps of the part around `step` over which learning rate and average run: phases up to the next `anew`."""
    first, steps, number = 0, 0, phase_at(phases, step)
    for k, phase in enumerate(phases):
        if phase.anew and k > number:
            break
        if phase.anew:
            first, steps = first + steps, 0
        steps += phase.steps
    return first, steps


class Call(NamedTuple):
    """One call of a network, on a number of images."""

    network: str
    images: int


@dataclass(frozen=True)
class Calls:
    """The network calls of one step, from which plans and `distill bench` are made."""

    trainings: Sequence[Call]
    """Calls with a backward pass and an optimizer step, in order."""
    forwards: Sequence[Call] = ()
    """Calls without gradient; guidance by one call of twice the batch is a call of so many images."""
    decoded: int = 0
    """Images of the first training call that are decoded, and judged, with gradient; for each one a reference without."""
    between: bool = False
    """Whether the calls without gradient come between the first training call and its backward pass, else before it."""
    through: Sequence[Call] = ()
    """Calls whose gradient is that of their input alone, as through a discriminator: after the first training call, in its turn."""

    def evaluations(self) -> int:
        """Network evaluations; a backward pass counts as two, one through a network that is not trained as one."""
        times = ((self.forwards, 1), (self.through, 2), (self.trainings, 3))
        return sum(count * call.images for calls, count in times for call in calls)

    @classmethod
    def mean(cls, several: Sequence[Calls]) -> Calls:
        """The calls of one step on average, where steps differ in their calls without gradient: one for each network that is called."""
        first = several[0]
        if all(each == first for each in several):
            return first
        forwards = [call for each in several for call in each.forwards]
        totals = {name: sum(call.images for call in forwards if call.network == name) for name, _ in forwards}
        return replace(first, forwards=[Call(name, round(total / len(several))) for name, total in totals.items()])

    def __str__(self) -> str:
        said = []
        for verb, calls in (("trains", self.trainings), ("passes through", self.through), ("evaluates", self.forwards)):
            totals = {name: sum(call.images for call in calls if call.network == name) for name, _ in calls}
            said += [f"{verb} {', '.join(f'{name} on {images} images' for name, images in totals.items())}"] if totals else []
        return "; ".join(said)


def freeze(network: nn.Module) -> nn.Module:
    """Put a network that is not trained into evaluation mode, without gradients but for the adapters that it carries."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".lora_" in name)
    return network.eval()


def refuse_student(model: Model, name: str, method: str) -> None:
    """Raise UsageError if the teacher of a method is a student."""
    if not model.sampler.teaches:
        raise UsageError(f"--teacher {name}: a student", f"{method} needs a model that denoises: its own teacher")


def student_of(start: Lineage, method: str, teacher_hash: str, data: str = "") -> Lineage:
    """Lineage of a student that started from a model's weights; without `teacher_hash` from new ones."""
    own = {"name": f"{start.name}-{method}", "kind": "student", "method": method, "teacher": start.name if teacher_hash else ""}
    return Lineage(**{**start.model_dump(), **own, "teacher_hash": teacher_hash, "data": data or start.data})


class Objective:
    """A training method. Its defaults are for a method with one phase and no hooks. Steps are counted from 0.

    The engine calls `before`, makes a backward pass and an optimizer step for each loss of `turns`, and calls `after`.
    """

    config: TrainingConfig
    trained: dict[str, Trained]
    """The trained networks, by name. The average of the first one is the result."""
    frozen: dict[str, nn.Module]
    """Frozen networks: moved to the device, never trained or saved."""
    kept: dict[str, nn.Module]
    """Networks that the objective changes itself: saved in checkpoints."""
    phases: Sequence[Phase]
    identity: dict[str, Any]
    """Digests of what a resumed run must find again, by the option that gives it: teacher, pairs, ..."""
    images: Images | None = None
    """The training images, if they are a set of images."""
    order: Order | None = None
    """The order in which images or pairs are drawn."""
    guidance: float | None = None
    """The teacher's guidance scale."""
    cycle: int = 1
    """Steps over which a step's calls are averaged, for methods whose steps differ."""

    def __init__(self, config: TrainingConfig, result: str) -> None:
        self.config, self.phases = config, [Phase(config.steps, result)]
        self.trained, self.frozen, self.kept, self.identity = {}, {}, {}, {}

    def begun_from(self, teacher: Model, base: str = "teacher") -> NetworkDenoiser:
        """A network that begins as the teacher's: a copy of it, or a LoRA on it. The teacher is then the frozen network called `base`.

        With a guidance_range it is told a scale. A shared network has its weights in the run's number type, so it is to be hashed before.
        """
        config: Any = self.config
        if not config.lora:
            out = teacher.copy().denoiser
            if getattr(config, "guidance_range", None):
                out.network = out.network.told()  # type: ignore[operator]
            return out
        backbone, old = teacher.backbone, teacher.denoiser
        merge = config.merge or formats.lora.base_of(teacher) is None
        if merge and config.quantize != "none":
            raise UsageError(f"quantize {config.quantize}: {config.teacher}'s students are saved as whole weights", "leave it out")
        if not merge:  # what is saved whole keeps the teacher's weights to the last bit
            backbone.cast(HALF.get(config.precision))
        if config.quantize == "int8":
            backbone.quantize()
        adapter = adapted(backbone, config.lora, config.lora_alpha, config.lora_targets, config.seed, merge)
        if getattr(config, "guidance_range", None):
            adapter.told()  # which refuses
        adapter.source = names.absolute(config.teacher, REGISTRY)
        if base not in self.frozen and merge and not config.merge:
            say(f"lora: saved as whole weights: no pipeline of diffusers loads a LoRA of {config.teacher}")
        self.frozen[base] = old
        return NetworkDenoiser(adapter, old.schedule, old.parameterisation, old.scales, old.time_input, old.boundary)

    def hold(self, teacher: Model) -> None:
        """Have the teacher, and what guides it, among the frozen networks.

        Its matrices are stored in the run's number type, so hash and copy it before. Those that a LoRA shares `begun_from` has stored.
        """
        if not getattr(self.config, "lora", 0):
            teacher.backbone.cast(HALF.get(self.config.precision))
        self.frozen |= {"teacher": freeze(teacher.denoiser), **teacher.guiding()}

    def network(self, name: str) -> nn.Module:
        """A trained network, to be called."""
        return self.trained[name].module

    @property
    def result(self) -> str:
        """The folder of the result of the last phase."""
        return self.phases[-1].result

    @property
    def device(self) -> torch.device:
        return next(iter(next(iter(self.trained.values())).parameters())).device

    def prepare(self, where: torch.device, run: Run) -> None:
        """Called once, before this process's first step, for what takes long: networks are on `where`, and the run has its folder."""

    def before(self, step: int) -> None:
        """Called before a step. In the first step of a phase that begins anew the main network already has the average's weights."""

    def ahead(self, step: int, draws: Draws) -> None:
        """Called with the samples that come next, and their step, before others are computed: to begin what is read from disk."""

    def part(self, step: int, draws: Draws, following: tuple[int, Draws] | None) -> Iterator[Loss]:
        """The turns of a part of a batch. While the first one is computed, the data of the `following` part of a step are read."""
        for each in ((step, draws), following):  # its own, if nothing came before, are read first
            if each is not None:
                self.ahead(*each)
        yield from self.turns(step, draws)

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        """Yield the losses of a step on the samples of `draws`. After each loss the engine steps its network, then continues."""
        raise NotImplementedError

    def after(self, step: int) -> None:
        """Called after a step, once all networks are stepped and before the average is updated."""

    def model(self, network: nn.Module, step: int) -> Any:
        """The result after `step` steps, made of `network` (the average, or its copy): a Model, or another thing with `save(folder)`."""
        raise NotImplementedError

    def reference(self) -> Row | None:
        """The teacher as it is sampled for comparisons; None for a method, or a run, without one."""
        return None

    def compared(self, made: Any) -> Rows:
        """The rows of comparison.png: models, and how they are sampled."""
        return {}

    def remarks(self, made: Any) -> tuple[dict[str, Any], str]:
        """What the command prints about the result besides its folder: as JSON, and as a line or ''."""
        return {}, ""

    def calls(self, step: int = 0) -> Calls:
        """The network calls of a step; those of `cycle` steps together are the same in all of a phase."""
        raise NotImplementedError

    def usual(self, step: int = 0) -> Calls:
        """The network calls of a step on average, in the phase of `step`."""
        steps = range(step, step + self.cycle)
        return Calls.mean([self.calls(k) for k in steps if phase_at(self.phases, k) == phase_at(self.phases, step)])

    def trial(self, network: nn.Module, made: Any, count: int, where: torch.device) -> Any:
        """Call a network on `count` samples whose values do not matter, for plans: by default a denoiser's backbone.

        `made` is the result of the method, most often a Model. Returns the network's answer.
        """
        assert isinstance(network, NetworkDenoiser)
        assert isinstance(made, Model)
        backbone: Any = network.network
        condition = {name: part for name, part in made.example(count, where).parts.items() if name in backbone.inputs}
        x = torch.empty(count, *made.shape, device=where, requires_grad=torch.is_grad_enabled())  # a frozen network's calls count too
        return backbone(x, torch.ones(count, device=where), Condition(condition))

    def judge(self, x: Tensor, reference: Tensor) -> Tensor:
        """(B,) distances of what is decoded (`calls().decoded`) from its reference, by frozen networks."""
        raise NotImplementedError

    def advice(self, metrics: Mapping[str, float], done: float) -> str:
        """A warning that follows from the mean metrics when the share `done` of all steps is made, or ''."""
        return ""

    def remedies(self, metrics: Mapping[str, float]) -> Mapping[str, str]:
        """What to change at a sign of sickness in the pictures, by its name in training/signs.py, where the method knows better."""
        return {}

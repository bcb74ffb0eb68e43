"""The container of a model: denoiser, conditioner, codec, sampler, lineage."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill_cli.diffusion.condition import GUIDANCE_SCALE, Condition
from distill_cli.diffusion.denoiser import Denoiser, NetworkDenoiser
from distill_cli.diffusion.guidance import guided, steered
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.models.backbones import Backbone
from distill_cli.models.codec import Codec
from distill_cli.models.conditioners import Conditioner, PromptConditioner
from distill_cli.models.guides import ModelGuide
from distill_cli.models.lineage import Lineage
from distill_cli.models.parts import plain
from distill_cli.models.sampler import SOLVERS, Sampler, Sampling, Task
from distill_cli.models.sources import hub
from distill_cli.models.times import parse
from distill_cli.processes import say
from distill_cli.tensors import hash_of

LARGE = 256
"""Image width in pixels from which batches are smaller by default."""


@dataclass
class Model:
    """A model, teacher or student."""

    denoiser: NetworkDenoiser
    conditioner: Conditioner
    lineage: Lineage
    sampler: Sampler = Sampler()
    codec: Codec = field(default_factory=Codec)
    scheduler: dict[str, Any] | None = None
    """Configuration of diffusers' scheduler, if the model has one: solvers take their spacing of times from it."""
    recipe: str = ""
    """The resolved recipe that made it."""
    size: tuple[int, int] | None = None
    """(H, W) of the denoiser's data, if not the network's own."""
    notes: tuple[str, ...] = ()
    """Assumptions that were made when the model was read."""

    @property
    def backbone(self) -> Backbone:
        """The adapter around the denoiser's network."""
        backbone = self.denoiser.network
        assert isinstance(backbone, Backbone)
        return backbone

    @property
    def net(self) -> Any:
        """diffusers' network inside the backbone."""
        return self.backbone.net

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the denoiser's data: pixels or latents."""
        shape = self.backbone.shape
        return shape if self.size is None else (shape[0], *self.size)

    @property
    def text(self) -> PromptConditioner | None:
        """The conditioner of a text-to-image model; None for other models."""
        return self.conditioner if isinstance(self.conditioner, PromptConditioner) else None

    @property
    def sampling(self) -> Sampling:
        """The default sampling settings."""
        return self.sampler.settings

    def example(self, count: int, device: str | torch.device) -> Condition:
        """A condition of `count` samples with all that the network takes, for trial calls and timings."""
        return self.sampler.telling(self.conditioner.example(count, device))

    def parts(self) -> dict[str, Any]:
        """The networks, by their names in a diffusers pipeline."""
        return {self.backbone.part: self.net, **self.codec.parts(), **self.conditioner.parts()}

    def held(self, dtype: torch.dtype | None) -> int:
        """Bytes of the weights of all networks, that of the denoiser stored as `dtype`; None: as it is."""
        every = {name: [*part.parameters()] for name, part in self.parts().items()}
        sizes = {name: sum(p.numel() * p.element_size() for p in each) for name, each in every.items()}
        if dtype is not None:
            sizes[self.backbone.part] = sum(p.numel() for p in every[self.backbone.part]) * dtype.itemsize
        return sum(sizes.values())

    @property
    def guides(self) -> tuple[ModelGuide, ...]:
        """What leads the model besides its condition; the conditioner tells them what is asked for."""
        return self.conditioner.guides

    def with_guides(self, *guides: ModelGuide) -> Model:
        """The model led by these guides too."""
        return replace(self, conditioner=self.conditioner.guided((*self.guides, *guides)))

    def guiding(self) -> dict[str, nn.Module]:
        """The networks of its guides, by their names."""
        return {guide.name: guide.network for guide in self.guides}

    def guidance(self) -> dict[str, Any]:
        """What its guides are, by the options that give them: part of a job's settings and of a run's; {} without guides."""
        return {key: value for guide in self.guides for key, value in guide.identity().items()}

    def said(self, sampling: Sampling) -> str:
        """All its guidance in words: the scale, and the guides."""
        guides = ", ".join(f"by {guide.name} at scale {guide.scale:g}" for guide in self.guides)
        return f"{sampling.guidance_scale:g}, {guides}" if guides and sampling.combines else guides or f"{sampling.guidance_scale:g}"

    def guided(self, sampling: Sampling, told: bool = False, denoiser: Denoiser | None = None) -> Denoiser:
        """The denoiser under all guidance, of `sampling` and by the guides: classifier-free first, then each guide.

        `told`: each sample has its own scale, the part GUIDANCE_SCALE of its condition. `denoiser`: one of the same model in its place.
        """
        asks = told or (sampling.guidance_scale != 1 and sampling.guidance_calls > 0)
        scale, null = None if told else sampling.guidance_scale, self.conditioner.null if asks else None
        base = guided(denoiser or self.denoiser, scale, null, sampling.guidance_calls, self.sampler.rule)
        return steered(base, self.denoiser.schedule, self.guides)

    def to(self, device: str | torch.device) -> Model:
        for network in (self.denoiser, *self.parts().values(), *self.guiding().values()):
            network.to(device)
        return self

    def ready(self, device: str | torch.device, dtype: torch.dtype | None, decodes: bool = True) -> Model:
        """Go to `device`. Matrices are stored in `dtype`, in which autocast would else cast them in each call; None: in float32.

        `decodes`: pictures are decoded too, under the same autocast, so the decoder's matrices are stored alike.
        """
        self.backbone.cast(dtype)
        if decodes and not self.guides:  # which decode in float32
            self.codec.cast(dtype)
        return self.to(device)

    def whole(self) -> Model:
        """The model with its LoRA added to its weights; itself if it has none."""
        backbone = self.backbone.merged()
        return self if backbone is self.backbone else replace(self, denoiser=self.denoiser.around(backbone).eval())

    def copy(self, **changes: Any) -> Model:
        """The same model with its own copy of the denoiser."""
        return replace(self, denoiser=copy.deepcopy(self.denoiser), **changes)

    def weights_hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of the weights, sorted by name; '' without weights (in plans)."""
        named = self.backbone.weights()
        if any(value.is_meta for value in named.values()):
            return ""
        for part, network in {**self.codec.parts(), **self.conditioner.parts()}.items():
            named |= {f"{part}.{plain(name)}": value for name, value in network.state_dict().items()}
        return hash_of(named)

    def with_times(self, spec: str, steps: int | None = None) -> Model:
        """The student with the times that `spec` says (models/times.py) as its own."""
        if not self.sampler.edits:
            raise UsageError(
                f"--times {spec}: for consistency students of EDM teachers alone", "leave it out: this model has its own times"
            )
        times = parse(spec, self.denoiser.schedule, steps or self.sampler.steps)
        if steps not in (None, len(times)):
            raise UsageError(f"--times {spec}: {len(times)} times for --steps {steps}", "leave --steps out")
        return replace(self, sampler=self.sampler.with_times(times))

    def with_prompts(self, prompts: Sequence[str], negative: str | None = None, repeat: int = 1) -> Model:
        """The model for these prompts, each `repeat` times in turn, and a negative prompt. Raises UsageError if it has no text."""
        conditioner = self.conditioner.given(prompts, negative, repeat, self.lineage.name)
        if negative not in (None, self.conditioner.negative) and self.sampler.guidance != "outside":
            hint = "make pairs with it: distill dmd --pairs, or distill cm and pd --data"
            raise UsageError("--negative-prompt: a student's negative prompt is built in", hint)
        return replace(self, conditioner=conditioner)

    def decoding(self, decoder: str | None, tiles: int | None, planned: bool = False) -> Model:
        """The latent model whose pictures an AutoencoderTiny makes (a folder or hub id), or that come in tiles of so many pixels a side.

        A decoder that is `planned` is not downloaded, which is said. Raises UsageError for a model of pixels, and for what does not fit its
        latents.
        """
        codec = self.codec
        if decoder is not None and planned and (download := hub.to_download(decoder)):
            say(f"--decoder: {download} would be downloaded")
            codec = codec.sketched_decoder()
        elif decoder is not None:
            codec = codec.with_decoder(decoder)
        if tiles is not None:
            codec.tile(tiles)
        return replace(self, codec=codec)

    def with_resolution(self, pixels: int) -> Model:
        """The latent model with a shorter side of `pixels`, at its aspect ratio. Raises UsageError if its networks cannot do it."""
        size = self.codec.sized(pixels, self.shape, self.backbone.multiple, self.backbone.most)
        if size is None:
            raise UsageError(f"resolution {pixels}: {self.lineage.name} makes pictures of {self.picture} pixels alone")
        return self.with_size(size)

    def with_size(self, size: tuple[int, int] | None) -> Model:
        """The model for data of `size` (H, W), None for the network's own; conditions and schedule follow, where they depend on it."""
        shape = (self.backbone.shape[0], *(size or self.backbone.shape[1:]))
        height, width = (side * self.codec.factor for side in shape[1:])
        schedule = self.denoiser.schedule.sized(self.backbone.tokens(shape))
        return replace(self, size=size, conditioner=self.conditioner.sized(height, width), denoiser=self.denoiser.on(schedule))

    def at(self, shape: tuple[int, int, int]) -> Model:
        """The model at the size of `shape` (C, H, W) if it is latent; a pixel model is returned unchanged."""
        return self.with_size(shape[1:]) if self.codec.parts() else self

    @property
    def pixels(self) -> int:
        """Width of the model's pictures."""
        return self.shape[-1] * self.codec.factor

    @property
    def picture(self) -> str:
        """Size of the model's pictures in words: one number for a square, else WIDTHxHEIGHT."""
        width, height = self.pixels, self.pixels * self.shape[1] // self.shape[2]
        return str(width) if width == height else f"{width}x{height}"

    @property
    def about(self) -> str:
        """Kind, name and assumptions, for the first line of a job."""
        return "; ".join((f"{self.lineage.kind} {self.lineage.name}", *self.notes))

    def taught_by(self, scale: float | None, span: tuple[float, float] | None, calls: Literal[1, 2] = 1) -> Sampling:
        """The teacher's settings for a student of a guidance scale, or of a range of scales with a default within it.

        Raises UsageError where there is no null condition.
        """
        if span and not self.conditioner.has_null:
            raise UsageError(f"guidance_range: {self.lineage.name} has no null condition, which guidance needs", "leave it out")
        if span and scale is None:
            scale = min(max(self.sampler.guidance_scale, span[0]), span[1])
        return self.with_defaults(None, None, scale, calls)

    def with_defaults(self, solver: str | None, steps: int | None, scale: float | None, calls: Literal[1, 2] = 1) -> Sampling:
        """The sampling settings for a user's options. Raises UsageError if the model cannot be sampled that way."""
        schedule, alone = self.denoiser.schedule, bool(self.guides) and scale in (None, 0) and self.conditioner.has_null
        if alone and self.conditioner.negative != self.conditioner.usual:
            raise UsageError(
                "--negative-prompt: a guide leads the estimate without a prompt", "--guidance-scale S above 1 beside the guide"
            )
        out = self.sampler.asked(schedule, solver, steps, 1 if alone else scale, calls)
        if alone:  # guides lead the unconditional denoiser, unless a scale is asked for
            out = out.model_copy(update={"guidance_scale": 0.0})
        if self.scheduler is not None and schedule.bins is not None and out.steps >= schedule.bins:
            raise UsageError(f"--steps {out.steps}: the model has {schedule.bins} times", "a few dozen steps are plenty")
        if out.combines and not self.conditioner.has_null:
            raise UsageError(f"--guidance-scale {out.guidance_scale}: the model knows no null class", "use 1")
        return out

    @property
    def shown(self) -> int:
        """Number of pictures in a grid or a comparison."""
        return 40 if self.pixels < LARGE else 8

    @property
    def enlarged(self) -> int:
        """Factor by which pictures are enlarged in grids and comparisons."""
        return max(1, 64 // self.pixels)

    def examples(self, seed: int, count: int, sampling: Sampling | None = None, classes: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Images (count, C, H, W), to look at while training, and their labels. Their noise is outside the range of any job."""
        labels = self.conditioner.spread(count, classes)
        return self.sample(Draws(seed, range(2**40, 2**40 + count)), labels, sampling), labels

    @torch.no_grad()
    def sample(self, draws: Draws, labels: Tensor, sampling: Sampling | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] on the CPU, from the noise of `draws` (one row a label), under `sampling`."""
        return self.codec.decode(self.generate(draws, labels, sampling)).cpu()

    def task(self, draws: Draws, labels: Tensor, sampling: Sampling, scales: Tensor | None = None) -> Task:
        """What a solver is given for the samples of `draws` (one row a label): their noise, times, condition, and the guided denoiser.

        `scales` (B,): a guidance scale of each sample's own.
        """
        device, schedule = next(self.denoiser.parameters()).device, self.denoiser.schedule
        condition = self.sampler.telling(self.conditioner(sent(labels, device)), sampling.guidance_scale)
        if scales is not None:
            condition = condition.plus(GUIDANCE_SCALE, sent(scales, device))
        return Task(
            denoiser=self.guided(sampling, told=scales is not None),
            network=self.denoiser,
            x=sent(draws.normal("prior", self.shape), device),
            times=self.sampler.times_for(schedule, sampling.solver, sampling.steps),
            condition=condition,
            noise=lambda k: sent(draws.normal("solver", self.shape, turn=k), device),
            project=self.codec.project,
            scheduler=self.scheduler,
            own=bool(self.sampler.times),
        )

    @torch.no_grad()
    def solved(self, task: Task, sampling: Sampling) -> Tensor:
        """The denoiser's data on its device: pixels, or latents (B, c, h, w)."""
        return self.codec.project(SOLVERS[sampling.solver].run(task).float())

    @torch.no_grad()
    def generate(self, draws: Draws, labels: Tensor, sampling: Sampling | None = None, scales: Tensor | None = None) -> Tensor:
        """As `sample`, but the denoiser's data on its device. `scales` (B,): a guidance scale of each sample's own."""
        sampling = sampling or self.sampling
        return self.solved(self.task(draws, labels, sampling, scales), sampling)

"""What a model folder holds: a denoiser, how its condition is given, how it is sampled, and where it came from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor, nn

from distill_cli.config.base import Positive, Solver
from distill_cli.diffusion import solvers
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.guidance import guided
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, TableSchedule
from distill_cli.errors import UsageError, printable
from distill_cli.models import lcm, schedulers
from distill_cli.models.autoencoder import VAECodec
from distill_cli.models.conditioners import Conditioner, PromptConditioner
from distill_cli.models.parts import plain
from distill_cli.models.times import parse
from distill_cli.tensors import hash_of

Text = Annotated[str, AfterValidator(lambda text: printable(text))]
"""Text of a model that may be someone else's: shown on terminals, in cards and in JSON."""
LARGE = 256
"""Image width from which batches are made smaller."""
CONSISTENCY = ("cd", "ct", "ict", "ect")
"""Methods of `distill cm`."""


class Codec(Protocol):
    """Between images in [-1, 1] and what the denoiser works on: IdentityCodec, or VAECodec (models/autoencoder.py)."""

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1]."""

    def project(self, x: Tensor) -> Tensor:
        """The nearest thing that `x` may be."""


class IdentityCodec:
    """Pixel-space models: what the denoiser works on are the images."""

    def decode(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    project = decode


class Sampling(BaseModel):
    """How a model likes to be sampled."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    solver: Solver = "heun"
    steps: Positive = 18
    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    guidance_calls: Literal[1, 2] = 1


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


@dataclass
class Model:
    """A teacher or a student; `few_step_times` (decreasing) are a student's, None for a teacher."""

    denoiser: NetworkDenoiser
    conditioner: Conditioner
    lineage: Lineage
    sampling: Sampling = Sampling()
    few_step_times: list[float] | None = None
    codec: Codec = field(default_factory=IdentityCodec)
    scheduler: dict[str, Any] | None = None
    """diffusers' configuration of the scheduler, where the model came with one: how its solvers space their times."""
    recipe: str = ""
    """The resolved recipe that made it."""
    size: tuple[int, int] | None = None
    """(H, W) of what the denoiser works on, where it is not the network's own."""
    notes: tuple[str, ...] = ()
    """What was assumed when it was read."""

    @property
    def unet(self) -> Any:
        return self.denoiser.network.unet

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the denoiser works on."""
        size = self.size or self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def latent(self) -> VAECodec | None:
        """The autoencoder of a latent model."""
        return self.codec if isinstance(self.codec, VAECodec) else None

    @property
    def text(self) -> PromptConditioner | None:
        """The conditioner of a model that makes pictures of prompts."""
        return self.conditioner if isinstance(self.conditioner, PromptConditioner) else None

    @property
    def is_consistency(self) -> bool:
        """Whether it maps every noise level to an image, as students of `distill cm` do, and not the largest alone."""
        learned = self.denoiser.parameterisation == "consistency" or self.lineage.method in CONSISTENCY
        return self.few_step_times is not None and learned and self.lineage.method != "dmd"

    @property
    def lcm(self) -> dict[str, Any] | None:
        """The configuration of LCMScheduler of a student that others have made; it says how that one is sampled."""
        foreign = self.few_step_times is not None and not self.lineage.method
        return self.scheduler if foreign and (self.scheduler or {}).get("_class_name") == "LCMScheduler" else None

    def parts(self) -> dict[str, nn.Module]:
        """The networks, by the names that they have in a pipeline."""
        out: dict[str, nn.Module] = {"unet": self.unet}
        if self.latent is not None:
            out["vae"] = self.latent.vae
        return out | self.conditioner.parts()

    def to(self, device: str | torch.device) -> Model:
        for network in (self.denoiser, *self.parts().values()):
            network.to(device)
        return self

    def copy(self, **changes: Any) -> Model:
        """The same model with networks of its own."""
        return replace(self, denoiser=copy.deepcopy(self.denoiser), **changes)

    def weights_hash(self) -> str:
        """SHA-256 over the names, dtypes, shapes and bytes of the weights, in the order of their names; '' without weights (plans)."""
        if any(value.is_meta for value in self.unet.state_dict().values()):
            return ""
        named = dict(self.unet.state_dict())
        for part, network in self.parts().items():
            if part != "unet":
                named |= {f"{part}.{plain(name)}": value for name, value in network.state_dict().items()}
        return hash_of(named)

    def times(self, solver: str, steps: int) -> Tensor:
        """(steps,) decreasing times of a solver on this model's schedule."""
        schedule = self.denoiser.schedule
        if solver == "few-step":
            if self.lcm is not None:
                return lcm.times(self.lcm, steps)
            if self.few_step_times is None:
                return schedule.times(steps)
            if steps <= len(self.few_step_times):
                return torch.tensor(self.few_step_times[:steps], dtype=torch.float64)
            if not self.is_consistency or not isinstance(schedule, EDMSchedule):
                made = f"--steps {steps}: the student was made for at most {len(self.few_step_times)}"
                raise UsageError(made, "consistency students (distill cm) take more")
            if steps > schedule.grid:
                raise UsageError(f"--steps {steps}: this consistency student takes 1 to {schedule.grid}")
            return torch.tensor(parse("even", schedule, steps), dtype=torch.float64)
        if isinstance(schedule, TableSchedule) and solver == "heun":
            low = schedule.t_max / steps / 2  # sigma / alpha of the last times must not vanish
            return torch.linspace(schedule.t_max, low, steps, dtype=torch.float64)
        return schedule.times(steps)

    def with_times(self, spec: str, steps: int | None = None) -> Model:
        """This student sampled at the times that `spec` says (models/times.py), which are then its own."""
        schedule = self.denoiser.schedule
        if not self.is_consistency or not isinstance(schedule, EDMSchedule):
            raise UsageError(f"--times {spec}: for consistency students (distill cm) alone")
        times = parse(spec, schedule, steps or self.sampling.steps)
        if steps not in (None, len(times)):
            raise UsageError(f"--times {spec}: {len(times)} times for --steps {steps}", "leave --steps out")
        return replace(self, few_step_times=times, sampling=self.sampling.model_copy(update={"steps": len(times)}))

    def with_prompts(self, prompts: Sequence[str], negative: str = "", repeat: int = 1) -> Model:
        """This model for prompts, each `repeat` times in turn, away from the negative one; raises UsageError for one without text."""
        conditioner = self.conditioner.given(prompts, negative, repeat, self.lineage.name)
        if negative and self.few_step_times is not None:
            raise UsageError("--negative-prompt: a student's guidance is built in", "give it to distill pairs and distill dmd")
        return replace(self, conditioner=conditioner)

    def with_resolution(self, pixels: int) -> Model:
        """This latent model at pictures whose shorter side has `pixels`, in its own aspect ratio.

        Raises UsageError where its networks cannot make them.
        """
        if self.latent is None:
            raise UsageError(f"resolution {pixels}: {self.lineage.name} makes pictures of {self.picture} pixels alone")
        factor = self.latent.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        shorter = min(self.shape[1:])
        sides = [Fraction(pixels * side, shorter * factor) for side in self.shape[1:]]
        if any(side.denominator > 1 for side in sides):
            wide = "" if self.shape[1] == self.shape[2] else f", in the aspect ratio of {self.picture}"
            raise UsageError(f"resolution {pixels}: the autoencoder and the network make multiples of {factor} pixels{wide}")
        height, width = (int(side) * factor // self.latent.factor for side in sides)
        return replace(self, size=(height, width))

    @property
    def pixels(self) -> int:
        """Width of its pictures."""
        return self.shape[-1] * (self.latent.factor if self.latent is not None else 1)

    @property
    def picture(self) -> str:
        """The size of its pictures in words: one number of a square, else WIDTHxHEIGHT."""
        width, height = self.pixels, self.pixels * self.shape[1] // self.shape[2]
        return str(width) if width == height else f"{width}x{height}"

    @property
    def about(self) -> str:
        """What it is and what was assumed of it, for the first line of a job."""
        return "; ".join((f"{self.lineage.kind} {self.lineage.name}", *self.notes))

    def with_defaults(
        self, solver: str | None, steps: int | None, guidance_scale: float | None, guidance_calls: Literal[1, 2] = 1
    ) -> Sampling:
        """The sampling settings that result from what the user gave.

        Raises UsageError where the model cannot be sampled so: a student has its solver, steps and guidance built in.
        """
        own, schedule = self.sampling, self.denoiser.schedule
        table = isinstance(schedule, TableSchedule)
        if self.few_step_times is not None:
            if solver not in (None, "few-step"):
                raise UsageError(f"--solver {solver}: a student is sampled by few-step alone", "leave --solver out")
            if guidance_scale not in (None, 1):
                raise UsageError(f"--guidance-scale {guidance_scale}: a student's guidance is built in", "leave --guidance-scale out")
        out = Sampling(
            solver=solver or own.solver,
            steps=steps or (own.steps if solver in (None, own.solver) else (1 if solver == "few-step" else 50 if table else 18)),
            guidance_scale=own.guidance_scale if guidance_scale is None else guidance_scale,
            guidance_calls=guidance_calls,
        )
        if out.guidance_scale < 1:
            raise UsageError(f"--guidance-scale {out.guidance_scale:g}: below 1 it leads away from the condition", "1 is without guidance")
        if out.solver in ("pndm", "dpm++") and not table:
            raise UsageError(f"--solver {out.solver}: for models with a table of times, such as Stable Diffusion's", "use heun or ddim")
        zero = not schedule.alpha(torch.tensor(schedule.t_max, dtype=torch.float64)) > 0
        if out.solver in ("heun", "pndm") and zero:
            raise UsageError(f"--solver {out.solver}: the model's schedule ends without signal (zero terminal SNR)", "use --solver ddim")
        if self.scheduler is not None and schedule.bins is not None and out.steps >= schedule.bins:
            raise UsageError(f"--steps {out.steps}: the model has {schedule.bins} times", "a few dozen steps are plenty")
        if out.guidance_scale != 1 and not self.conditioner.has_null:
            raise UsageError(f"--guidance-scale {out.guidance_scale}: the model knows no null class", "use 1")
        self.times(out.solver, out.steps)
        return out

    @property
    def shown(self) -> int:
        """How many of its pictures are looked at together."""
        return 40 if self.pixels < LARGE else 8

    @property
    def enlarged(self) -> int:
        """How many times its pictures are enlarged to be looked at."""
        return max(1, 64 // self.pixels)

    def examples(self, seed: int, count: int, sampling: Sampling | None = None, classes: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Images (count, C, H, W) of noises that no job reaches by counting, and their labels: to look at while training."""
        labels = self.conditioner.spread(count, classes)
        return self.sample(Draws(seed, range(2**40, 2**40 + count)), labels, sampling), labels

    @torch.no_grad()
    def sample(self, draws: Draws, labels: Tensor, sampling: Sampling | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] on the CPU, from the noise of `draws` (one row a label), under `sampling`."""
        return self.codec.decode(self.generate(draws, labels, sampling)).cpu()

    @torch.no_grad()
    def generate(self, draws: Draws, labels: Tensor, sampling: Sampling | None = None) -> Tensor:
        """As `sample`, but what the denoiser works on, on its device: the images of a pixel model, latents (B, c, h, w)."""
        sampling = sampling or self.sampling
        device = next(self.denoiser.parameters()).device
        schedule = self.denoiser.schedule
        null = self.conditioner.null if sampling.guidance_scale != 1 else None
        denoiser = guided(self.denoiser, sampling.guidance_scale, null, sampling.guidance_calls)
        condition = self.conditioner(labels.to(device))
        times = self.times(sampling.solver, sampling.steps)
        few_step = sampling.solver == "few-step" and isinstance(schedule, EDMSchedule)
        x = (times[0].item() if few_step else schedule.prior_std) * draws.normal("prior", self.shape).to(device)

        def noise(k: int) -> Tensor:
            return draws.normal("solver", self.shape, turn=k).to(device)

        if sampling.solver == "heun":
            x0 = solvers.heun(denoiser, schedule, x, times, condition)
        elif isinstance(schedule, TableSchedule) and sampling.solver in (schedulers.SOLVERS if self.scheduler else ("pndm", "dpm++")):
            config = self.scheduler or schedulers.config_of(schedule, self.denoiser.parameterisation)
            x0 = schedulers.run(config, sampling.solver, sampling.steps, denoiser, self.denoiser, x, condition)
        elif sampling.solver in ("euler", "ddim"):
            x0 = solvers.ddim(denoiser, schedule, x, times, condition)
        elif sampling.solver == "ancestral":
            x0 = solvers.ddim(denoiser, schedule, x, times, condition, eta=1.0, noise=noise)
        elif sampling.solver == "few-step":
            options: dict[str, Any] = {"sigma_min": self.denoiser.scales.sigma_min, "project": self.codec.project} if few_step else {}
            denoiser = denoiser if self.lcm is None else lcm.bounded(denoiser, self.lcm)
            x0 = solvers.few_step(denoiser, schedule, x, times, condition, noise=noise, **options)  # clamped as in diffusers' pipeline
        else:
            raise UsageError(f"--solver {sampling.solver}: unknown")
        return self.codec.project(x0.float())

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write an ordinary diffusers pipeline folder with one JSON file of ours beside it."""
        from distill_cli.models import pixel, stable_diffusion

        (pixel.save if self.latent is None else stable_diffusion.save)(self, Path(folder), dtype)


def network_evaluations(sampling: Sampling) -> int:
    """Denoiser calls a sample costs (guidance counts twice)."""
    calls = {"heun": 2 * sampling.steps - 1, "pndm": sampling.steps + (sampling.steps > 1)}.get(sampling.solver, sampling.steps)
    return calls * (1 if sampling.guidance_scale == 1 else 2)

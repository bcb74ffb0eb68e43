"""Distribution matching distillation (Yin et al. 2311.18828): a one-step student from a teacher and its pairs.

In one step the gradient at the student's images is the difference of two denoisers, the teacher (guided) and the fake
score (not guided), plus that of a regression on pairs. Then the fake score learns to denoise the same images, made
before the student's step. Dropout is off everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from distill_cli.data.prompts import in_turn
from distill_cli.diffusion.condition import GUIDANCE_SCALE, Condition
from distill_cli.diffusion.denoiser import Denoiser, NetworkDenoiser
from distill_cli.diffusion.guidance import scales
from distill_cli.diffusion.losses import denoising_loss, matching_gradient, matching_loss, regression_loss, wide
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.schedule import NoiseSchedule, add_noise
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.launch import preparing
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.models.codec import Codec
from distill_cli.models.conditioners import Conditioner
from distill_cli.models.cost import text_cost
from distill_cli.models.model import Model
from distill_cli.models.perceptual import Perceptual
from distill_cli.models.sampler import Sampler
from distill_cli.models.steering import led, led_by
from distill_cli.pairs.store import PairStore
from distill_cli.processes import rank, say
from distill_cli.runs import Run
from distill_cli.training.identity import digest
from distill_cli.training.job import Job
from distill_cli.training.objective import Call, Calls, Full, Loss, Objective, Phase, Row, Rows, phase_at, refuse_student, student_of
from distill_cli.training.signs import GENERAL as SIGNS

ASKED = {"lpips": "lpips_weights", "decoder": "decoder"}
"""Frozen networks -> the option that names each."""
FAKE_BEHIND, FAKE_STILL = 1.8, 0.05
"""The fake score's error over the teacher's above which it has fallen behind, and how near to 1 it is where it has not yet learned."""


def open(config: DMDConfig, job: Job) -> Objective:
    """Read teacher, pairs and prompts; a plan does not need the pairs."""
    teacher = led(job.teacher(config.teacher, config.device), config, teaching=True, dry_run=job.dry_run)
    store = job.pairs(config.pairs, config.out)
    asked = config.prompts is not None or config.pairs is None
    job.prompts = teacher.conditioner.chosen(config.prompts, teacher.lineage.data) if asked else ()
    job.say_read(teacher, store, job.prompts)
    job.plan |= text_cost(teacher.conditioner, config.text, len(job.prompts), config.matched)
    if store is not None and not job.dry_run:
        store.verify()
    elif not job.dry_run:
        say("no --pairs: training by distribution matching alone, without the regression that keeps all modes")
    objective = DMD(config, teacher, store, job.prompts)
    if config.prompts is not None and job.resume is None and not job.dry_run and rank() == 0:
        objective.teacher.conditioner.say_cut(range(len(objective.teacher.conditioner.prompts)))
    return objective


class DMD(Objective):
    """The objective. Student and fake score start as copies of the teacher."""

    config: DMDConfig
    guidance: float
    order: Order
    real: Denoiser
    """The teacher under guidance."""

    def __init__(self, config: DMDConfig, teacher: Model, pairs: PairStore | None, prompts: Sequence[str] = ()) -> None:
        refuse_student(teacher, config.teacher, "dmd")
        if teacher.denoiser.schedule.bins is not None and config.changed("t_bins"):
            raise UsageError(f"t_bins {config.t_bins}: for EDM and flow teachers, this one has a table of times", "leave it out")
        if config.regression_loss == "lpips":
            teacher.codec.kind.needs_pictures("regression_loss lpips", "regression_loss=l2 or huber")
        if pairs is not None:
            config = scaled_as(config, pairs)
        super().__init__(config, "student")
        self.pairs = pairs
        self.schedule, self.teacher_hash = teacher.denoiser.schedule, teacher.weights_hash()
        self.identity |= {"teacher": self.teacher_hash, **led_by(teacher)}
        self.start = student_time(config, self.schedule)
        planned = not self.teacher_hash
        weight = 0.25 if config.regression_weight is None else config.regression_weight
        self.regression_weight = weight if config.pairs is not None else 0.0
        if config.regression_steps and config.regression_steps >= config.steps:
            say(f"regression_steps {config.regression_steps}: all of the {config.steps} steps have the regression")
        if config.regressed < config.steps:
            self.phases = [Phase(config.regressed, "regressed"), Phase(config.steps - config.regressed, "student")]
        if pairs is not None:
            teacher = teacher.at(pairs.manifest.shape)
            check_pairs(pairs, teacher, self.teacher_hash, config.classes)
            self.order = Order(config.seed, len(pairs))
            self.identity["pairs"] = pairs.manifest.settings_hash
        self.distance: Callable[[Tensor, Tensor], Tensor] | None = None
        answering: dict[str, nn.Module] = {}
        if self.regression_weight:
            self.distance, answering = measure(config, teacher.codec, planned)
            self.identity |= {key: digest(answering[name]) for name, key in ASKED.items() if name in answering and not planned}
        teacher, self.of_pairs = prompted(config, teacher, pairs, prompts, planned)
        self.teacher = teacher
        if not planned:
            self.identity |= teacher.conditioner.digests()
        scale = pairs.manifest.guidance_scale if config.guidance_scale is None and pairs is not None else config.guidance_scale
        self.sampling = teacher.taught_by(scale, config.guidance_range, config.guidance_calls)
        self.guidance = self.sampling.guidance_scale
        if not planned:
            self.real = teacher.guided(self.sampling, told=config.guidance_range is not None)
        rates = {"student": config.lr}
        if config.matching_weight and config.fake_score:
            rates["fake"] = config.fake_lr or config.lr
        self.trained |= {name: Full(self.begun_from(teacher).eval().requires_grad_(True), rate) for name, rate in rates.items()}
        working = teacher.conditioner.working() if config.text == "live" or not planned else []
        self.hold(teacher)
        self.frozen |= {name: part for name, part in teacher.conditioner.parts().items() if part in working}
        self.frozen |= teacher.codec.parts() | answering

    def generate(self, noise: Tensor, condition: Condition) -> Tensor:
        """The student's images (B, C, H, W) from standard-normal noise, which it takes for x at its time."""
        t = torch.full((len(noise),), self.start, device=noise.device)
        return self.network("student")(self.schedule.prior(self.start) * noise, t, condition)

    def prepare(self, where: torch.device, run: Run) -> None:
        """Make missing embeddings; processes share the work. Afterwards the text encoder is on the CPU, unless text is live."""
        if self.pairs is not None:
            self.pairs.verified.save(elsewhere=True)  # for a read-only store in the run's folder
        with preparing(where, f"resume with --resume {run.folder}") as stop:
            for conditioner in dict.fromkeys((self.of_pairs, self.teacher.conditioner)):  # which may keep the text encoder there
                conditioner.complete(where, stop)

    def labels(self, draws: Draws) -> Tensor:
        """(B,) labels of what is matched, on the CPU: a look-up by labels on a GPU would wait for it."""
        return self.teacher.conditioner.at_random(draws.uniform("label"), self.config.classes)

    def matched(self, draws: Draws) -> Draws:
        """The images of a part of a batch that are matched beside its pairs: as many in all, whatever the parts and processes are."""
        whole, of = self.config.matched, self.config.batch_size
        if whole == of:
            return draws
        part = of // self.config.accumulate
        first = draws.indices[0] // part * part
        begins = first * whole // of
        return Draws(draws.seed, [begins + index - first for index in draws.indices[: len(draws) * whole // of]])

    def regresses(self, step: int) -> bool:
        """Whether step 0, 1, ... has the regression on pairs."""
        return bool(self.regression_weight) and phase_at(self.phases, step) == 0

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        where, shape = self.device, self.teacher.shape
        matched = self.matched(draws)
        count = len(matched)
        noise = matched.normal("noise", shape)
        condition = self.teacher.conditioner(self.labels(matched))
        if self.config.guidance_range:
            condition = condition.plus(GUIDANCE_SCALE, scales(self.config.guidance_range, matched))
        condition = condition.to(where)
        if step + 1 < self.config.steps:
            self.teacher.conditioner.ahead(self.labels(self.matched(draws.later(self.config.batch_size))))
        paired, regresses = None, self.regresses(step)
        if self.pairs is not None and (regresses or self.config.match_pairs):
            stored = self.pairs.batch([self.order[i] for i in draws.indices])
            keys = ("noise", "x0", *(["guidance"] if self.config.guidance_range else []))
            paired = {key: sent(stored[key], where) for key in keys}
            noise, theirs = torch.cat([sent(noise, where), paired["noise"]]), self.of_pairs(stored["label"]).to(where)
            if self.config.guidance_range:
                theirs = theirs.plus(GUIDANCE_SCALE, paired["guidance"])
            condition = Condition.cat([condition, theirs])
        images = self.generate(sent(noise, where), condition)
        generated = images[count:]
        rows = [(matched, 0)]
        if self.config.match_pairs:
            rows.append((draws, self.config.fake_steps))
            count = len(images)
        x, condition = images[:count], condition[:count]

        def each(kind: str, *what: Any, turn: int = 0) -> Tensor:
            """A draw for each image that is matched; images of pairs have turns of their own."""
            return sent(torch.cat([getattr(row, kind)(*what, turn=turn + first) for row, first in rows]), where)

        loss = images.new_zeros(())
        metrics: dict[str, Tensor] = {}
        if self.config.matching_weight:
            t = times_at(self.schedule, self.config.t_bins, each("uniform", "matching_time"), self.config.t_low, self.config.t_high)
            gradient, metrics = self._match(x, each("normal", "matching_noise", shape), t, condition)
            matching = matching_loss(x, gradient)
            loss, metrics["matching_loss"] = loss + self.config.matching_weight * matching, matching
        if paired is not None and regresses:
            regression = self.judge(generated, paired["x0"]).mean()
            loss, metrics["regression_loss"] = loss + self.regression_weight * regression, regression
        yield Loss("student", loss, metrics)

        if "fake" in self.trained:
            x = x.detach()
            for turn in range(self.config.fake_steps):
                t = times_at(self.schedule, self.config.t_bins, each("uniform", "score_time", turn=turn), 0.0, 1.0)
                eps = each("normal", "score_noise", shape, turn=turn)
                sigma_data, error = self.teacher.denoiser.scales.sigma_data, self.teacher.denoiser.error
                errors = denoising_loss(self.network("fake"), self.schedule, x, eps, t, condition, sigma_data=sigma_data, error=error)
                yield Loss("fake", errors.mean())

    @torch.no_grad()
    def _match(self, x: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient at the student's images x, and the error of each denoiser on them.

        Without a fake score x takes the place of its estimate: in the mean over the noise the real score alone remains.
        """
        x = wide(x.detach())
        noisy = add_noise(self.schedule, x, noise, t)
        estimates = {"real": self.real(noisy, t, condition)}
        if "fake" in self.trained:
            estimates["fake"] = self.network("fake")(noisy, t, condition)
        weight = self.schedule.weight(t, self.teacher.denoiser.scales.sigma_data, "noise")
        errors = {f"{name}_error": (weight * (d - x).square().flatten(1).mean(1)).mean() for name, d in estimates.items()}
        return matching_gradient(x, estimates["real"], estimates.get("fake", x)), errors

    def model(self, network: nn.Module, step: int) -> Model:
        assert isinstance(network, NetworkDenoiser)
        teacher = self.teacher
        conditioner, lineage = teacher.conditioner.taught(self.config.classes), student_of(teacher.lineage, "dmd", self.teacher_hash)
        sampler, learned = Sampler.one_step(self.schedule, self.start), self.config.guidance_range
        sampler = sampler.with_told(self.guidance, learned) if learned else sampler
        return replace(teacher, denoiser=network, conditioner=conditioner, lineage=lineage, sampler=sampler)

    def reference(self) -> Row:
        return self.teacher, self.sampling

    def compared(self, made: Model) -> Rows:
        return {"teacher": self.reference(), "student": (made, made.sampling)}

    def calls(self, step: int = 0) -> Calls:
        config, size, paired = self.config, self.config.batch_size, self.regresses(step)
        matched = config.matched + size * (config.match_pairs and config.matched > 0)
        trainings, forwards = [Call("student", config.matched + size * (paired or config.match_pairs))], []
        if matched:
            combines = self.sampling.combines or config.guidance_range
            calls = config.guidance_calls if combines else 1
            forwards = [Call("teacher", matched * (2 if combines else 1) // calls)] * calls
        if "fake" in self.trained:
            forwards.append(Call("fake", matched))
            trainings += [Call("fake", matched)] * config.fake_steps
        return Calls(trainings, forwards, size if paired and config.regression_loss == "lpips" else 0, between=True)

    def judge(self, x: Tensor, reference: Tensor) -> Tensor:
        """With gradient_checkpointing LPIPS goes a picture at a time."""
        assert self.distance is not None
        apart = self.config.gradient_checkpointing and "lpips" in self.frozen
        return one_by_one(self.distance, x, reference) if apart else self.distance(x, reference)

    def advice(self, metrics: Mapping[str, float], done: float) -> str:
        return behind(metrics)

    def remedies(self, metrics: Mapping[str, float]) -> dict[str, str]:
        return remedies(metrics, self.guidance, "regression_loss" in metrics)


def behind(metrics: Mapping[str, float]) -> str:
    """A warning where the fake score's error on the student's images is far above the teacher's, or ''."""
    real, fake = metrics.get("real_error", 0.0), metrics.get("fake_error", 0.0)
    if not fake > FAKE_BEHIND * real > 0:
        return ""
    found = f"its error on the student's images is {fake / real:.2f} times the teacher's"
    return f"the fake score has fallen behind: {found}. Lower lr, or raise fake_steps or fake_lr"


def remedies(metrics: Mapping[str, float], guidance: float | None, held: bool) -> dict[str, str]:
    """What to change at signs of sickness, where distribution matching made them; `held`: whether a regression on pairs holds the student.

    A fake score whose error on the student's images is still the teacher's own has hardly learned them.
    """
    real, fake = metrics.get("real_error", 0.0), metrics.get("fake_error", 0.0)
    if abs(fake - real) < FAKE_STILL * real:
        lags = f"The fake score lags: its error on them is still {fake / real:.2f} times the teacher's. Raise fake_lr or fake_steps"
        return dict.fromkeys(SIGNS, lags)
    if not held:
        return dict.fromkeys(
            SIGNS, "Nothing holds the student to pictures of the teacher: give pairs for a regression, in all steps, or lower lr"
        )
    strong = {"over-saturated": f"Lower guidance_scale, now {guidance:g}"} if guidance is not None and guidance > 1 else {}
    return {"collapsing": "Lower lr, or raise regression_weight", **strong}


def times_at(schedule: NoiseSchedule, t_bins: int, uniform: Tensor, low: float, high: float) -> Tensor:
    """(B,) times between the shares `low` and `high` of the range, both included: whole times of a table, or one of `t_bins`."""
    bins = schedule.bins or t_bins
    first, last = round(low * bins), min(bins - 1, round(high * bins))
    place = (first + uniform * (last - first + 1)).floor()
    return schedule.at(place / max(1, bins - 1)).float()


def scaled_as(config: DMDConfig, pairs: PairStore) -> DMDConfig:
    """The config with the guidance of the pairs, where it says none. Raises UsageError for a range where the pairs have others."""
    span, scale = pairs.manifest.guidance_range, pairs.manifest.guidance_scale
    if config.guidance_scale is None and config.guidance_range is None:
        if span:
            say(f"guidance_range {span[0]:g},{span[1]:g}: the pairs'; the student is told its scale")
        return config.model_copy(update={"guidance_range": span})
    low, high = span or (scale, scale)
    if config.guidance_range is None and span:
        fixed = f"guidance_scale {config.guidance_scale:g}: {pairs.folder} has scales from {low:g} to {high:g}"
        raise UsageError(fixed, f"guidance_range={low:g},{high:g}, which is their default, or other pairs")
    if config.guidance_range and not config.guidance_range[0] <= low <= high <= config.guidance_range[1]:
        theirs = f"scales from {low:g} to {high:g}" if span else f"the scale {low:g}"
        learned = f"guidance_range {config.guidance_range[0]:g},{config.guidance_range[1]:g}"
        raise UsageError(f"{learned}: {pairs.folder} has {theirs}", "distill pairs guidance_range=LOW,HIGH makes pairs within it")
    return config


def student_time(config: DMDConfig, schedule: NoiseSchedule) -> float:
    """The time that the student is told. Raises UsageError for a time that the schedule does not have.

    An earlier time than the last is told with pure noise all the same, as DMD2's one-step student of SDXL is (Yin et al. 2405.14867 and
    its public program, conditioning_timestep 399): there the teacher's estimate is nearer to a picture to begin with.
    """
    time = schedule.t_max if config.student_time is None else config.student_time
    if time > schedule.t_max or (schedule.bins is not None and time % 1):
        has = f"whole times up to {schedule.t_max:g}" if schedule.bins is not None else f"times up to {schedule.t_max:g}"
        raise UsageError(f"student_time {time:g}: {config.teacher} has {has}", "leave it out for the last")
    return time


def measure(config: DMDConfig, codec: Codec, planned: bool) -> tuple[Callable[[Tensor, Tensor], Tensor], dict[str, nn.Module]]:
    """The distance of the regression, two (B, C, H, W) -> (B,), and the networks that it calls; in a plan without their weights."""
    if config.decoder:
        codec = codec.sketched_decoder() if planned else codec.with_decoder(config.decoder)
    if config.regression_loss != "lpips":
        return partial(regression_loss, config.regression_loss), {}
    perceptual = Perceptual(config.lpips_weights, codec.lpips_below, planned=planned)
    decoders = {"decoder" if config.decoder else name: part for name, part in codec.parts().items()}
    return partial(of_decoded, perceptual, codec), {"lpips": perceptual, **decoders}


def prompted(
    config: Any, teacher: Model, pairs: PairStore | None, prompts: Sequence[str] = (), planned: bool = False
) -> tuple[Model, Conditioner]:
    """The teacher with the prompts of a run, read here unless given, and the conditioner for the pairs' labels.

    Embeddings are stored beside the pairs, or in the run's folder, so training needs no text encoder, unless the run's text is live.
    A plan stores none.
    """
    stored = pairs.manifest.negative_prompt if pairs is not None else None
    negative = stored if config.negative_prompt is None else config.negative_prompt
    theirs = in_turn(pairs.prompts(), len(pairs)) if pairs is not None else ()
    if not prompts:
        prompts = theirs if theirs and config.prompts is None else teacher.conditioner.chosen(config.prompts, teacher.lineage.data)
    if prompts or config.prompts is not None or negative:
        teacher = teacher.with_prompts(prompts, negative)
    own = of_pairs = teacher.conditioner
    dtype = pairs.manifest.dtype if pairs is not None else "float16"
    if config.text == "live":
        own = own.live(dtype, config.teacher)
    elif not planned and (pairs is None or config.prompts is not None):
        own = own.stored(config.out, dtype)
    if planned:
        return replace(teacher, conditioner=own), own
    if pairs is not None:
        of_pairs = (of_pairs if config.prompts is None else of_pairs.given(theirs, negative)).stored(pairs.folder, dtype)
    shared = pairs is not None and config.prompts is None
    return replace(teacher, conditioner=of_pairs if shared else own), of_pairs if pairs is not None else own


def of_decoded(metric: Callable[[Tensor, Tensor], Tensor], codec: Codec, x: Tensor, reference: Tensor) -> Tensor:
    """(B,) distances between the decoded pictures of x and its reference."""
    with torch.no_grad():
        there = codec.raw(reference)
    torch.clear_autocast_cache()
    return metric(codec.raw(x), there)


def one_by_one(distance: Callable[[Tensor, Tensor], Tensor], x: Tensor, reference: Tensor) -> Tensor:
    """The same distances a picture at a time, computed again in the backward pass: of each picture only its latents are kept."""
    pairs = zip(x.split(1), reference.split(1), strict=True)
    return torch.cat([torch.utils.checkpoint.checkpoint(distance, one, there, use_reentrant=False) for one, there in pairs])


def check_pairs(pairs: PairStore, teacher: Model, teacher_hash: str, classes: list[int] | None = None, flag: str = "--pairs") -> None:
    """Raise UsageError for pairs of another teacher, resolution or guide, or of classes that the student does not learn."""
    manifest = pairs.manifest
    if tuple(manifest.shape) != teacher.shape:
        raise UsageError(f"{flag} {pairs.folder}: images of shape {tuple(manifest.shape)}, the teacher's are {teacher.shape}")
    if manifest.guides != teacher.guidance():
        key = next(iter({**manifest.guides, **teacher.guidance()}))
        raise UsageError(f"{flag} {pairs.folder}: made under another {key} and scale than the teacher's", "give the same to both commands")
    if manifest.teacher_hash != teacher_hash and teacher_hash:
        raise UsageError(f"{flag} {pairs.folder}: made by another teacher ({manifest.teacher})", "make pairs with this --teacher")
    others = sorted(set(manifest.classes) - set(classes if classes is not None else manifest.classes))
    if others:
        raise UsageError(f"{flag} {pairs.folder}: has class {others[0]}, which is not in classes", "make pairs of the same --classes")

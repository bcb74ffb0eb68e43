"""DMD2 (Yin et al. 2405.14867): a student of one or a few steps, by distribution matching without pairs.

One step of a run is one step of the student and `fake_steps` of the fake score, each on new images. Image i of the j-th of these turns has
the random numbers of sample fake_steps * i + j. The student's images of a turn come from one of its steps k, the same for all images and
processes: it makes x0 in steps 0 to k - 1, gives it new noise, and is trained at step k alone (backward simulation). Dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_cli.data import Images
from distill_cli.diffusion.condition import Condition
from distill_cli.diffusion.denoiser import Denoiser, NetworkDenoiser
from distill_cli.diffusion.guidance import estimates
from distill_cli.diffusion.losses import matching_loss, regression_loss, wide
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.schedule import add_noise
from distill_cli.diffusion.solvers import few_step, renoised
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.launch import preparing
from distill_cli.methods.dmd.objective import behind, check_pairs, prompted, times_at
from distill_cli.methods.dmd2 import begin, critic
from distill_cli.methods.dmd2.config import DMD2Config
from distill_cli.methods.dmd2.maths import guidance_part, matching_part, shares
from distill_cli.models.cost import text_cost
from distill_cli.models.model import Model
from distill_cli.models.sampler import Sampler
from distill_cli.models.steering import led, led_by
from distill_cli.pairs.store import PairStore
from distill_cli.processes import rank
from distill_cli.runs import Run
from distill_cli.training.job import Job
from distill_cli.training.objective import Call, Calls, Full, Loss, Objective, Phase, Row, Rows, refuse_student, student_of
from distill_cli.training.signs import GENERAL
from distill_cli.training.source import Source, read


def open(config: DMD2Config, job: Job) -> Objective:
    """Read teacher, student, real images, pairs and prompts; a plan needs no pairs."""
    teacher = job.teacher(config.teacher, config.device)
    student = begin.student_of(config, job)
    data: Images | PairStore | None = None
    if config.resolution is not None and teacher.codec.factor > 1:
        teacher = teacher.with_resolution(config.resolution)
    teacher = led(teacher, config, teaching=True, dry_run=job.dry_run)
    if config.data is not None:
        config, data = read(config, teacher, job, "dmd2")
    pairs = job.pairs(config.init_pairs, config.out)
    if config.prompts is not None or (data is None and pairs is None):
        job.prompts = teacher.conditioner.chosen(config.prompts, teacher.lineage.data)
    job.say_read(*([] if data is not None else [teacher]), student, pairs, job.prompts)
    job.plan |= text_cost(teacher.conditioner, config.text, len(job.prompts), config.batch_size * config.fake_steps)
    if pairs is not None and not job.dry_run:
        pairs.verify()
    objective = DMD2(config, teacher, data, student, pairs, job.prompts)
    if config.prompts is not None and job.resume is None and not job.dry_run and rank() == 0:
        objective.teacher.conditioner.say_cut(range(len(objective.teacher.conditioner.prompts)))
    return objective


@dataclass
class Batch:
    """The student's images of a turn."""

    draws: Draws
    step: int
    """The student's step 0, 1, ... that made them."""
    x: Tensor
    """(B, C, H, W)."""
    condition: Condition
    real: tuple[Tensor, Condition] | None
    """Real images for the discriminator."""


class DMD2(Objective):
    """The objective. The fake score starts as a copy of the teacher, the student as another or as a given student."""

    config: DMD2Config
    guidance: float

    def __init__(
        self,
        config: DMD2Config,
        teacher: Model,
        data: Images | PairStore | None = None,
        student: Model | None = None,
        pairs: PairStore | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        super().__init__(config, "student")
        refuse_student(teacher, config.teacher, "dmd2")
        self.schedule, self.teacher_hash = teacher.denoiser.schedule, teacher.weights_hash()
        planned = not self.teacher_hash
        self.identity |= {"teacher": self.teacher_hash, **led_by(teacher)}
        self.own = begin.times_of(config, self.schedule, student)
        self.source = None if data is None else Source(config, teacher, data, planned)
        if self.source is not None:
            self.order, self.images = self.source.order, self.source.images
            self.identity |= self.source.identity
            if "prompts" in self.source.identity:
                self.identity["captions"] = self.source.identity["prompts"]
            teacher = teacher.at(self.source.model.shape)
            if not config.init_pairs:
                prompts = prompts or self.source.model.conditioner.prompts
        self.identity["times of the student"] = self.own.tolist()
        self.pairs = pairs
        if config.init_pairs:
            self.phases = [Phase(config.init_steps, "start"), Phase(config.steps, "student", anew=True)]
        if pairs is not None:
            if config.resolution is None and self.source is None:
                teacher = teacher.at(pairs.manifest.shape)
            check_pairs(pairs, teacher, self.teacher_hash, config.classes, "--init-pairs")
            self.identity["init_pairs"], self.of_pairs = pairs.manifest.settings_hash, Order(config.seed, len(pairs))
        teacher, self.paired = prompted(config, teacher, pairs, prompts, planned)
        self.teacher = teacher
        if not planned:
            self.identity |= teacher.conditioner.digests()
        self.sampling = teacher.with_defaults(None, None, config.guidance_scale, config.guidance_calls)
        self.guidance = self.sampling.guidance_scale
        self.check()
        self.discriminator = config.discriminator
        if self.discriminator != "none":
            critic.check(config.compile, teacher.backbone)
        fake, own = self.begun_from(teacher), self.begun_from(teacher)
        if student is not None:
            begin.take_over(config, student, self.teacher_hash, own)
            self.identity["student"] = student.weights_hash()
        if self.schedule.grid:
            own.parameterisation = "consistency"  # as its pipeline has it, also after the first step
        critics: nn.Module = fake if self.discriminator == "none" else critic.Critic(fake, config.seed)
        for name, network, rate in (("student", own, config.lr), ("fake", critics, config.fake_lr or config.lr)):
            self.trained[name] = Full(network.eval().requires_grad_(True), rate)
        self.hold(teacher)
        working = teacher.conditioner.working() if config.text == "live" or not planned else []
        self.frozen |= {name: part for name, part in teacher.conditioner.parts().items() if part in working}
        self.frozen |= teacher.codec.parts()
        self.steps = Order(config.seed, len(self.own))
        self.cycle = len(self.own) // math.gcd(len(self.own), config.fake_steps)

    def check(self) -> None:
        """Raise UsageError for keys that mean nothing without guidance."""
        config = self.config
        if not config.matching_weight and not self.guided:
            raise UsageError("matching_weight 0: without guidance nothing else trains the student", "a guidance_scale above 1")
        if not self.guided and (given := config.changed("guidance_times")):
            raise UsageError(f"{given[0]} has no use here: there is no guidance part", "a guidance_scale above 1, or leave it out")

    @cached_property
    def real(self) -> Denoiser:
        """The teacher under guidance."""
        return self.teacher.guided(self.sampling)

    def prepare(self, where: torch.device, run: Run) -> None:
        """Encode real images, and make missing embeddings; processes share the work."""
        if self.pairs is not None:
            self.pairs.verified.save(elsewhere=True)
        if self.source is not None:
            self.examples = self.source.prepare(where, run)
        with preparing(where, f"resume with --resume {run.folder}") as stop:
            for conditioner in dict.fromkeys((self.paired, self.teacher.conditioner)):  # which may keep the text encoder there
                conditioner.complete(where, stop)

    def step_of(self, step: int, turn: int) -> int:
        """The student's step that a turn trains: each of them once in as many turns, in a drawn order."""
        return self.steps[step * self.config.fake_steps + turn]

    def turn(self, draws: Draws, turn: int) -> Draws:
        """The random numbers of a turn."""
        return Draws(draws.seed, [self.config.fake_steps * index + turn for index in draws.indices])

    def labels(self, own: Draws) -> Tensor:
        """(B,) labels of the student's images of a turn, on the CPU."""
        return self.teacher.conditioner.at_random(own.uniform("label"), self.config.classes)

    def condition(self, step: int, draws: Draws, turn: int) -> Condition:
        """The condition of the student's images of a turn; the prompts of the next turn are announced."""
        conditioner = self.teacher.conditioner
        out = conditioner(self.labels(self.turn(draws, turn))).to(self.device)
        if turn + 1 < self.config.fake_steps:
            conditioner.ahead(self.labels(self.turn(draws, turn + 1)))
        elif step + 1 < sum(phase.steps for phase in self.phases):
            conditioner.ahead(self.labels(self.turn(draws.later(self.config.batch_size), 0)))
        return out

    def batch(self, step: int, draws: Draws, turn: int, grad: bool = False) -> Batch:
        """The student's images of a turn, with a gradient or without."""
        own = self.turn(draws, turn)
        k, where, shape = self.step_of(step, turn), self.device, self.teacher.shape
        real = None if self.source is None else self.examples.batch(own, where)
        if self.source is not None and turn + 1 < self.config.fake_steps:
            self.examples.ahead(self.turn(draws, turn + 1))
        given = real if self.config.input == "data" else None
        condition = self.condition(step, draws, turn) if given is None else given[1]
        network, schedule = self.network("student"), self.schedule
        x = schedule.prior(self.own[0].item()) * sent(own.normal("noise", shape), where)
        if k and given is not None:
            x = renoised(schedule, given[0], self.own[k], sent(own.normal("solver", shape, turn=k), where), schedule.floor)
        elif k:
            with torch.no_grad():
                made = few_step(
                    network,
                    schedule,
                    x,
                    self.own[:k],
                    condition,
                    sigma_min=schedule.floor,
                    noise=lambda j: sent(own.normal("solver", shape, turn=j), where),
                    project=self.teacher.codec.project,
                )
            torch.clear_autocast_cache()  # casts made without gradient must not serve the call with it
            x = renoised(schedule, made, self.own[k], sent(own.normal("solver", shape, turn=k), where), schedule.floor)
        with torch.set_grad_enabled(grad):
            x = network(x, sent(self.own[k], x.device, x.dtype).expand(len(x)), condition)
        return Batch(own, k, x, condition, real)

    def ahead(self, step: int, draws: Draws) -> None:
        if self.source is not None and step >= self.config.init_steps:
            self.examples.ahead(self.turn(draws, 0))

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        if step < self.config.init_steps:
            yield self.regression(draws)
            return
        made = self.batch(step, draws, 0, grad=True)
        gradient, metrics = self.gradient(made)
        loss = metrics["matching_loss"] = matching_loss(made.x, gradient)
        fake = self.trained["fake"].state()
        if self.discriminator != "none":
            fake.requires_grad_(False)  # until the student's gradient is there; a wrapper for processes would wait for the fake's
            metrics["gan_loss"] = F.softplus(-self.logits_of(made)).mean()
            loss = loss + self.config.gan_weight * metrics["gan_loss"]
        yield Loss("student", loss, metrics)
        fake.requires_grad_(True)
        for turn in range(self.config.fake_steps):
            made = self.batch(step, draws, turn) if turn else replace(made, x=made.x.detach())
            yield self.fake_loss(made)

    def regression(self, draws: Draws) -> Loss:
        """The loss of the first phase: the distance from the teacher's pictures of the same noise."""
        assert self.pairs is not None
        stored, time = self.pairs.batch([self.of_pairs[i] for i in draws.indices]), self.own[0]
        noise, x0 = (sent(stored[key], self.device) for key in ("noise", "x0"))
        condition = self.paired(stored["label"]).to(self.device)
        times = sent(time, noise.device, noise.dtype).expand(len(noise))
        made = self.network("student")(self.schedule.prior(time.item()) * noise, times, condition)
        return Loss("student", regression_loss(self.config.init_loss, made, x0).mean())

    def noised(self, x: Tensor, draws: Draws, what: str, low: float, high: float, turn: int = 0) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) with noise of the purpose `what` at times between two shares of the range, and these times (B,)."""
        t = sent(times_at(self.schedule, self.config.t_bins, draws.uniform(f"{what}_time", turn=turn), low, high), x.device)
        return add_noise(self.schedule, x, sent(draws.normal(f"{what}_noise", x.shape[1:], turn=turn), x.device), t), t

    @torch.no_grad()
    def gradient(self, made: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient at the student's images, and the errors of teacher and fake score on them."""
        config, x = self.config, wide(made.x.detach())

        def at(where: str, turn: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Noisy images, their times, the conditional and the guided teacher's estimates."""
            low, high = shares(where, self.schedule, self.own, made.step, config.t_low, config.t_high)
            noisy, t = self.noised(x, made.draws, "matching", low, high, turn)
            return noisy, t, *estimates(self.real, noisy, t, made.condition)

        noisy, t, cond, guided = at(config.matching_times, 0)
        fake = self.fake(noisy, t, made.condition)
        weight = self.schedule.weight(t, self.teacher.denoiser.scales.sigma_data, "noise")
        metrics = {
            f"{name}_error": (weight * (estimate - x).square().flatten(1).mean(1)).mean()
            for name, estimate in (("real", guided), ("fake", fake))
        }
        gradient = config.matching_weight * matching_part(x, fake, cond, guided)
        if self.guided:
            if config.guidance_times != "same":
                _, _, cond, guided = at(config.guidance_times, 1)
            gradient = gradient + config.guidance_weight * guidance_part(x, cond, guided)
        return gradient, metrics

    @property
    def guided(self) -> bool:
        """Whether the gradient has a guidance part."""
        return (self.guidance != 1 or bool(self.teacher.guides)) and self.config.guidance_weight > 0

    def fake(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The fake score's estimate of x0."""
        answer = self.network("fake")(x, t, condition)
        return answer if self.discriminator == "none" else answer[0]

    def logits_of(self, made: Batch) -> Tensor:
        """(B,) logits of the student's images, with the gradient of the images alone."""
        noisy, t = self.noised(made.x, made.draws, "critic", 0.0, 1.0, turn=1)
        network: Any = self.trained["fake"].state()
        if self.discriminator == "fake":
            return network(noisy, t, made.condition)[1]
        return network.head(critic.features_of(self.teacher.denoiser, noisy, t, made.condition)[1])

    def fake_loss(self, made: Batch) -> Loss:
        """The fake score's denoising loss on the student's images, and the discriminator's on them and on real ones."""
        config, x, denoiser = self.config, wide(made.x), self.teacher.denoiser
        # with stretches the fake score of one step's images is asked in that step's stretch alone
        where = "stretch" if config.matching_times == "stretch" else "range"
        noisy, t = self.noised(x, made.draws, "score", *shares(where, self.schedule, self.own, made.step, 0.0, 1.0))
        weight = self.schedule.weight(t, denoiser.scales.sigma_data, denoiser.error)

        def errors(estimate: Tensor) -> Tensor:
            return (weight * (estimate[: len(x)] - x).square().flatten(1).mean(1)).mean()

        if self.discriminator == "none":
            return Loss("fake", errors(self.network("fake")(noisy, t, made.condition)))
        assert made.real is not None
        real, condition = made.real
        others = [self.noised(real, made.draws, "critic", 0.0, 1.0)]
        conditions = [made.condition, condition]
        if config.r1_weight:
            nudge = critic.NUDGE * sent(made.draws.normal("nudge", real.shape[1:]), real.device, real.dtype)
            others.append(self.noised(real + nudge, made.draws, "critic", 0.0, 1.0))
            conditions.append(condition)
        every, times = torch.cat([noisy, *(each for each, _ in others)]), torch.cat([t, *(each for _, each in others)])
        if self.discriminator == "fake":
            estimate, logits = self.network("fake")(every, times, Condition.cat(conditions))
        else:
            with torch.no_grad():
                _, features = critic.features_of(denoiser, every, times, Condition.cat(conditions))
            torch.clear_autocast_cache()
            estimate, logits = self.network("fake")(noisy, t, made.condition, features)
        of_fake, of_real, *of_nudged = logits.split(len(x))
        score, judged = errors(estimate), (F.softplus(of_fake) + F.softplus(-of_real)).mean()
        metrics = {"score_loss": score, "critic_loss": judged, "critic_right": ((of_real > 0).float() + (of_fake < 0)).mean() / 2}
        if of_nudged:
            metrics["r1"] = ((of_real - of_nudged[0]) / critic.NUDGE).square().mean()
            judged = judged + config.r1_weight * metrics["r1"]
        return Loss("fake", score + config.critic_weight * judged, metrics)

    def model(self, network: nn.Module, step: int) -> Model:
        assert isinstance(network, NetworkDenoiser)
        teacher, times = self.teacher, self.own.tolist()
        few = len(times) > 1
        sampler = Sampler.renoising(times, len(times)) if few else Sampler.one_step(self.schedule, times[0])
        lineage = student_of(teacher.lineage, "dmd2", self.teacher_hash)
        conditioner = teacher.conditioner.taught(self.config.classes)
        return replace(teacher, denoiser=network, conditioner=conditioner, lineage=lineage, sampler=sampler)

    def reference(self) -> Row:
        return self.teacher, self.sampling

    def compared(self, made: Model) -> Rows:
        return {"teacher": self.reference(), "student": (made, made.sampling)}

    def trial(self, network: nn.Module, made: Any, count: int, where: torch.device) -> Any:
        if not isinstance(network, critic.Critic):
            return super().trial(network, made, count, where)
        backbone: Any = network.denoiser.network
        with critic.tapped(backbone) as found:
            estimate = super().trial(network.denoiser, made, count, where)
        features = found[0] if self.discriminator == "fake" else torch.cat([found[0].detach()] * self.judged)
        return torch.cat([estimate.flatten(), network.head(features)])

    @property
    def judged(self) -> int:
        """Pictures that the discriminator sees for each of the student's: that one, a real one, and for R1 the real one with more noise."""
        return 3 if self.config.r1_weight else 2

    def calls(self, step: int = 0) -> Calls:
        config, size = self.config, self.config.batch_size
        if step < config.init_steps:
            return Calls([Call("student", size)])
        before = [self.step_of(step, turn) + (turn > 0) for turn in range(config.fake_steps)] if config.input == "simulation" else []
        forwards = [Call("student", size)] * (sum(before) if before else config.fake_steps - 1)
        combined = 1 if self.guidance == 1 else config.guidance_calls
        teacher = [Call("teacher", size * (1 if self.guidance == 1 else 2) // combined)] * combined
        apart = self.guided and config.guidance_times != "same"
        forwards += [*teacher * (2 if apart else 1), Call("fake", size)]
        judged, images = self.discriminator, size * (1 if self.discriminator == "none" else self.judged)
        through = [Call(judged, size)] if judged != "none" else []
        if judged == "teacher":
            forwards += [Call("teacher", images)] * config.fake_steps
        scores = Call("fake", size if judged == "teacher" else images)
        return Calls([Call("student", size), *[scores] * config.fake_steps], forwards, between=True, through=through)

    def advice(self, metrics: Mapping[str, float], done: float) -> str:
        return behind(metrics)

    def remedies(self, metrics: Mapping[str, float]) -> dict[str, str]:
        hint = "Raise fake_steps, or lower lr" + (
            "" if self.source is not None else ", or give real images for a discriminator: data=FOLDER"
        )
        strong = {"over-saturated": f"Lower guidance_scale, now {self.guidance:g}"} if self.guidance > 1 and self.guided else {}
        return dict.fromkeys(GENERAL, hint) | strong

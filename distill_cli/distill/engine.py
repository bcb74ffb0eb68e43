"""The training loop, the same for every objective.

The engine owns processes, precision, optimizers, clipping, EMA, logging, sample grids, checkpoints and resume. An
objective says which networks it trains and yields, for one step, the losses in the order in which they are stepped.
All random numbers come from global sample indices, so a run resumes from the number of its step alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill_cli.config import TrainingConfig
from distill_cli.data.pictures import save_grid
from distill_cli.diffusion.noise import Draws
from distill_cli.distill import checkpoint
from distill_cli.distill.ema import EMA
from distill_cli.errors import DistillError, Interrupted, UsageError
from distill_cli.launch import Progress, check_precision, device, rank, stoppable, world_size
from distill_cli.models.model import Model
from distill_cli.runs import Run

NEVER = 2**62
"""A step that no run reaches."""


@dataclass
class Loss:
    """A loss whose gradient steps `network`; `metrics` are scalars to log besides it."""

    network: str
    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What a method is to the engine."""

    networks: dict[str, nn.Module]
    """Trained networks; the first one's average is the result. The engine puts wrapped ones in their place."""
    frozen: list[nn.Module]
    """Networks that only answer."""
    kept: dict[str, nn.Module]
    """Networks that the objective changes itself: they go into checkpoints."""
    rates: dict[str, float]
    """Learning rate of each trained network."""
    result: str
    """Name of the result's folder in the run."""

    def turns(self, draws: Draws) -> Iterator[Loss]:
        """The losses of one step on the samples of `draws`; after each the engine steps that network, then asks on."""

    def model(self, network: nn.Module) -> Any:
        """The result made of `network` (the average, or its copy): a Model, or another thing with `save(folder)`."""

    def advice(self, metrics: dict[str, float], done: float) -> str:
        """A warning about the run's state as these averages show it at the share `done` of all steps, or ''."""


def learning_rate(config: TrainingConfig, rate: float, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant or a cosine down to lr_end of it."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "constant":
        return rate * warm
    along = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return rate * warm * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * along)))


def make_optimizer(config: TrainingConfig, network: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW, or RAdam (Liu et al. 1908.03265) with the same decoupled decay, all parameters in few calls."""
    settings: dict[str, Any] = dict(lr=rate, betas=config.betas, weight_decay=config.weight_decay)
    if config.optimizer == "radam":
        return torch.optim.RAdam(network.parameters(), **settings, decoupled_weight_decay=True, foreach=True)
    return torch.optim.AdamW(network.parameters(), **settings, fused=True)


class Engine:
    """Trains an objective in a run's folder."""

    run: Run

    def __init__(self, config: TrainingConfig, objective: Objective) -> None:
        from accelerate import Accelerator

        if world_size() > 1:
            raise UsageError("training on several processes is not supported yet", "start one process")
        self.config, self.objective = config, objective
        wanted = device(config.device)
        check_precision(wanted, config.precision)
        self.accelerator = Accelerator(mixed_precision=config.precision, cpu=wanted.type == "cpu")
        where = self.accelerator.device
        for answering in (*objective.frozen, *objective.kept.values()):
            answering.to(where)
        self.plain = {name: network.to(where) for name, network in objective.networks.items()}
        self.main = next(iter(self.plain))
        self.ema = EMA(self.plain[self.main], config.ema_halflife)
        self.optimizers: dict[str, Any] = {}
        for name, network in self.plain.items():
            optimizer = make_optimizer(config, network, objective.rates[name])
            objective.networks[name], self.optimizers[name] = self.accelerator.prepare(network, optimizer)
        self.step = 0
        self.window: dict[str, tuple[Tensor, int]] = {}
        self.bad: dict[str, Tensor] = {}
        self.saved = -1

    def draws(self, step: int) -> list[Draws]:
        """This process's samples of a step, in the parts of gradient accumulation."""
        first, size = step * self.config.batch_size, self.config.batch_size // self.config.accumulate
        parts = [range(first + k * size, first + (k + 1) * size) for k in range(self.config.accumulate)]
        return [Draws(self.config.seed, part[rank() :: world_size()]) for part in parts]

    def train_step(self) -> None:
        """One step: every turn of the objective, each over all parts of the batch."""
        torch.manual_seed(hash((self.config.seed, self.step, rank())) % 2**63)  # dropout alone uses torch's generator
        parts = self.draws(self.step)
        turns = [self.objective.turns(part) for part in parts]
        while True:
            name = ""
            for turn in turns:
                with self.accelerator.autocast():
                    loss = next(turn, None)
                if loss is None:
                    break
                name = loss.network
                self.accelerator.backward(loss.value / len(turns))
                self._record({f"{name}_loss": loss.value, **loss.metrics})
                self._watch(f"{name}_loss", loss.value)
            if not name:
                break
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.objective.rates[name], self.step)
            norm = self.accelerator.clip_grad_norm_(self.objective.networks[name].parameters(), self.config.clip_norm)
            self._record({f"{name}_grad_norm": norm})
            self._watch(f"the gradient norm of {name}", norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.ema.update(self.plain[self.main], self.step * self.config.batch_size, self.config.batch_size)

    def advance(self) -> dict[str, float]:
        """One step, and its line in metrics.jsonl where one is due: the means that it holds, else nothing."""
        self.train_step()
        if self.step % self.config.log_every and self.step != self.config.steps:
            return {}
        self._check_finite()
        return self._log()

    def _record(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            value = torch.as_tensor(value).detach().float()
            total, count = self.window.get(name, (torch.zeros_like(value), 0))
            self.window[name] = (total + value, count + 1)

    def _watch(self, name: str, loss: Tensor) -> None:
        """Keep the first step at which a loss is no number, where the loss is: asking now would make a GPU wait."""
        if self.accelerator.scaler:  # fp16: it leaves out such steps itself
            return
        never = torch.full_like(loss, NEVER, dtype=torch.int64, requires_grad=False)
        now = torch.where(loss.detach().isfinite(), never, self.step + 1)
        self.bad[name] = torch.minimum(self.bad.get(name, never), now)

    def _log(self) -> dict[str, float]:
        """Write the means since the last line."""
        means = {name: (total / count).item() for name, (total, count) in self.window.items()}
        self.window = {}
        if rank() == 0:
            numbers = {name: value if math.isfinite(value) else None for name, value in means.items()}  # fp16 looks for its scale
            self.run.log({"step": self.step, "images": self.step * self.config.batch_size, **numbers})
        return means

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if rank() == 0 and self.saved != self.step:
            scaler = self.accelerator.scaler
            state = {
                "window": {name: [total.item(), count] for name, (total, count) in self.window.items()},
                "scaler": scaler.state_dict() if scaler else None,
            }
            networks = {**self.plain, **self.objective.kept, "average": self.ema.network}
            checkpoint.save(self.run.checkpoints, self.step, networks, self.optimizers, state, self.config.keep)
        self.saved = self.step

    def open(self, run: Run) -> None:
        """Train in `run`: go on from its newest checkpoint, from the start where there is none."""
        self.run = run
        found = checkpoint.steps(run.checkpoints)
        if found:
            if found[-1] > self.config.steps:
                raise UsageError(f"--steps {self.config.steps}: the run is at step {found[-1]} already")
            networks = {**self.plain, **self.objective.kept, "average": self.ema.network}
            state = checkpoint.load(self.run.checkpoints, found[-1], networks, self.optimizers)
            self.step = self.saved = found[-1]
            where = self.accelerator.device
            self.window = {name: (torch.tensor(total, device=where), count) for name, (total, count) in state["window"].items()}
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        run.forget_after(self.step)

    def sample_grid(self) -> None:
        """Write the average's images for 40 noises that are in no store of pairs."""
        model = self.objective.model(self.ema.network)
        if rank() == 0 and isinstance(model, Model):
            images, _ = model.examples(self.config.seed, 40)
            save_grid(images, self.run.samples / f"{self.step:06d}.png")

    def train(self) -> Any:
        """Train to the last step and save the result; ^C and SIGTERM leave a run that resumes."""
        config, made = self.config, self.step < self.config.steps
        progress = Progress(config.steps, self.run.folder.name, "steps", done=self.step)
        warned = ""
        with stoppable() as stop:
            while self.step < config.steps:
                means = self.advance()
                note = ""
                last = self.step == config.steps
                if means:
                    note = " ".join(f"{name} {value:.4g}" for name, value in means.items() if name.endswith("loss"))
                    advice = self.objective.advice(means, self.step / config.steps)
                    if advice.partition(":")[0] not in ("", warned) and rank() == 0:
                        print(f"warning: step {self.step}: {advice}", file=sys.stderr)
                    warned = advice.partition(":")[0]
                progress.add(1, note)
                if config.sample_every and (self.step % config.sample_every == 0 or last):
                    self.sample_grid()
                if self.step % config.save_every == 0 or last:
                    self._check_finite()
                    self.save()
                if stop.requested and not last:
                    self._check_finite()
                    self.save()
                    raise Interrupted(f"stopped at step {self.step} of {config.steps}", f"continue with --resume {self.run.folder}")
        progress.close()
        model = self.objective.model(self.ema.network)
        place = self.run.folder / self.objective.result
        if rank() == 0 and (made or not place.exists()):  # a finished run keeps what was written into its result since
            model.save(place)
        return model

    def _check_finite(self) -> None:
        """Stop at the last good checkpoint, and never keep one with a loss or weights that are no numbers."""
        found = checkpoint.steps(self.run.checkpoints)
        good = f"the checkpoint of step {found[-1]} is good: " if found else ""
        hint = f"{good}lower lr in {self.run.recipe}, then --resume {self.run.folder}"
        first = {name: int(step.item()) for name, step in self.bad.items()}
        name = min(first, key=lambda key: first[key], default="")
        if name and first[name] != NEVER:
            raise DistillError(f"{name} is not a number at step {first[name]}", hint)
        if self.accelerator.scaler and self.accelerator.scaler.get_scale() < 1:
            raise DistillError(f"no finite gradient in fp16 for many steps up to {self.step}", "use --precision bf16")
        for name, network in self.plain.items():
            if not torch.stack([torch.isfinite(p).all() for p in network.parameters()]).all():
                raise DistillError(f"the weights of {name} are not numbers at step {self.step}", hint)

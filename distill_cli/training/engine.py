"""The training loop, the same for every objective.

The engine owns processes, precision, optimizers, clipping, EMA, logging, sample grids, checkpoints and resume. An
objective says which networks it trains and yields, for one step, the losses in the order in which they are stepped.
All random numbers come from global sample indices, so a run resumes from the number of its step alone.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import accumulate, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.config import TrainingConfig, seconds
from distill_cli.data.images import Folder
from distill_cli.data.listing import noting
from distill_cli.data.pictures import save_grid
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import UsageError
from distill_cli.launch import (
    PATIENCE,
    Progress,
    arithmetic,
    autocast,
    check_precision,
    device,
    naming_the_undetermined,
    plain_links,
    repeatable,
    spared,
    stoppable,
    whole,
)
from distill_cli.models.compiled import uncompile
from distill_cli.models.model import Model
from distill_cli.processes import rank, world_size
from distill_cli.recipes import dump
from distill_cli.runs import Run
from distill_cli.training import checkpoint, identity, zero
from distill_cli.training.ema import EMA, hand_on
from distill_cli.training.fitting import check_even
from distill_cli.training.health import Health
from distill_cli.training.objective import Loss, Objective, phase_at, span_at
from distill_cli.training.optimizer import learning_rate, make_optimizer
from distill_cli.training.pictures import Pictures
from distill_cli.training.placed import place
from distill_cli.training.rehearsal import check_space, rehearse, save


class Engine:
    """Trains an objective in a run's folder."""

    run: Run

    def __init__(self, config: TrainingConfig, objective: Objective) -> None:
        self.config, self.objective = config, objective
        self.recipe = dump(config.model_copy(update={"out": None}))
        wanted = device(config.device)
        check_precision(wanted, config.precision)
        repeatable(wanted, config.deterministic)
        self.part = config.batch_size // config.accumulate
        """Images in a part of a batch, over all processes."""
        check_even(config, world_size())
        plain_links(wanted)
        spread = zero.plugin(config, [each.module for each in objective.trained.values()], wanted)
        if spread is not None and any(phase.anew for phase in objective.phases):
            raise UsageError("DeepSpeed: not with a method of several phases", "accelerate's FSDP (fsdp_version 2) shards each network")
        self.accelerator = zero.accelerator(config, spread, wanted)
        where = self.accelerator.device
        self.modules = {name: each.module for name, each in objective.trained.items()}
        self.placed = place(config, objective, self.accelerator)
        self.plain = {name: each.state() for name, each in objective.trained.items()}
        self.main = next(iter(self.plain))
        self.pictures = Pictures(objective, where)
        self.ema = EMA(self.plain[self.main], config.ema_halflife, config.ema_device)
        self.optimizers: dict[str, Any] = {}
        self.zero: zero.Zero | None = None
        for name, each in objective.trained.items():
            optimizer = make_optimizer(config, each.parameters(), each.rate)
            if spread is not None:
                self.optimizers[name] = self.zero = zero.Zero(self.accelerator, spread, each.module, optimizer)
                each.module = self.zero.engine
            else:
                each.module, self.optimizers[name] = self.accelerator.prepare(each.module, optimizer)
        self.step, self.chosen, self.steps = 0, 0, sum(phase.steps for phase in objective.phases)
        self.borders = set(accumulate(phase.steps for phase in objective.phases))
        self.ready = False
        self.window: dict[str, tuple[Tensor, int]] = {}
        self.health = Health()
        self.health.skipped = {name: torch.zeros(2, dtype=torch.int64, device=where) for name in self.plain}
        self.saved = -1
        self.since: tuple[Tensor, int] = (torch.zeros((), device=where), 0)
        self.started = time.monotonic()
        several = world_size() > 1
        self.talk: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if several else None  # gloo: no GPU waits for it

    def draws(self, step: int) -> list[Draws]:
        """This process's samples of a step, in the parts of gradient accumulation."""
        size = self.config.batch_size
        parts = [range(first, first + self.part) for first in range(step * size, (step + 1) * size, self.part)]
        return [Draws(self.config.seed, part[rank() :: world_size()]) for part in parts]

    def train_step(self) -> None:
        """One step: all turns of the objective, each over all parts of the batch."""
        if not self.ready:
            self.objective.prepare(self.accelerator.device, self.run)
            self.ready = True
            if self.step == 0 and self.pictures.due(0):
                self._look()
        if self.step in self.borders and self.objective.phases[phase_at(self.objective.phases, self.step)].anew:
            self._begin_anew()
        self.objective.before(self.step)
        torch.manual_seed(hash((self.config.seed, self.step, rank())) % 2**63)  # only dropout uses torch's generator
        parts = self.draws(self.step)
        following = [(self.step, part) for part in parts[1:]]
        following += [(self.step + 1, parts[0].later(self.config.batch_size))] if self.step + 1 < self.steps else []
        turns = [self.objective.part(self.step, *both) for both in zip_longest(parts, following)]
        with naming_the_undetermined():
            while name := self._turn(turns):
                self._update(name)
        self.objective.after(self.step)
        first, _ = span_at(self.objective.phases, self.step)
        self.step += 1
        self.ema.update(self.plain[self.main], (self.step - first) * self.config.batch_size, self.config.batch_size)

    def _begin_anew(self) -> None:
        """Begin a phase anew: the main network takes the average's weights, and all moments are forgotten."""
        hand_on(self.ema.network, self.plain[self.main])
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        self.health.running.clear()

    def _turn(self, turns: list[Iterator[Loss]]) -> str:
        """Compute the gradients of the next turn, and return the name of its network; '' after the last turn."""
        seen: list[dict[str, Tensor]] = []
        kept = torch.autocast(self.accelerator.device.type, enabled=False)  # autocast keeps its casts of weights until the outermost ends
        with kept if len(turns) > 1 else nullcontext():
            for k, turn in enumerate(turns):
                with ExitStack() as apart:
                    last = k + 1 == len(turns)
                    if not last and self.zero is None:  # processes exchange gradients once, with the last part's
                        for each in self.objective.trained.values():
                            apart.enter_context(self.accelerator.no_sync(each.module))
                    with autocast(self.accelerator.device, self.config.precision):
                        loss = next(turn, None)
                    if loss is None:
                        return ""
                    if self.zero is not None:
                        self.zero.backward(loss.value / len(turns), last)
                    else:
                        self.accelerator.backward(loss.value / len(turns))
                name = loss.network
                seen.append({f"{name}_loss": loss.value, **loss.metrics})
        self.turn = self._mean(seen)
        return name

    def _mean(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Means of scalars over the parts of a batch and all processes."""
        values = torch.stack([torch.stack([part[name].detach().float() for name in parts[0]]) for part in parts]).mean(0)
        if world_size() > 1:
            values = self.accelerator.reduce(values, "mean")
        return dict(zip(parts[0], values, strict=True))

    def _update(self, name: str) -> None:
        """Step a network's optimizer, and record its loss."""
        optimizer, scaler, trained = self.optimizers[name], self.accelerator.scaler, self.objective.trained[name]
        first, steps = span_at(self.objective.phases, self.step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, trained.rate, self.step - first, steps)
        if self.zero is not None:
            norm = self.zero.step()
        else:
            self.accelerator.unscale_gradients()  # its own clipping compares networks by their tensors, which FSDP's do not allow
            norm = whole(nn.utils.clip_grad_norm_(list(trained.parameters()), self.config.clip_norm))
        loss = self.turn[f"{name}_loss"]
        skips = self.config.on_nan == "skip" and not scaler
        if skips or scaler:  # a scaler skips such steps itself
            self.health.skip(name, ~(loss.isfinite() & norm.isfinite()))
        if skips and self.health.skipped[name][0]:
            self._check_skipped(self.step + 1)
        else:
            for key, value in {**self.turn, f"{name}_grad_norm": norm.detach().float()}.items():
                total, count = self.window.get(key, (torch.zeros_like(value), 0))
                self.window[key] = (total + value, count + 1)
            self.health.count(f"{name}_loss", loss)
            if name == self.main:
                self.since = (self.since[0] + loss, self.since[1] + 1)
            if not scaler:
                self.health.watch(f"{name}_loss", loss, self.step + 1)
                self.health.watch(f"the gradient norm of {name}", norm, self.step + 1)
            if self.zero is None:
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def advance(self) -> dict[str, float]:
        """One step. Returns the means of the line that it wrote to metrics.jsonl; {} if no line was due."""
        self.train_step()
        looks = self.pictures.due(self.step)
        if self.step % self.config.log_every and self.step not in self.borders and not looks:
            return {}
        self._check_finite()
        if looks:
            self._look()
        return self._log()

    def _log(self) -> dict[str, float]:
        """Write the means since the last line, and the look of this step, to metrics.jsonl. Returns the means."""
        means = {name: (total / count).item() for name, (total, count) in self.window.items()}
        self.window = {}
        counts = {"spikes": int(self.health.spikes.item())}
        if self.config.on_nan == "skip" or self.accelerator.scaler:
            counts["skipped"] = sum(int(count) for _, count in self.health.skipped.values())
        if rank() == 0:
            numbers = {name: value if math.isfinite(value) else None for name, value in means.items()}  # fp16 looks for its scale
            numbers |= self.pictures.numbers(self.step)
            warnings = self.pictures.warn(means, self.step, self.steps)
            self.run.log({"step": self.step, "images": self.step * self.config.batch_size, **numbers, **counts, **warnings})
            self.run.log_speed(self.step, self.config.batch_size)
            if self.config.tracker != "none":
                finite = {name: value for name, value in numbers.items() if value is not None} | counts
                spared(self.config.tracker, self.accelerator.log, finite, step=self.step)
        return means

    def _kept(self) -> dict[str, nn.Module]:
        """The networks of a checkpoint."""
        average = {"average": self.ema.network} if self.ema.network is not None else {}
        return {**self.plain, **self.objective.kept, **average}

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.saved != self.step:
            self.run.sync_metrics()
            scaler = self.accelerator.scaler
            state = {
                "window": {name: [total.item(), count] for name, (total, count) in self.window.items()},
                "health": self.health.state_dict(),
                "skipped": {name: counts.tolist() for name, counts in self.health.skipped.items()},
                "scaler": scaler.state_dict() if scaler else None,
                "begun": self.begun,
                "looks": self.pictures.history,
                "score": self.pictures.score(self.step, (self.since[0] / self.since[1]).item() if self.since[1] else None),
            }
            keep = (self.config.keep, self.config.keep_best, span_at(self.objective.phases, self.step - 1)[0])
            checkpoint.save(self.run.checkpoints, self.step, self._kept(), self.optimizers, state, *keep)
        self.saved, self.since, self.started = self.step, (torch.zeros_like(self.since[0]), 0), time.monotonic()

    def open(self, run: Run) -> None:
        """Train in `run`: go on from process 0's newest checkpoint, from the start where there is none."""
        self.run, self.begun = run, identity.begun(self.config, self.objective)
        identity.refuse(self.config, self.begun, identity.read(run.folder))
        newest = identity.newest(run.checkpoints, self.talk)
        if newest is None and rank() == 0 and run.metrics.is_file() and run.metrics.stat().st_size:
            print(f"{run.folder}: no checkpoint: begins at step 0", file=sys.stderr)
        if newest is not None:
            if newest > self.steps:
                raise UsageError(f"--steps {self.steps}: the run is at step {newest} already")
            check = partial(identity.refuse, self.config, self.begun)
            state = identity.take_up(run.checkpoints, newest, self._kept(), self.optimizers, check, self.talk)
            self.step = self.saved = newest
            where = self.accelerator.device
            self.window = {name: (torch.tensor(total, device=where), count) for name, (total, count) in state["window"].items()}
            self.health.load_state_dict(state["health"], where)
            self.pictures.history = state.get("looks", [])
            self.health.skipped = {name: torch.tensor(counts, device=where) for name, counts in state["skipped"].items()}
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.talk is not None:
            optimizers = self.optimizers if self.zero is None else {}
            networks = {**self.plain, **self.objective.kept}
            identity.check_same(identity.shared(self.begun, self.objective.images, networks, optimizers), self.talk)
        if rank() == 0:
            identity.write(run.folder, self.begun)
            run.note(arithmetic(self.config.precision) | self.placed, self.accelerator.device)
            checkpoint.prune(run.checkpoints, self.config.keep, self.config.keep_best, span_at(self.objective.phases, self.step - 1)[0])
            run.forget_after(self.step)
            if self.config.tracker != "none":
                settings = {key: str(value) for key, value in self.config.model_dump(mode="json").items()}
                os.environ.setdefault("WANDB_MODE", "offline")  # nothing leaves the machine by default
                spared(self.config.tracker, self.accelerator.init_trackers, "distill", settings)

    def sample_grid(self) -> None:
        """Write a grid of the average's images, from noise that is in no store of pairs."""
        with self.ema.at(self.accelerator.device) as network:
            model = None if network is None else self._model(network)
            if isinstance(model, Model) and model.codec.kind.drawn:
                images, _ = model.examples(self.config.seed, model.shown)
                save_grid(images, self.run.samples / f"{self.step:06d}.png", scale=model.enlarged)

    def _look(self) -> None:
        """Measure the average's pictures."""
        with self.ema.at(self.accelerator.device) as network:
            if network is not None:
                self.pictures.look(self._model(network), self.step, self.run.folder)

    def _agreed(self, number: int, due: bool) -> tuple[int, bool]:
        """The signal that any process got, and whether process 0's clock says to save: agreed by all processes after the same step."""
        asked = torch.tensor([number, due])
        if self.talk is not None:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self.talk)
        return int(asked[0]), bool(asked[1])

    def _model(self, state: nn.Module) -> Any:
        """The result made of `state`, weights of the main network."""
        return self.objective.model(self.objective.trained[self.main].merged(state), self.step)

    def train(self) -> Any:
        """Train to the last step, save the result and return it (None except on process 0). After a signal the run can be resumed."""
        images = self.objective.images
        with noting(self.run.folder, images.root, images.files) if isinstance(images, Folder) else nullcontext():
            return self._train()

    def _train(self) -> Any:
        config, made = self.config, self.step < self.steps
        progress = Progress(self.steps, self.run.folder.name, "steps", done=self.step)
        if made and rank() == 0:
            check_space(self.run.folder, self._kept().values(), self.plain.values())
        if self.step == 0 and self.ema.network is not None:
            rehearse(self._model, self.ema.network, self.recipe, self.run.folder / self.objective.phases[0].result)
        if made and self.step in self.borders:
            self._result(made=False)
        every = seconds(config.save_every)
        with stoppable() as stop:
            while self.step < self.steps:
                means = self.advance()
                ends, last = self.step in self.borders, self.step == self.steps
                progress.add(1, " ".join(f"{name} {value:.4g}" for name, value in means.items() if name.endswith("loss")))
                if config.sample_every and (self.step % config.sample_every == 0 or ends):
                    self.sample_grid()
                late = every is not None and rank() == 0 and time.monotonic() - self.started >= every
                stopped, due = self._agreed(stop.requested, late)
                if due or ends or stopped or (isinstance(config.save_every, int) and self.step % config.save_every == 0):
                    self._check_finite()
                    self.save()
                if ends and not last:
                    self._result(made=True)
                if stopped and not last:
                    self._agreed(0, False)  # wait until process 0 has written the checkpoint
                    said = f"stopped at step {self.step} of {self.steps}"
                    raise stop.interrupted(stopped, said, f"resume with --resume {self.run.folder}")
        progress.close()
        if config.tracker != "none":
            spared(self.config.tracker, self.accelerator.end_training)
        return self._result(made)

    def _result(self, made: bool) -> Any:
        """Save and return the average at the end of a phase, once its checkpoint is written (None except on process 0).

        A result that was not `made` just now is kept, with whatever was written into its folder since.
        """
        if self.ema.network is None:
            return None
        if self.step == self.steps:
            self.chosen = self.pictures.choose(self.run.checkpoints, self.step, self.ema.network)
        place = self.run.folder / self.objective.phases[phase_at(self.objective.phases, self.step - 1)].result
        model = self._model(self.ema.network)
        newest = checkpoint.path_of(self.run.checkpoints, self.step)
        older = place.exists() and newest.exists() and place.stat().st_mtime < newest.stat().st_mtime  # killed between the two
        if isinstance(model, Model):
            model.recipe = self.recipe
        if made or older or not place.exists():
            save(model, place)
        return model

    def release(self) -> None:
        """Free the memory of training before the result is sampled."""
        average, self.optimizers, self.zero, self.ema.network = self.ema.network, {}, None, None
        self.accelerator.free_memory()
        if average is not None:
            average.to(self.accelerator.device)  # the result, which is sampled next
        for name, each in self.objective.trained.items():
            each.module = self.modules[name]
            each.module.zero_grad(set_to_none=True)
        for network in (*self.objective.frozen.values(), *self.modules.values()):
            uncompile(network)  # what is compared has other numbers of images
        for network in (*self.objective.kept.values(), *(network for name, network in self.modules.items() if name != self.main)):
            network.to("cpu")

    def _hint(self) -> str:
        found = checkpoint.steps(self.run.checkpoints)
        good = f"the checkpoint of step {found[-1]} is good: " if found else ""
        return f"{good}lower lr in {self.run.recipe}, then --resume {self.run.folder}"

    def _check_skipped(self, step: int) -> None:
        """Stop the run if too many updates up to `step` were skipped in a row."""
        if self.config.on_nan == "skip" or self.accelerator.scaler:  # else nothing is skipped, and reading would wait for the device
            self.health.check_skipped(step, "use --precision bf16" if self.accelerator.scaler else self._hint())

    def _check_finite(self) -> None:
        """Stop the run if a loss or a weight is not finite, or too many updates were skipped."""
        self.health.check(self.step, self.plain, self._hint())
        self._check_skipped(self.step)

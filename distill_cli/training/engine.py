"""The training loop, the same for every objective.

The engine owns processes, precision, optimizers, clipping, EMA, logging, sample grids, checkpoints and resume. An
objective says which networks it trains and yields, for one step, the losses in the order in which they are stepped.
All random numbers come from global sample indices, so a run resumes from the number of its step alone.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.config import TrainingConfig, seconds
from distill_cli.data.listing import noting
from distill_cli.data.pictures import save_grid
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.launch import PATIENCE, Progress, autocast, check_precision, device, plain_links, spared, stoppable, whole
from distill_cli.models.model import Model
from distill_cli.processes import rank, world_size
from distill_cli.recipes import dump
from distill_cli.runs import Run
from distill_cli.training import checkpoint, identity, zero
from distill_cli.training.ema import EMA
from distill_cli.training.health import Health
from distill_cli.training.objective import Loss, Objective
from distill_cli.training.optimizer import learning_rate, make_optimizer
from distill_cli.training.rehearsal import check_space, rehearse, save

SKIPPED_AT_MOST = 50
"""Steps in a row without a finite gradient, after which leaving them out is no help."""


def tracker_of(config: TrainingConfig) -> str | None:
    """The tracker that is wanted beside metrics.jsonl; raises UsageError where its package is not installed."""
    if config.tracker == "none":
        return None
    if importlib.util.find_spec(config.tracker) is None:
        raise UsageError(
            f"tracker: {config.tracker} is not installed", f"pip install {config.tracker}; metrics.jsonl is written without it too"
        )
    return config.tracker


def honour_fsdp(accelerator: Any) -> None:
    """Have accelerate's FSDP wanted by its configuration work on the CPU too, where it leaves it out although torch can."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UsageError("FSDP of version 1 is not supported", "fsdp_version: 2 in accelerate's configuration, or FSDP_VERSION=2")


class Engine:
    """Trains an objective in a run's folder."""

    run: Run

    def __init__(self, config: TrainingConfig, objective: Objective) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

        self.config, self.objective = config, objective
        wanted = device(config.device)
        check_precision(wanted, config.precision)
        self.part = config.batch_size // config.accumulate
        if self.part % world_size():
            parts = f"in {config.accumulate} parts " if config.accumulate > 1 else ""
            raise UsageError(f"--batch-size {config.batch_size}: {parts}cannot be shared evenly by {world_size()} processes")
        plain_links(wanted)
        spread = zero.plugin(config, objective.networks, wanted)
        self.accelerator = Accelerator(
            mixed_precision=config.precision if spread is None else "no",
            deepspeed_plugin=spread,
            cpu=wanted.type == "cpu",
            log_with=tracker_of(config),
            project_dir=config.out,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True), InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        honour_fsdp(self.accelerator)
        where = self.accelerator.device
        for answering in (*objective.frozen, *objective.kept.values()):
            answering.to(where)
        self.plain = {name: network.to(where) for name, network in objective.networks.items()}
        self.main = next(iter(self.plain))
        self.ema = EMA(self.plain[self.main], config.ema_halflife)
        self.optimizers: dict[str, Any] = {}
        self.zero: zero.Zero | None = None
        for name, network in self.plain.items():
            optimizer = make_optimizer(config, network, objective.rates[name])
            if spread is not None:
                self.optimizers[name] = self.zero = zero.Zero(self.accelerator, spread, network, optimizer)
                objective.networks[name] = self.zero.engine
            else:
                objective.networks[name], self.optimizers[name] = self.accelerator.prepare(network, optimizer)
        self.step = 0
        self.window: dict[str, tuple[Tensor, int]] = {}
        self.health = Health()
        self.skipped = {name: torch.zeros(2, dtype=torch.int64, device=where) for name in self.plain}
        """Updates of each network that were left out: in a row until now, and in all."""
        self.saved = -1
        self.since: tuple[Tensor, int] = (torch.zeros((), device=where), 0)
        self.started = time.monotonic()
        self.talk: Any = None  # a group apart, for which no GPU waits
        if world_size() > 1:
            self.talk = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def draws(self, step: int) -> list[Draws]:
        """This process's samples of a step, in the parts of gradient accumulation."""
        first = step * self.config.batch_size
        parts = [range(first + k * self.part, first + (k + 1) * self.part) for k in range(self.config.accumulate)]
        return [Draws(self.config.seed, part[rank() :: world_size()]) for part in parts]

    def train_step(self) -> None:
        """One step: every turn of the objective, each over all parts of the batch."""
        torch.manual_seed(hash((self.config.seed, self.step, rank())) % 2**63)  # dropout alone uses torch's generator
        turns = [self.objective.turns(part) for part in self.draws(self.step)]
        while name := self._turn(turns):
            self._update(name)
        self.step += 1
        self.ema.update(self.plain[self.main], self.step * self.config.batch_size, self.config.batch_size)

    def _turn(self, turns: list[Iterator[Loss]]) -> str:
        """The gradients of the next turn; returns the network that they are for, '' after the last turn."""
        seen: list[dict[str, Tensor]] = []
        name = ""
        for k, turn in enumerate(turns):
            with ExitStack() as apart:
                last = k + 1 == len(turns)
                if not last and self.zero is None:  # processes exchange gradients once, with the last part's
                    for network in self.objective.networks.values():
                        apart.enter_context(self.accelerator.no_sync(network))
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
        """The means of scalars over the parts of a batch and over all processes."""
        values = torch.stack([torch.stack([part[name].detach().float() for name in parts[0]]) for part in parts]).mean(0)
        if world_size() > 1:
            values = self.accelerator.reduce(values, "mean")
        return dict(zip(parts[0], values, strict=True))

    def _update(self, name: str) -> None:
        """Step a network, and take note of its loss."""
        optimizer, scaler = self.optimizers[name], self.accelerator.scaler
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.objective.rates[name], self.step)
        if self.zero is not None:
            norm = self.zero.step()
        else:
            clipped = self.accelerator.clip_grad_norm_(self.objective.networks[name].parameters(), self.config.clip_norm)
            norm = whole(torch.as_tensor(clipped))
        loss = self.turn[f"{name}_loss"]
        skips = self.config.on_nan == "skip" and not scaler
        if skips or scaler:  # which leaves out such steps itself
            bad = (~(loss.isfinite() & norm.isfinite())).to(self.skipped[name])
            row, total = self.skipped[name]
            self.skipped[name] = torch.stack([(row + bad) * bad, total + bad])
        if skips and self.skipped[name][0]:
            self._check_skipped(self.step + 1)
        else:
            self._record({**self.turn, f"{name}_grad_norm": norm})
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

    def _log(self) -> dict[str, float]:
        """Write the means since the last line, which are those of all processes, and, apart, how fast it went."""
        means = {name: (total / count).item() for name, (total, count) in self.window.items()}
        self.window = {}
        counts = {"spikes": int(self.health.spikes.item())}
        if self.config.on_nan == "skip" or self.accelerator.scaler:
            counts["skipped"] = sum(int(count) for _, count in self.skipped.values())
        if rank() == 0:
            numbers = {name: value if math.isfinite(value) else None for name, value in means.items()}  # fp16 looks for its scale
            self.run.log({"step": self.step, "images": self.step * self.config.batch_size, **numbers, **counts})
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
                "skipped": {name: counts.tolist() for name, counts in self.skipped.items()},
                "scaler": scaler.state_dict() if scaler else None,
                "begun": self.begun,
                "score": (self.since[0] / self.since[1]).item() if self.since[1] else None,
            }
            best = self.config.keep_best
            checkpoint.save(self.run.checkpoints, self.step, self._kept(), self.optimizers, state, self.config.keep, best)
        self.saved, self.since, self.started = self.step, (torch.zeros_like(self.since[0]), 0), time.monotonic()

    def open(self, run: Run) -> None:
        """Train in `run`: go on from process 0's newest checkpoint, from the start where there is none."""
        self.run, self.begun = run, identity.begun(self.config, self.objective)
        identity.refuse(self.config, self.begun, identity.read(run.folder))
        newest = identity.newest(run.checkpoints, self.talk)
        if newest is None and rank() == 0 and run.metrics.is_file() and run.metrics.stat().st_size:
            print(f"{run.folder}: no checkpoint: begins at step 0", file=sys.stderr)
        if newest is not None:
            if newest > self.config.steps:
                raise UsageError(f"--steps {self.config.steps}: the run is at step {newest} already")
            check = partial(identity.refuse, self.config, self.begun)
            state = identity.take_up(run.checkpoints, newest, self._kept(), self.optimizers, check, self.talk)
            self.step = self.saved = newest
            where = self.accelerator.device
            self.window = {name: (torch.tensor(total, device=where), count) for name, (total, count) in state["window"].items()}
            self.health.load_state_dict(state["health"], where)
            self.skipped = {name: torch.tensor(counts, device=where) for name, counts in state["skipped"].items()}
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.talk is not None:
            optimizers = self.optimizers if self.zero is None else {}
            networks = {**self.plain, **self.objective.kept}
            identity.check_same(identity.shared(self.begun, self.objective, networks, optimizers), self.talk)
        if rank() == 0:
            identity.write(run.folder, self.begun)
            checkpoint.prune(run.checkpoints, self.config.keep, self.config.keep_best)
            run.forget_after(self.step)
            if self.config.tracker != "none":
                settings = {key: str(value) for key, value in self.config.model_dump(mode="json").items()}
                os.environ.setdefault("WANDB_MODE", "offline")  # nothing leaves the machine unasked
                spared(self.config.tracker, self.accelerator.init_trackers, "distill", settings)

    def sample_grid(self) -> None:
        """Write the average's images for some noises that are in no store of pairs."""
        if self.ema.network is None:
            return
        model = self.objective.model(self.ema.network)
        if isinstance(model, Model):
            images, _ = model.examples(self.config.seed, model.shown)
            save_grid(images, self.run.samples / f"{self.step:06d}.png", scale=model.enlarged)

    def _agreed(self, number: int, due: bool) -> tuple[int, bool]:
        """The signal that came to any process, and whether process 0's clock says to save: the same to all after the same step."""
        if self.talk is not None:
            asked = torch.tensor([number, due])
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self.talk)
            number, due = int(asked[0]), bool(asked[1])
        return number, due

    def train(self) -> Any:
        """Train to the last step, save the result and return it (on process 0 alone); a signal leaves a run that resumes."""
        images = getattr(self.objective, "images", None)
        with noting(self.run.folder, getattr(images, "root", None), getattr(images, "files", ())):
            return self._train()

    def _train(self) -> Any:
        config, made = self.config, self.step < self.config.steps
        progress = Progress(config.steps, self.run.folder.name, "steps", done=self.step)
        warned, place = "", self.run.folder / self.objective.result
        recipe = dump(config.model_copy(update={"out": None}))
        if made and rank() == 0:
            check_space(self.run.folder, self._kept().values(), self.plain.values())
        if self.step == 0 and self.ema.network is not None:
            rehearse(self.objective.model, self.ema.network, recipe, place)
        every = seconds(config.save_every)
        with stoppable() as stop:
            while self.step < config.steps:
                means = self.advance()
                last = self.step == config.steps
                note = ""
                if means:
                    note = " ".join(f"{name} {value:.4g}" for name, value in means.items() if name.endswith("loss"))
                    advice = self.objective.advice(means, self.step / config.steps)
                    if advice.partition(":")[0] not in ("", warned) and rank() == 0:
                        print(f"warning: step {self.step}: {advice}", file=sys.stderr)
                    warned = advice.partition(":")[0]
                progress.add(1, note)
                if config.sample_every and (self.step % config.sample_every == 0 or last):
                    self.sample_grid()
                late = every is not None and rank() == 0 and time.monotonic() - self.started >= every
                stopped, due = self._agreed(stop.requested, late)
                if due or last or stopped or (isinstance(config.save_every, int) and self.step % config.save_every == 0):
                    self._check_finite()
                    self.save()
                if stopped and not last:
                    self._agreed(0, False)  # process 0 has written it
                    raise stop.interrupted(
                        stopped, f"stopped at step {self.step} of {config.steps}", f"resume with --resume {self.run.folder}"
                    )
        progress.close()
        if config.tracker != "none":
            spared(self.config.tracker, self.accelerator.end_training)
        if self.ema.network is None:
            return None
        model = self.objective.model(self.ema.network)
        newest = checkpoint.path_of(self.run.checkpoints, self.step)
        older = place.exists() and newest.exists() and place.stat().st_mtime < newest.stat().st_mtime  # killed between the two
        if isinstance(model, Model):
            model.recipe = recipe
        if made or older or not place.exists():  # else a finished run keeps what was written into its result since
            save(model, place)
        return model

    def release(self) -> None:
        """Give back the memory of training, before the result is looked at."""
        self.optimizers, self.zero, self.ema.network = {}, None, None
        self.objective.networks.update(self.plain)
        self.accelerator.free_memory()
        for network in self.objective.kept.values():
            network.to("cpu")
        for name, network in self.plain.items():
            network.zero_grad(set_to_none=True)
            if name != self.main:
                network.to("cpu")

    def _hint(self) -> str:
        found = checkpoint.steps(self.run.checkpoints)
        good = f"the checkpoint of step {found[-1]} is good: " if found else ""
        return f"{good}lower lr in {self.run.recipe}, then --resume {self.run.folder}"

    def _check_skipped(self, step: int) -> None:
        """Stop where too many updates up to `step` were left out in a row."""
        if self.config.on_nan != "skip" and not self.accelerator.scaler:  # nothing is left out, and asking would wait for the device
            return
        for name, (row, _) in self.skipped.items():
            if row >= SKIPPED_AT_MOST:
                hint = "use --precision bf16" if self.accelerator.scaler else self._hint()
                raise DistillError(f"{int(row)} steps in a row up to {step} had no finite gradient of {name}", hint)

    def _check_finite(self) -> None:
        """Stop at the last good checkpoint, and never keep one with a loss or weights that are no numbers."""
        bad = self.health.first_bad()
        if bad:
            raise DistillError(f"{bad[0]} is not a number at step {bad[1]}", self._hint())
        self._check_skipped(self.step)
        for name, network in self.plain.items():
            if not torch.stack([whole(torch.isfinite(p).all()) for p in network.parameters()]).all():
                raise DistillError(f"the weights of {name} are not numbers at step {self.step}", self._hint())

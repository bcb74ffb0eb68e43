"""One method trained on one family through the command line, in this process, with the smallest settings that its config knows."""

from __future__ import annotations

import io
import json
import os
import signal
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.contracts.families import FAMILIES, Made
from tests.contracts.methods import Method, listed

METHODS = listed()
STEPS = 5
LOOKED = 3
"""The step after which runs are compared inside: a method whose networks begin alike learns nothing from their difference in the first."""
SETTINGS = dict(
    steps=STEPS, batch_size=4, seed=3, device="cpu", lr=1e-3, optimizer="radam", log_every=2, save_every=2, sample_every=0,
    keep=3, ema_halflife=20, warmup_steps=2, dropout=0.1, width=8, student_steps=2, fake_steps=2,
    network=dict(channels=[8, 16], attention=[False, True], groups=4, head=8, latent_channels=4, dropout=0.1),
)  # fmt: skip
"""Values of config keys: a method gets those that its config has. RAdam's first steps are linear in the gradients, so that weights
can be compared to rounding, where Adam's take the signs of gradients that vanish."""
STILL = {"dropout": 0.0, "network.dropout": 0.0}
"""Without dropout."""
UNLIKE = ("env.json", "speed.jsonl", "verified-0.json")
"""Files that tell when and where a run was."""


def options(method: Method, family: str) -> dict[str, Any]:
    """What a method is given for a family: keys that its config has, nested ones with dots; Made values are not made yet."""
    own = FAMILIES[family].options
    asked = {**SETTINGS, **own, "pairs": Made(f"pairs-{family}", None) if FAMILIES[family].pairs is not None else None}
    found: dict[str, Any] = dict(method.chosen)
    for key in sorted(method.fields & asked.keys()):
        value = asked[key]
        if isinstance(value, dict):
            kind: Any = method.config.model_fields[key].annotation  # dmd's text is one word
            found |= {f"{key}.{name}": each for name, each in value.items() if name in getattr(kind, "model_fields", ())}
        elif value is not None:
            found[key] = value
    drop = {"prompts"} if "pairs" in found else set()  # whose prompts they are
    for part in ("network.", "text."):  # of what is trained from nothing
        if "teacher" in found or (part == "text." and "vae" not in found):
            drop |= {key for key in found if key.startswith(part)}
    return {key: value for key, value in found.items() if key not in drop}


def pairs() -> list[tuple[str, str]]:
    """Every method with every family, but those that would be given the same options as with an earlier family."""
    out, seen = [], []
    for name, method in METHODS.items():
        for family in FAMILIES:
            given = (name, options(method, family))
            if given not in seen:
                seen.append(given)
                out.append((name, family))
    return out


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def check(self) -> Ended:
        assert self.code == 0, self.err
        return self

    def refused(self) -> bool:
        """Whether it ended with one line of error, at most a hint after it, and the exit code of what a user can mend."""
        lines = self.err.splitlines()
        errors = [k for k, line in enumerate(lines) if line.startswith("error: ")]
        after = lines[errors[0] + 1 :] if errors else []
        return self.code in (1, 2) and len(errors) == 1 and len(after) <= 1 and all(line.startswith("hint: ") for line in after)


@dataclass
class Seen:
    """What a run was seen to do from inside."""

    stop_after: int = 0
    steps: int = 0
    result: Any = None
    parameters: dict[str, int] = field(default_factory=dict)
    forwards: list[Counter] = field(default_factory=list)
    """Of each step: images that went through each network, by ("name", whether with a gradient)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Those of step LOOKED."""
    results: dict[str, int] = field(default_factory=dict)
    """Folders of the results in the run, and the step at which each is made."""
    main: str = ""
    """The network whose average is the result."""
    start: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Weights before the first step."""
    moved: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Weights after step LOOKED."""


@contextmanager
def watched(seen: Seen, again: bool = False):
    """Look at the engine while it trains; after `seen.stop_after` steps a SIGTERM comes.

    Pictures to look at are few, and so are the captioned ones. What is trained `again` is not saved and read before the first step.
    """
    import torch
    from accelerate.state import AcceleratorState

    from distill_cli.training import engine as engine_module
    from tests.looking import few_shapes, little

    Engine = engine_module.Engine
    step, train = Engine.train_step, Engine.train

    def weights(networks: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {name: {key: value.clone() for key, value in network.state_dict().items()} for name, network in networks.items()}

    def begin(engine: Any) -> None:
        objective = engine.objective
        prepare, networks = objective.prepare, {**objective.frozen, **objective.kept, **engine.plain}
        own = {name: [p for key, p in network.named_parameters() if ".lora_A.lora" not in key and ".lora_B.lora" not in key]
               for name, network in networks.items()}  # fmt: skip
        seen.parameters = {name: sum(p.numel() for p in each) for name, each in own.items()}
        seen.main, seen.start = engine.main, weights(engine.plain)

        def prepared(*arguments: Any) -> None:
            prepare(*arguments)
            seen.forwards[-1].clear()  # no part of a step

        objective.prepare = prepared

    def train_step(engine: Any) -> None:
        if not seen.steps:
            begin(engine)
        objective = engine.objective
        names = {id(network): name for name, network in {**objective.frozen, **objective.kept, **engine.plain}.items()}
        seen.forwards.append(Counter())

        def count(module: Any, arguments: Any) -> None:
            if id(module) in names:
                seen.forwards[-1][names[id(module)], torch.is_grad_enabled()] += len(arguments[0])

        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        try:
            step(engine)
        finally:
            hook.remove()
        seen.steps += 1
        if seen.steps == LOOKED:
            seen.metrics = {name: float(total / count) for name, (total, count) in engine.window.items()}
            seen.moved = weights(engine.plain)
        if seen.steps == seen.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def whole(engine: Any) -> Any:
        phases = engine.objective.phases
        seen.results = dict(zip([phase.result for phase in phases], accumulate(phase.steps for phase in phases), strict=True))
        seen.result = train(engine)
        return seen.result

    with ExitStack() as stack:
        stack.enter_context(patch.object(Engine, "train_step", train_step))
        stack.enter_context(patch.object(Engine, "train", whole))
        stack.enter_context(little())
        stack.enter_context(few_shapes())
        if again:
            stack.enter_context(patch.object(engine_module, "rehearse"))
        AcceleratorState._reset_state(True)  # accelerate keeps one precision a process
        yield


def call(arguments: list[str], seen: Seen | None = None, again: bool = False) -> Ended:
    """Run a command line in this process."""
    from distill_cli.cli.app import run

    out, err = io.StringIO(), io.StringIO()
    with watched(seen or Seen(), again), redirect_stdout(out), redirect_stderr(err):
        code = run(arguments)
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return Ended(code, out.getvalue(), err.getvalue())


def words(values: dict[str, Any]) -> list[str]:
    """Options as key=value."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def hashes(folder: Path) -> dict[str, str]:
    """Every file's SHA-256: weights, averages, optimizers, metrics, pictures, the result."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in UNLIKE]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def apart(one: dict[str, Any], other: dict[str, Any], start: dict[str, Any]) -> float:
    """How far two states of a network are from each other, as a share of how far they are from where both began."""
    import torch

    assert one.keys() == other.keys()
    floating = [key for key, value in one.items() if value.is_floating_point()]
    between, moved = (torch.cat([(one[key] - each[key]).double().flatten() for key in floating]).norm() for each in (other, start))
    assert moved > 0
    return float(between / moved)


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@dataclass
class Run:
    """A finished command and its folder."""

    folder: Path
    ended: Ended
    seen: Seen


class Runs:
    """Runs of a session, each made once, when it is first asked for."""

    def __init__(self, place: Path) -> None:
        self.place, self.made = place, {}
        self.wholes: dict[tuple[str, ...], Run] = {}
        self.plans: dict[tuple[str, str], Ended] = {}

    def folder(self, thing: Made, family: str = "") -> Path:
        """What an option names, made on first use."""
        path = self.place / "made" / thing.name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            if thing.make is None:
                own = FAMILIES[family]
                teacher = own.options["teacher"]
                asked = {"teacher": teacher, "num": 12, "shard_size": 5, "batch_size": 4, "device": "cpu", **(own.pairs or {})}
                call(["pairs", *words({key: self.value(value, family) for key, value in asked.items()}), "--out", str(path)]).check()
            else:
                thing.make(path)
        return path

    def value(self, value: Any, family: str) -> Any:
        return str(self.folder(value, family)) if isinstance(value, Made) else value

    def command(self, name: str, family: str, **changes: Any) -> list[str]:
        """The command line that trains a method on a family, without --out."""
        method = METHODS[name]
        given = options(method, family)
        for key, value in changes.items():
            if key in given or "." not in key and key in method.fields:
                given[key] = value
        return [method.command, *words({key: self.value(value, family) for key, value in given.items()})]

    def new(self, what: str) -> Path:
        """A place for a run that is not there."""
        self.made[what] = self.made.get(what, 0) + 1
        return self.place / f"{what}-{self.made[what]}"

    def run(self, name: str, family: str, stop_after: int = 0, again: bool = True, **changes: Any) -> Run:
        """Train anew, until a signal comes after `stop_after` steps, or to the end."""
        folder, seen = self.new(f"{name}-{family}"), Seen(stop_after)
        ended = call([*self.command(name, family, **changes), "--out", str(folder)], seen, again)
        return Run(folder, ended, seen)

    def whole(self, name: str, family: str) -> Run:
        """The uninterrupted run of a pair, or its refusal: made once."""
        if (name, family) not in self.wholes:
            self.wholes[name, family] = self.run(name, family, again=False)
        return self.wholes[name, family]

    def still(self, name: str, family: str) -> Run:
        """As `whole`, but without dropout, which is drawn for each process and part of a batch anew."""
        given = options(METHODS[name], family)
        if not any(given.get(key) for key in STILL):
            return self.whole(name, family)
        key = (name, family, "still")
        if key not in self.wholes:
            self.wholes[key] = self.run(name, family, **STILL)
            self.wholes[key].ended.check()
        return self.wholes[key]

    def plan(self, name: str, family: str, counted: bool = True) -> Ended:
        """What --dry-run says, with memory that is `counted`, or not."""
        if (name, family) not in self.plans:
            from tests.looking import no_memory

            with nullcontext() if counted else no_memory():
                self.plans[name, family] = call([*self.command(name, family), "--out", str(self.new("plan")), "--dry-run"])
        return self.plans[name, family]


def resume(name: str, folder: Path) -> Ended:
    """Go on with a run."""
    return call([METHODS[name].command, "--resume", str(folder)], again=True)

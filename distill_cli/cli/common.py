"""Shared by commands: options, their resolution, and results."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from distill_cli import commands, locks, processes
from distill_cli.errors import UsageError, printable, printable_lines
from distill_cli.processes import say as say
from distill_cli.processes import say_read as say_read

if TYPE_CHECKING:
    from distill_cli.config import Config, GenerateConfig, TrainingConfig
    from distill_cli.models.model import Model, Sampling

    GenerateT = TypeVar("GenerateT", bound=GenerateConfig)


def expand(param: typer.CallbackParam, value: Any) -> Any:
    """Expand `~` and $VAR in an argument that is no key of a recipe."""
    if isinstance(value, list | tuple):
        return [expand(param, each) for each in value]
    if not value:
        return value
    from distill_cli.config.base import expanded

    try:
        return type(value)(expanded(str(value)))
    except ValueError as error:
        raise UsageError(f"{param.opts[0] if param.param_type_name == 'option' else value}: {error}") from error


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Any option; COMMAND --help-all shows all.")]
Recipe = Annotated[str | None, typer.Option(help="A recipe's name or file.", metavar="NAME|FILE", callback=expand)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan, then stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Resume = Annotated[Path | None, typer.Option(help="Continue a run from its folder.", metavar="RUN", callback=expand)]
Processes = Annotated[int | None, typer.Option("--num-processes", min=1, help="Start N processes on this machine.", metavar="N")]
Shards = Annotated[str | None, typer.Option(help="Make only part I of N, from 0/N to N-1/N: an array job.", metavar="I/N")]
ARGUMENTS: list[str] = []
"""The command line, passed on to the processes that this one starts."""
RESUMES = False
"""Whether the same command, started again, continues from what is complete."""


def begin_job() -> None:
    """From here on the same command, started again, continues from what is complete."""
    global RESUMES
    RESUMES = True


def start_processes(count: int | None, prompts: str | None = None) -> None:
    """If `count` processes are wanted and this is not one of them, start them, wait, and end with their exit code.

    `prompts` from a pipe are read here, for all processes.
    """
    begin_job()
    already = processes.world_size()
    if count is None or count == already:
        return
    if already > 1:
        said = f"--num-processes {count}: this is one of {already} processes already"
        raise UsageError(said, "leave it out: whoever started them decides")
    from distill_cli.data.reading import is_pipe, kept_for_others

    locks.release()  # the first of the new processes takes it
    with kept_for_others(prompts) if prompts is not None and is_pipe(prompts) else nullcontext():
        raise typer.Exit(processes.start(count, ARGUMENTS))


def result(data: dict[str, Any], text: str, as_json: bool) -> None:
    """The command's result, on stdout."""
    print(json.dumps(data, indent=2) if as_json else printable_lines(text))


def shared_result(data: dict[str, Any], text: str, as_json: bool, unit: str) -> None:
    """The result of a job whose processes do not talk to each other: the last one prints it, with what is missing in other parts.

    `data["left"]` is what other processes of this command still have to make, `data["missing"]` what is missing of the whole job.
    """
    if data.pop("left"):
        return
    if processes.world_size() > 1:  # counts of the last process alone mean nothing
        data = {key: value for key, value in data.items() if key not in ("made", "kept", "images_per_second")}
        text = text.partition(" (")[0]
    if data["missing"]:
        text += f"; {data['missing']} {unit}, of other parts, are missing still"
    if processes.first_to("result"):
        result(data, text, as_json)


def asked(context: typer.Context, recipe: str | None, overrides: list[str] | None, name: str, **more: Any) -> Any:
    """The options of a command from its recipe, key=value and flags; results go to `out`, else to runs/RECIPE or, without it, runs/NAME."""
    from distill_cli.recipes import resolve

    config = resolve(commands.config_of(str(context.command.name)), recipe, overrides or [], {**more, **context.obj})
    if config.out is not None:
        return config
    return config.model_copy(update={"out": Path("runs") / (Path(recipe).stem if recipe else name)})


def dry_run(config: Config, plan: dict[str, Any]) -> NoReturn:
    """Print the resolved recipe, then the plan as comments (the whole is a recipe again), and end the command."""
    from distill_cli.recipes import dump

    print(dump(config, comments=True), end="")
    print("# plan")
    for key, value in plan.items():
        print(f"#   {key}: {printable(value)}")
    raise typer.Exit


def plan_without(teacher: str, config: Config) -> None:
    """End a dry run whose teacher is not here yet, unless there is a sketch: it downloads nothing, and the plan says what it would."""
    from distill_cli.models.sources import hub, published
    from distill_cli.models.sources.names import base_of

    base = base_of(teacher)
    if not hub.short_name(base) and (download := published.to_download(base) or hub.to_download(base)):
        dry_run(config, {"download": download})


def open_model(command: str, name: str, config: GenerateT, dry_run: bool) -> tuple[Model, GenerateT, dict[str, str]]:
    """The model at the resolution and for the prompts of a job, the job's options, and what its plan says of a download.

    A dry run has a sketch of a model that is not here. Says what was read.
    """
    from distill_cli.models import load
    from distill_cli.models.clip_guide import asking
    from distill_cli.models.cost import sketched
    from distill_cli.models.model import LARGE
    from distill_cli.models.steering import led

    sketch, download = sketched(name, dry_run)
    model = load(name, config.steps) if sketch is None else sketch
    if config.resolution is not None:
        model = model.with_resolution(config.resolution)
    model = model.decoding(getattr(config, "decoder", None), getattr(config, "tiles", None), planned=dry_run)
    model = asking(model, config)
    repeat = getattr(config, "images_per_prompt", 1)
    given = model.conditioner.chosen(config.prompts, model.lineage.data)
    if given or config.prompts is not None or config.negative_prompt is not None or repeat > 1:
        model = model.with_prompts(given, config.negative_prompt, repeat)
        if config.prompts is not None and "num" not in config.model_fields_set:
            config = config.model_copy(update={"num": len(given) * repeat})
    say_read(command, model, given)
    model = led(model, config, dry_run=dry_run)
    if "batch_size" not in config.model_fields_set and model.pixels >= LARGE:
        config = config.model_copy(update={"batch_size": 8})
    return model, config, download


def open_run(context: typer.Context, recipe: str | None, overrides: list[str] | None, dry_run: bool, resume: Path | None) -> Any:
    """The options of a new run, or of the run that --resume names (which takes no other option but --steps)."""
    from distill_cli.config import BUILTIN_SETS
    from distill_cli.recipes import flag_of, resolve
    from distill_cli.runs import Run

    command, flags = str(context.command.name), context.obj
    if resume is None:
        config = asked(context, recipe, overrides, command)
        data = getattr(config, "data", None)
        if data is not None and data not in BUILTIN_SETS and Path(data).is_dir():  # it is stored in models and classifiers
            config = config.model_copy(update={"data": str(Path(data).resolve())})
        if not dry_run and processes.rank() == 0:  # process 0 makes the folder
            if any(config.out.glob(f"{locks.NAME}*")):
                locks.hold(config.out)
            Run(config.out).must_be_new(command)
        return config
    given = [flag_of(key) for key, value in flags.items() if value is not None and key != "steps"]
    if given := [*given, *(["--recipe"] if recipe else []), *(overrides or [])]:
        raise UsageError(f"{given[0]}: not with --resume", "a run goes on with its own settings; only --steps may change")
    stored = Run(resume).recipe
    if not stored.is_file():
        raise UsageError(f"--resume {resume}: no run: {'it has no recipe.yaml' if resume.exists() else 'no such folder'}")
    if not dry_run and processes.world_size() == 1:  # several processes: process 0 takes it later, when it can tell the others
        locks.hold(resume)
    return resolve(commands.config_of(command), str(stored), [], {"steps": flags.get("steps")}).model_copy(update={"out": resume})


def train(config: TrainingConfig, resume: Path | None, dry_run_wanted: bool, as_json: bool, count: int | None) -> None:
    """Open a method and train, or print the plan of it for `count` processes."""
    from distill_cli.methods.registry import load
    from distill_cli.training import fitting
    from distill_cli.training.engine import Engine
    from distill_cli.training.job import Job
    from distill_cli.training.plan import plan

    method = commands.method_of(config)
    job = Job(method.command, resume, dry_run_wanted)
    objective = load(f"methods.{method.objective}")(config, job)
    count = count or processes.world_size()
    fitting.check_even(objective.config, count)
    if dry_run_wanted:
        dry_run(objective.config, {**job.plan, **plan(objective, count)})
    if objective.config.memory is not None:
        fitting.refuse(objective, count)
    engine = Engine(objective.config, objective)
    job.begin(engine)
    if engine.step == engine.steps:
        say(f"{engine.run.folder}: has ended, at step {engine.step}; --steps N goes on")
    made = engine.train()
    if made is None:  # only process 0 has the result
        return
    folder, name = engine.run.folder, objective.result
    picture, text, (data, remark) = folder / "comparison.png", f"{name}: {folder / name}", objective.remarks(made)
    data = {"run": str(folder), name: str(folder / name), "steps": config.steps, "result_step": engine.chosen} | data
    engine.release()
    rows = objective.compared(made)
    if kinds := {model.codec.kind.name for model, _ in rows.values() if not model.codec.kind.drawn}:
        say(f"no comparison.png, and none in samples: {', '.join(kinds)} are not drawn")
    elif rows:
        compare(rows, config, picture, getattr(config, "classes", None))
        data["picture"], text = str(picture), f"{text}\npicture: {picture}"
    result(data, f"{text}\n{remark}" if remark else text, as_json)


def compare(models: dict[str, tuple[Model, Sampling]], config: TrainingConfig, path: Path, classes: list[int] | None = None) -> None:
    """Write a picture with a row for each model, from the same noise, which is in no store of pairs."""
    from distill_cli.data.pictures import save_comparison, to_uint8
    from distill_cli.launch import autocast, device

    rows = []
    for name, (model, sampling) in models.items():
        with autocast(device(config.device), config.precision if model.codec.factor > 1 else "no"):  # pictures of pixel models cost little
            asked = classes if model.conditioner.takes != "nothing" or model.guides else None  # a class that a guide alone was told
            images, _ = model.examples(config.seed, model.shown, sampling, asked)
        calls = sampling.evaluations
        rows.append((f"{name}: {calls} network evaluation{'s' * (calls > 1)} an image", to_uint8(images)))
    save_comparison(rows, path, columns=20 if model.shown == 40 else 8, scale=model.enlarged)

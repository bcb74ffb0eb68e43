"""What subcommands share: how options are spelled, resolved and shown."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from distill_cli.errors import printable, printable_lines
from distill_cli.processes import say as say
from distill_cli.processes import say_read

if TYPE_CHECKING:
    from distill_cli.config import Config, GenerateConfig, TrainingConfig
    from distill_cli.models.model import Model, Sampling

    ConfigT = TypeVar("ConfigT", bound=Config)
    GenerateT = TypeVar("GenerateT", bound=GenerateConfig)


def expand(param: typer.CallbackParam, value: Any) -> Any:
    """Put `~` and $VAR into the paths of an argument that is a Path or no key of a recipe."""
    if not value:
        return value
    from distill_cli.config.base import expanded
    from distill_cli.errors import UsageError

    out = []
    for given in value if isinstance(value, list | tuple) else [value]:
        try:
            out.append(type(given)(expanded(str(given))))
        except ValueError as error:
            raise UsageError(f"{param.opts[0] if param.param_type_name == 'option' else given}: {error}") from error
    return out if isinstance(value, list | tuple) else out[0]


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Any key of the recipe; --help-all shows all.")]
Recipe = Annotated[str | None, typer.Option(help="A recipe's name or file.", metavar="NAME|FILE", callback=expand)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan, then stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Resume = Annotated[Path | None, typer.Option(help="Continue a run from its folder.", metavar="RUN", callback=expand)]
Processes = Annotated[int | None, typer.Option("--num-processes", min=1, help="Start so many processes on this machine.", metavar="N")]
Shards = Annotated[str | None, typer.Option(help="Make part I of N alone, 0/N to N-1/N: an array job.", metavar="I/N")]


ARGUMENTS: list[str] = []
"""The command line, for the processes that it starts."""
RESUMES = False
"""Whether the command goes on, started again, from what it has made until it was stopped."""


def begin_job() -> None:
    """From here on the same command, started again, goes on from what this one has made."""
    global RESUMES
    RESUMES = True


def start_processes(count: int | None, prompts: str | None = None) -> None:
    """Where `count` processes are wanted and this is not one of them, start them, wait, and end this one with their exit code.

    `prompts` that come through a pipe are read here, for all of them.
    """
    from distill_cli import locks, processes
    from distill_cli.errors import UsageError

    begin_job()
    already = processes.world_size()
    if count is None or count == already:
        return
    if already > 1:
        raise UsageError(
            f"--num-processes {count}: this is one of {already} processes already", "leave it out: whoever started them decides"
        )
    from distill_cli.data.reading import is_pipe, kept_for_others

    locks.release()  # the first of them takes it
    with kept_for_others(prompts) if prompts is not None and is_pipe(prompts) else nullcontext():
        raise typer.Exit(processes.start(count, ARGUMENTS))


def result(data: dict[str, Any], text: str, as_json: bool) -> None:
    """The command's result, on stdout."""
    print(json.dumps(data, indent=2) if as_json else printable_lines(text))


def shared_result(data: dict[str, Any], text: str, as_json: bool, unit: str) -> None:
    """The result of a job whose processes do not talk to each other: the last one says it, a part of a job what is missing still.

    `data["left"]` counts what other processes of this command have still to make, `data["missing"]` what is missing of the whole.
    """
    from distill_cli import processes

    if data.pop("left"):
        return
    if processes.world_size() > 1:  # what the last one alone has made says nothing
        data = {key: value for key, value in data.items() if key not in ("made", "kept", "images_per_second")}
        text = text.partition(" (")[0]
    if data["missing"]:
        text += f"; {data['missing']} {unit}, of other parts, are missing still"
    if processes.first_to("result"):
        result(data, text, as_json)


def with_out(config: ConfigT, recipe: str | None, command: str) -> ConfigT:
    """The config with its results' folder named: runs/RECIPE, or runs/COMMAND without one."""
    if config.out is not None:
        return config
    return config.model_copy(update={"out": Path("runs") / (Path(recipe).stem if recipe else command)})


def dry_run(config: Config, plan: dict[str, Any]) -> None:
    """Print the resolved recipe, then the plan as comments: the whole is a recipe again."""
    from distill_cli.recipes import dump

    print(dump(config, comments=True), end="")
    print("# plan")
    for key, value in plan.items():
        print(f"#   {key}: {printable(value)}")


def planned_without(teacher: str, config: Config, dry_run_wanted: bool) -> bool:
    """Whether a dry run is done because its teacher is not here yet: it downloads nothing, and the plan says what it would."""
    from distill_cli.models.sources import hub, published

    if not dry_run_wanted or hub.short_name(teacher):  # whose sketch is known
        return False
    download = published.to_download(teacher) or hub.to_download(teacher)
    if download:
        dry_run(config, {"download": download})
    return bool(download)


def open_model(command: str, name: str, config: GenerateT, sketched: Model | None = None) -> tuple[Model, GenerateT]:
    """The model, or its sketch, at the resolution and for the prompts of a job, and the job's options with what depends on the two.

    Says what was read.
    """
    from distill_cli.models import load
    from distill_cli.models.model import LARGE

    model = load(name, config.steps) if sketched is None else sketched
    if config.resolution is not None:
        model = model.with_resolution(config.resolution)
    repeat = getattr(config, "images_per_prompt", 1)
    given = model.conditioner.chosen(config.prompts, model.lineage.data)
    if given or config.prompts is not None or config.negative_prompt or repeat > 1:
        model = model.with_prompts(given, config.negative_prompt, repeat)
        if config.prompts is not None and "num" not in config.model_fields_set:
            config = config.model_copy(update={"num": len(given) * repeat})
    say_read(command, model, given)
    if "batch_size" not in config.model_fields_set and model.pixels >= LARGE:
        config = config.model_copy(update={"batch_size": 8})
    return model, config


def open_run(
    command: str, recipe: str | None, overrides: list[str] | None, dry_run: bool, flags: dict[str, Any], resume: Path | None
) -> Any:
    """The options of a new run, or of the run that --resume names (which takes no other option but --steps)."""
    from distill_cli import locks
    from distill_cli.commands import config_of
    from distill_cli.config import BUILTIN_SETS
    from distill_cli.errors import UsageError
    from distill_cli.processes import rank, world_size
    from distill_cli.recipes import flag_of, resolve
    from distill_cli.runs import Run

    if resume is None:
        config = with_out(resolve(config_of(command), recipe, overrides or [], flags), recipe, command)
        data = getattr(config, "data", None)
        if data is not None and data not in BUILTIN_SETS and Path(data).is_dir():  # models and classifiers remember it
            config = config.model_copy(update={"data": str(Path(data).resolve())})
        assert config.out is not None
        if not dry_run and rank() == 0:  # which makes the folder
            if any(config.out.glob(f"{locks.NAME}*")):
                locks.hold(config.out)
            Run(config.out).must_be_new(command)
        return config
    given = [flag_of(key) for key, value in flags.items() if value is not None and key != "steps"]
    given += ["--recipe"] if recipe else []
    given += overrides or []
    if given:
        raise UsageError(f"{given[0]}: not with --resume", "a run goes on with its own settings; only --steps may change")
    stored = Run(resume).recipe
    if not stored.is_file():
        raise UsageError(f"--resume {resume}: no run: it has no recipe.yaml")
    if not dry_run and world_size() == 1:  # of several processes the first takes it where it can tell the others
        locks.hold(resume)
    config = resolve(config_of(command), str(stored), [], {"steps": flags.get("steps")})
    return config.model_copy(update={"out": resume})


def train(config: TrainingConfig, resume: Path | None, dry_run_wanted: bool, as_json: bool) -> None:
    """Open a method and train, or print the plan of it."""
    from distill_cli.commands import method_of
    from distill_cli.methods.registry import load
    from distill_cli.training.engine import Engine
    from distill_cli.training.job import Job
    from distill_cli.training.plan import plan

    method = method_of(config)
    job = Job(method.command, resume, dry_run_wanted)
    objective = load(f"methods.{method.objective}")(config, job)
    if dry_run_wanted:
        dry_run(objective.config, {**job.plan, **plan(objective)})
        return
    engine = Engine(objective.config, objective)
    job.begin(engine)
    made = engine.train()
    if made is None:  # process 0 alone has it
        return
    folder, name = engine.run.folder, objective.result
    lines, (data, remark) = [f"{name}: {folder / name}"], objective.remarks(made)
    data = {"run": str(folder), name: str(folder / name), "steps": config.steps} | data
    engine.release()
    if rows := objective.compared(made):
        data["picture"] = str(folder / "comparison.png")
        compare(rows, config, folder / "comparison.png", getattr(config, "classes", None))
        lines.append(f"picture: {folder / 'comparison.png'}")
    result(data, "\n".join([*lines, *filter(None, [remark])]), as_json)


def compare(models: dict[str, tuple[Model, Sampling]], config: TrainingConfig, path: Path, classes: list[int] | None = None) -> None:
    """Models below one another, from the same noise, which is in no store of pairs."""
    from distill_cli.data.pictures import save_comparison, to_uint8
    from distill_cli.launch import autocast, device

    rows = []
    for name, (model, sampling) in models.items():
        with autocast(device(config.device), config.precision):
            images, _ = model.examples(config.seed, model.shown, sampling, classes)
        calls = sampling.evaluations
        rows.append((f"{name}: {calls} network evaluation{'s' * (calls > 1)} an image", to_uint8(images)))
    save_comparison(rows, path, columns=20 if model.shown == 40 else 8, scale=model.enlarged)

"""What subcommands share: how options are spelled, resolved and shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from distill_cli.errors import printable, printable_lines

if TYPE_CHECKING:
    from distill_cli.config import Config, GenerateConfig, TrainingConfig
    from distill_cli.data import Images
    from distill_cli.models.model import Model, Sampling
    from distill_cli.training.engine import Engine

    ConfigT = TypeVar("ConfigT", bound=Config)
    GenerateT = TypeVar("GenerateT", bound=GenerateConfig)
    TrainingT = TypeVar("TrainingT", bound=TrainingConfig)


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


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Any other key of the recipe.")]
Recipe = Annotated[str | None, typer.Option(help="A recipe's name or file.", metavar="NAME|FILE", callback=expand)]
Out = Annotated[Path | None, typer.Option(help="Folder of the results.", callback=expand)]
Seed = Annotated[int | None, typer.Option(help="Of all noise, orders and times.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan, then stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Resume = Annotated[Path | None, typer.Option(help="Continue a run from its folder.", metavar="RUN", callback=expand)]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.")]
BatchSize = Annotated[int | None, typer.Option(help="Images at a time.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate.")]
Precision = Annotated[str | None, typer.Option(help="no, bf16 or fp16.")]
Guidance = Annotated[float | None, typer.Option(help="uncond + scale (cond - uncond).")]
Solver = Annotated[str | None, typer.Option(help="heun, euler, ddim, pndm, dpm++, ancestral or few-step.")]
Processes = Annotated[int | None, typer.Option("--num-processes", min=1, help="Start so many processes on this machine.", metavar="N")]
Shards = Annotated[str | None, typer.Option(help="Make part I of N alone, 0/N to N-1/N: an array job.", metavar="I/N")]
Prompts = Annotated[
    str | None, typer.Option(help="Of a model with text: a file (lines, JSON or a table), - for standard input, or a built-in set.")
]
Negative = Annotated[str | None, typer.Option(help="Of a model with text: what guidance leads away from.")]
Classes = Annotated[str | None, typer.Option(help="Labels in turn, such as 0-9 or 3,5.")]


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


def say(text: str) -> None:
    """A line for the person who watches, on stderr; of several processes the first says it."""
    from distill_cli.processes import rank

    if rank() == 0:
        print(printable_lines(text), file=sys.stderr)


def say_read(command: str, *things: Any) -> None:
    """The first line of a job: what each of `things` (a text, or its `about`) says of what was read, left out and assumed."""
    said = [about for thing in things if (about := thing if isinstance(thing, str) else getattr(thing, "about", ""))]
    if said:
        text = f"{command}: {'; '.join(said)}"
        say("".join(letter if letter.isprintable() else "?" for letter in text))


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


def sketched(teacher: str, dry_run_wanted: bool) -> tuple[Model | None, dict[str, str]]:
    """For a dry run with a hub model that is not here yet: its sketch, and what the plan says of the download."""
    from distill_cli.models.sources.hub import short_name, to_download

    known = short_name(teacher)
    download = to_download(teacher) if dry_run_wanted and known else ""
    if not download:
        return None, {}
    from distill_cli.models.cost import sketch

    return sketch(known), {"download": download}


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
    config_type: type[TrainingT], command: str, recipe: str | None, overrides: list[str] | None, dry_run: bool, flags: dict[str, Any]
) -> TrainingT:
    """The options of a new run, or of the run that --resume names (which takes no other option but --steps)."""
    from distill_cli import locks
    from distill_cli.config import BUILTIN_SETS
    from distill_cli.errors import UsageError
    from distill_cli.processes import rank, world_size
    from distill_cli.recipes import resolve
    from distill_cli.runs import Run

    folder = flags.pop("resume")
    if folder is None:
        config = with_out(resolve(config_type, recipe, overrides or [], flags), recipe, command)
        data = getattr(config, "data", None)
        if data is not None and data not in BUILTIN_SETS and Path(data).is_dir():  # models and classifiers remember it
            config = config.model_copy(update={"data": str(Path(data).resolve())})
        assert config.out is not None
        if not dry_run and rank() == 0:  # which makes the folder
            if any(config.out.glob(f"{locks.NAME}*")):
                locks.hold(config.out)
            Run(config.out).must_be_new(command)
        return config
    given = [f"--{key.replace('_', '-')}" for key, value in flags.items() if value is not None and key != "steps"]
    given += ["--recipe"] if recipe else []
    given += overrides or []
    if given:
        raise UsageError(f"{given[0]}: not with --resume", "a run goes on with its own settings; only --steps may change")
    stored = Run(folder).recipe
    if not stored.is_file():
        raise UsageError(f"--resume {folder}: no run: it has no recipe.yaml")
    if not dry_run and world_size() == 1:  # of several processes the first takes it where it can tell the others
        locks.hold(folder)
    config = resolve(config_type, str(stored), [], {"steps": flags.get("steps")})
    return config.model_copy(update={"out": folder})


def open_data(command: str, config: Any, resume: Path | None, dry_run: bool, *read: Any) -> Images:
    """The set of images of a job that trains, whose pictures are checked, and stand where they stood when a resumed run began.

    Says what was read: `read` and the images.
    """
    from distill_cli.data import listing, open_images
    from distill_cli.data.images import Folder

    images = open_images(str(config.data), config.resolution, config.flip)
    say_read(command, *read, images)
    if isinstance(images, Folder) and not dry_run:
        for line in listing.prepare(images, resume):
            say(line)
    return images


def start_run(engine: Engine, command: str, resume: Path | None, prompts: Sequence[str] = ()) -> None:
    """Make the run's folder, or open it and go on; its recipe runs again as it stands, from any working directory.

    `prompts` that came through a pipe are kept in it.
    """
    from distill_cli import launch, locks
    from distill_cli.config import BUILTIN_SETS, PROMPT_SETS
    from distill_cli.data import listing
    from distill_cli.data.images import Folder
    from distill_cli.data.reading import is_pipe
    from distill_cli.errors import DistillError
    from distill_cli.files import write_atomic
    from distill_cli.models.sources.registry import REGISTRY
    from distill_cli.pairs.store import PROMPTS, keep_prompts
    from distill_cli.processes import rank
    from distill_cli.recipes import dump
    from distill_cli.runs import Run

    config = engine.config
    assert config.out is not None
    given = {
        key: Path(value)
        for key in ("teacher", "data", "pairs", "lpips_weights", "vae", "prompts", "decoder")
        if (value := getattr(config, key, None)) is not None and value not in (*REGISTRY, *BUILTIN_SETS, *PROMPT_SETS)
    }
    paths = ("pairs", "lpips_weights", "vae")
    absolute = {key: path.resolve() if key in paths else str(path.resolve()) for key, path in given.items() if path.exists()}
    if piped := is_pipe(getattr(config, "prompts", None) or ""):
        absolute["prompts"] = str((config.out / PROMPTS).resolve())
    text = dump(config.model_copy(update={**absolute, "out": None}))
    run, trouble = Run(config.out), None
    if rank() == 0:
        try:
            locks.hold(config.out)
            run = Run.resume(resume) if resume is not None else Run.create(config.out, text, command)
            if piped:
                keep_prompts(config.out, prompts)
        except DistillError as error:
            trouble = (type(error), error.message, error.hint)
    for kind, message, hint in filter(None, launch.all_of([trouble], engine.accelerator.device)):  # the others would wait for it
        raise kind(message, hint)
    engine.open(run)
    images = getattr(engine.objective, "images", None)
    if rank() == 0 and isinstance(images, Folder):
        listing.keep(images, run.folder)
    if rank() == 0 and resume is not None:
        write_atomic(run.recipe, text)


def training_plan(config: TrainingConfig, parameters: dict[str, int], trained: int) -> dict[str, Any]:
    """Steps, images, disk and memory of a training run."""
    average = parameters.get("student", trained)
    weights = (sum(parameters.values()) + average) * 4
    kept = parameters.get("target", 0)
    checkpoint = 4 * (3 * trained + average + kept)  # weights and two moments
    return {
        "steps": config.steps,
        "images": config.steps * config.batch_size,
        "parameters": ", ".join(f"{name} {count:,}" for name, count in parameters.items()),
        "disk": f"about {checkpoint * config.keep / 1e6:.0f} MB of checkpoints",
        "memory": f"about {(weights + 12 * trained) / 1e6:.0f} MB of weights, their average, gradients and moments, and the activations",
    }


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

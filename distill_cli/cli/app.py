"""The app, and how errors become lines and exit codes."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core

from distill_cli import __version__, locks, messages, processes
from distill_cli.cli import common, models, recipes
from distill_cli.cli.bench import bench
from distill_cli.cli.convert import convert
from distill_cli.cli.edit import edit
from distill_cli.cli.env import REINSTALL, env, torchvision_trouble
from distill_cli.cli.evaluate import evaluate
from distill_cli.cli.export import export
from distill_cli.cli.options import Configured, Job
from distill_cli.cli.pairs import pairs
from distill_cli.cli.push import push
from distill_cli.cli.sample import sample
from distill_cli.cli.trace import trace
from distill_cli.cli.training import summary, training
from distill_cli.cli.watch import watch
from distill_cli.commands import COMMANDS, TRAINING, instead
from distill_cli.errors import DistillError, Interrupted, UsageError, nearest, printable, printable_lines

app = typer.Typer(
    name="distill",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ClickUsageError: Any = typer.BadParameter.__mro__[1]
"""Typer's own (newer versions carry their own click) or click's UsageError."""
ClickError: Any = ClickUsageError.__mro__[1]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distill {__version__}")
        raise typer.Exit


@app.callback()
def distill(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Turn a pretrained diffusion model into a generator of one or a few steps."""


for name in TRAINING:
    short, whole = summary(name)
    app.command(name, cls=Configured, short_help=short, help=whole)(training)
app.command(cls=Configured)(pairs)
app.command(cls=Configured)(sample)
app.command(cls=Configured)(trace)
app.command(cls=Configured)(edit)
app.command(cls=Configured)(evaluate)
app.command(cls=Job)(bench)
app.command()(watch)
app.command()(convert)
app.command()(export)
app.command()(push)
app.command()(env)
app.add_typer(models.app, name="models")
app.add_typer(recipes.app, name="recipes")


def _fail(message: str, hint: str, code: int, what: str = "error") -> int:
    """Print an error, once for processes that run together. If `what` is not "error", the word is left out."""
    if processes.first_to(what):
        shown = printable_lines(message) if code == 2 else printable(message)  # errors of a recipe are shown together, a line each
        print(f"error: {shown}" if what == "error" else shown, file=sys.stderr)
        if hint:
            print(f"hint: {printable(hint)}", file=sys.stderr)
    return code


def _usage(error: Any) -> int:
    """Print an error of the command line, with the nearest command or flag."""
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help shows the options" if context else ""
    wrong = getattr(error, "option_name", None)
    if wrong and context and "no such option" in message.lower():
        known = [name for param in context.command.get_params(context) for name in param.opts]
        command, key = context.info_name, wrong.lstrip("-").replace("-", "_")
        said = instead(command, key) if command in COMMANDS else ""
        return _fail(f"{wrong}: no such option", said or nearest(wrong, known, "options"), 2)
    if message.lower().startswith("no such command") and context:
        name = message.split("'")[1]
        return _fail(f"{name}: no such command", nearest(name, context.command.list_commands(context), "commands"), 2)
    return _fail(message.rstrip("."), hint, 2)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done or preempted, 1 the user can fix it, 2 usage, 3 a bug, 130 interrupted."""
    common.ARGUMENTS, common.RESUMES = sys.argv[1:] if arguments is None else arguments, False
    with suppress(UsageError):  # a job reports it; help and lists do not need it
        processes.adopt_slurm()
        processes.share_cores()
    try:
        return app(arguments, prog_name="distill", standalone_mode=False) or 0
    except ClickError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return 2
        return _usage(error)
    except Interrupted as error:
        return _fail(error.message, error.hint, error.exit_code, "stop")
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", "", 130)
    except Exception as error:
        if os.environ.get("DISTILL_DEBUG") == "1":
            raise
        return _failed(error)
    finally:
        locks.release()


NO_MEMORY = "a smaller batch_size, accumulate=2 or more in training, precision=bf16; another program may hold some of it"


def _failed(error: Exception) -> int:
    """Print an error in one line; an unknown error is a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, DistillError):
        return _fail(error.message, error.hint, error.exit_code)
    if isinstance(error, OSError):
        return _fail(f"{error.filename or 'input/output'}: {(error.strerror or str(error)).lower()}", "", 1)
    if _lost_another(error):
        lost = "another process of this run has ended"
        return 1 if processes.supervised() else _fail(lost, "the same command, or --resume, goes on from what is complete", 1)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return _fail(f"out of memory{f' ({text[:100]})' if text else ''}", NO_MEMORY, 1)
    if "torch" in sys.modules and (trouble := torchvision_trouble(sys.modules["torch"].__version__, str(error))):
        return _fail(trouble, REINSTALL, 1)
    return _fail(f"{type(error).__name__}: {text[:300]}", "this is a bug of distill; DISTILL_DEBUG=1 shows where", 3)


def _lost_another(error: Exception) -> bool:
    """Whether an error means that another process of this run has ended, which reports its own reason."""
    if not processes.several() or "torch" not in sys.modules:
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _preempted(number: int, frame: FrameType | None) -> None:
    """End at once with exit code 0. Complete files are kept, and the same command or --resume continues.

    Processes that another one started say nothing: that one knows whether it got the signal, or one of them failed.
    """
    if not common.RESUMES:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if processes.TOGETHER not in os.environ and not processes.said_by_any("error") and processes.first_to("stop"):
        messages.tell(f"stopped by {signal.Signals(number).name}\nhint: the same command, or --resume, goes on from what is complete")
    processes.leave(0)
    locks.release()
    os._exit(0)


def main() -> None:
    messages.guard()
    for number in processes.preemption():
        signal.signal(number, _preempted)
    processes.begin()
    code = run()
    lost = messages.lost()
    if lost is not None and code == 0:
        code = _fail(f"standard output: {(lost.strerror or str(lost)).lower()}", "what the command made is complete", 1)
    processes.leave(code)
    if code == 0 and "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    sys.exit(code)

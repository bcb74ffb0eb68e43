"""One process or many: the number of this one, its share of the work, starting several, and printing an error once.

torchrun, `accelerate launch` and `srun` give each process its number in environment variables. Imports torch only to start processes.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import zlib
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill_cli.errors import UsageError, printable_lines

TOGETHER = "DISTILL_TOGETHER"
"""Variable with the folder in which processes started by `start` leave a file when they begin, and their exit codes."""
SAID = "DISTILL_SAID"
"""Variable with the lines that the parent process has printed already."""
_HIDDEN: list[str] = []
PREEMPTION = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals of a scheduler, and of a terminal that closes."""


def preemption() -> list[signal.Signals]:
    """Signals that preempt this process. A signal that was ignored at its start, as under nohup, stays ignored."""
    return [number for number in PREEMPTION if signal.getsignal(number) is not signal.SIG_IGN]


def _number(name: str, default: int, env: Mapping[str, str] = os.environ) -> int:
    """The value of a variable that holds a count; raises UsageError for anything else."""
    text = env.get(name, str(default)).strip()
    if not re.fullmatch("[0-9]{1,9}", text, re.ASCII):
        raise UsageError(
            f"{name}={text}: {'not a number' if text else 'empty'}", f"unset {name}, or start with torchrun or --num-processes"
        )
    return int(text)


def rank() -> int:
    """The number of this process among all."""
    return _number("RANK", 0)


def world_size() -> int:
    """The number of processes."""
    return _number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """The number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return _number("LOCAL_RANK", 0)


def several() -> bool:
    """Whether this is one of several processes; False if a launcher's variables cannot be read."""
    try:
        return world_size() > 1
    except UsageError:
        return False


PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun, accelerate and `adopt_slurm` set together; LOCAL_WORLD_SIZE only divides the cores."""
OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""MPI's numbers of processes, which are not supported."""
UNUSED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "accumulate=N does it"),
    "ACCELERATE_MIXED_PRECISION": ("no", "--precision does it"),
    "ACCELERATE_USE_CPU": ("false", "--device does it"),
    "ACCELERATE_TORCH_DEVICE": ("", "--device does it"),
}
"""Variables of accelerate that would change training: their neutral value, and the option to use instead."""
FLAGS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""Variables by which accelerate is asked to share a model between processes; the engine reads them too."""
COMPILED = "ACCELERATE_DYNAMO_"
"""Prefix of accelerate's variables about compiling networks, which is not supported."""
TRUE, FALSE = ("1", "true", "yes", "y", "t", "on"), ("0", "false", "no", "n", "f", "off")
_OF_FSDP = ("OFFLOAD_PARAMS", "USE_ORIG_PARAMS", "SYNC_MODULE_STATES", "FORWARD_PREFETCH", "ACTIVATION_CHECKPOINTING")
TRUTHS = ("ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", *(f"FSDP_{name}" for name in (*_OF_FSDP, "CPU_RAM_EFFICIENT_LOADING")))
"""Variables of accelerate that are true or false; it fails on other values."""
UNKNOWN = ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
"""Variables of accelerate that ask for unsupported kinds of parallelism."""


def settled() -> None:
    """Before a job: raise UsageError if a launcher's variables are incomplete or contradict each other.

    With an incomplete set a job would make a part of its images only, or all of them several times.
    """
    adopt_slurm()
    counts = {name: _number(name, default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))}
    counts["LOCAL_WORLD_SIZE"] = _number("LOCAL_WORLD_SIZE", counts["WORLD_SIZE"])
    there = [name for name in (*PLACE[:3], "LOCAL_WORLD_SIZE") if name in os.environ]
    hint = f"torchrun, accelerate launch and srun set all of {', '.join(PLACE)}; for one process unset {', '.join(there)}"
    needed = PLACE if counts["WORLD_SIZE"] > 1 or "LOCAL_RANK" in there else PLACE[:2] if "RANK" in there else ()
    missing = [name for name in needed if not os.environ.get(name, "").strip()]
    if missing:
        raise UsageError(f"{there[0]}={os.environ[there[0]]}: set without {', '.join(missing)}", hint)
    for number, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if counts[number] >= counts[size]:
            raise UsageError(f"{number}={counts[number]}: not below {size}={counts[size]}", hint)
    if counts["LOCAL_WORLD_SIZE"] > counts["WORLD_SIZE"]:
        raise UsageError("LOCAL_WORLD_SIZE={LOCAL_WORLD_SIZE}: above WORLD_SIZE={WORLD_SIZE}".format(**counts), hint)
    if not 0 < _number("MASTER_PORT", 1) < 1 << 16:
        raise UsageError(f"MASTER_PORT={os.environ['MASTER_PORT']}: not from 1 to 65535", hint)
    for name in OTHERS:
        if "WORLD_SIZE" not in there and _number(name, 1) > 1:
            raise UsageError(f"{name}={os.environ[name]}: MPI's variables are not read", "start with torchrun, srun or --num-processes")
    own_arithmetic()
    share_cores()


def own_arithmetic() -> None:
    """Unset variables of accelerate that would change training, with a message; raises UsageError for unsupported ones."""
    for name in (*UNKNOWN, *FLAGS, *TRUTHS):
        if not os.environ.get(name, "x").strip():
            del os.environ[name]
        known = ("true", "false") if name in FLAGS else (*TRUE, *FALSE)
        if os.environ.get(name, "true").lower() not in known:
            raise UsageError(f"{name}={os.environ[name]}: neither true nor false", f"unset {name}")
    for name in UNKNOWN:
        if os.environ.get(name, "").lower() in TRUE:
            raise UsageError(f"{name}: not supported", "accelerate's FSDP (fsdp_version 2) shards weights, its DeepSpeed moments")
    compiled = [name for name in os.environ if name.startswith(COMPILED)]  # `accelerate launch` itself sets some of them
    said = {name: ("no" if name.endswith("BACKEND") else os.environ[name].lower(), "networks are not compiled") for name in compiled}
    for name, (neutral, ours) in (UNUSED | said).items():
        value = os.environ.pop(name, neutral)
        if value.lower() not in (neutral, "") and rank() == 0:
            print(f"{name}={value} is not used: {ours}", file=sys.stderr)


def usable_cpus() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_host(hosts: str) -> str:
    """The first host in a list of Slurm: `gpu[03-07,09]-ib,x1` -> gpu03-ib."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in found.groups()) if found else hosts


def _tasks_of_node(counts: str, node: int) -> int:
    """The number of tasks on a node, from Slurm's list: `4(x2),3` is 4, 4, 3."""
    tasks: list[int] = []
    for entry in counts.split(","):
        number, _, times = entry.partition("(x")
        tasks += [int(number)] * int(times.rstrip(")") or 1)
    return tasks[node] if node < len(tasks) else 1


SRUN = "srun sets all of SLURM_STEP_NUM_TASKS, SLURM_STEP_TASKS_PER_NODE, SLURM_PROCID, ...; for one process unset the first"


def adopt_slurm(variables: MutableMapping[str, str] | None = None) -> None:
    """Under `srun` with several tasks, set the variables that torchrun would set; existing ones stay.

    Reads the number of tasks of the job step, so a batch script outside `srun` is one process. Raises UsageError for an incomplete set.
    """
    env = os.environ if variables is None else variables
    tasks = _number("SLURM_STEP_NUM_TASKS", 1, env) if "RANK" not in env else 1
    if tasks < 2:
        return
    counts = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", counts, re.ASCII):
        raise UsageError(f"SLURM_STEP_TASKS_PER_NODE={counts}: not like 4(x2),3", SRUN)
    spread = _tasks_of_node(counts, 0) < tasks
    for name in ("SLURM_PROCID", *(("SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST") if spread else ())):
        if not env.get(name, "").strip():
            raise UsageError(f"SLURM_STEP_NUM_TASKS={tasks}: set without {name}", SRUN)
    number = _number("SLURM_PROCID", 0, env)
    job = _number("SLURM_JOB_ID", 0, env)
    local = _tasks_of_node(counts, _number("SLURM_NODEID", 0, env))
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    bound = local > 1 and visible != "" and "," not in visible  # each task sees one GPU, which is number 0 to it
    found = {
        "RANK": str(number),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if bound else str(_number("SLURM_LOCALID", number, env)),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": first_host(env.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(15000 + (job * 7 + _number("SLURM_STEP_ID", 0, env)) % 15000),
    }
    if env.get("WORLD_SIZE", str(tasks)).strip() != str(tasks):
        raise UsageError(f"WORLD_SIZE={env['WORLD_SIZE']}: srun has started {tasks} tasks", "unset WORLD_SIZE")
    for key, value in found.items():
        env.setdefault(key, value)


def parse_part(text: str | None) -> tuple[int, int]:
    """`2/8` -> (2, 8): part 2, counted from 0, of a job that 8 independent commands share."""
    if text is None:
        return 0, 1
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shards {text}: not like 0/8 to 7/8", "parts are counted from 0, as Slurm's --array=0-7 does")
    return int(index), int(count)


def mine(units: int, part: tuple[int, int] = (0, 1)) -> range:
    """This process's share of the work units 0 .. units-1, within part (i, n) of the job."""
    index, count = part
    return range(index + count * rank(), units, count * world_size())


def share_cores() -> None:
    """Before torch is imported: divide a machine's cores between its processes, unless OMP_NUM_THREADS is set."""
    if local_world_size() > 1:
        bound = os.environ.get("SLURM_CPUS_PER_TASK")
        os.environ.setdefault("OMP_NUM_THREADS", bound or str(max(1, usable_cpus() // local_world_size())))


def supervised() -> bool:
    """Whether an agent stops the other processes when one fails."""
    return TOGETHER in os.environ or "TORCHELASTIC_ERROR_FILE" in os.environ


def _claims() -> Path | None:
    """A folder shared by the processes of one job on this machine, or None."""
    if TOGETHER in os.environ:
        return Path(os.environ[TOGETHER])
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent.parent
    if several() and "SLURM_JOB_ID" in os.environ:
        step = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_STEP_ID', 0)}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        command = zlib.crc32(" ".join(sys.argv[1:]).encode())  # a job step may run several commands in turn
        folder = Path(tempfile.gettempdir(), f"distill-{os.getuid()}-{step}-{command}")
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
        return folder
    return None


def first_to(what: str) -> bool:
    """Whether this process is the first of its job on this machine to say `what`."""
    folder = _claims()
    if folder is None:
        return True
    try:
        with open(folder / f"distill-{what}", "x") as file:
            file.write(str(rank()))
    except FileExistsError:
        return False
    except OSError:  # the folder is gone: better twice than never
        return True
    return True


def said_by_any(what: str) -> bool:
    """Whether a process of this job on this machine has said `what`."""
    folder = _claims()
    return folder is not None and (folder / f"distill-{what}").exists()


def say_hidden(option: str, name: str, what: str) -> None:
    """If a file or folder here is named as something built in, print which of the two is used, and how to name the other."""
    text = f"{option} {name}: {what}; what lies here under that name is ./{name}"
    if os.path.lexists(name) and rank() == 0 and text not in os.environ.get(SAID, "").splitlines():
        _HIDDEN.append(text)
        print(text, file=sys.stderr)


def begin() -> None:
    """In a process started by `start`: leave a file that says so, and ask Linux to kill this process if its parent is killed."""
    if TOGETHER not in os.environ:
        return
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with suppress(OSError):
        Path(os.environ[TOGETHER], f"begun-{rank()}").touch()


def leave(code: int) -> None:
    """Leave this process's exit code for the process that started it."""
    if TOGETHER in os.environ:
        with suppress(OSError):
            Path(os.environ[TOGETHER], f"code-{rank()}-{code}").touch()  # a name, since a full disk takes no bytes


def _codes(folder: str) -> dict[int, int]:
    """The exit codes that processes have left in their shared folder, by process number."""
    names = (path.name.split("-") for path in Path(folder).glob("code-*-*"))
    return {int(number): int(code) for _, number, code in names}


def start(count: int, arguments: list[str]) -> int:
    """Run `distill ARGUMENTS` as `count` processes under torch's elastic agent; returns the exit code.

    If one fails the others are stopped, and its code is returned. SIGTERM, SIGINT and SIGUSR1 (as SIGTERM) are passed on.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the agent logs too much
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // count)))
    heard = [number.name for number in (signal.SIGINT, signal.SIGQUIT, *preemption()) if number != signal.SIGUSR1]
    options: dict[str, Any] = {"signals_to_handle": ",".join(heard)} if hasattr(LaunchConfig, "signals_to_handle") else {}
    signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        os.environ[TOGETHER], os.environ[SAID] = folder, "\n".join(_HIDDEN)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=Path(folder).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **options,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "distill_cli", *arguments)
            return 0
        except SignalException as stopped:
            codes = _codes(folder)
            begun = len(list(Path(folder).glob("begun-*")))  # the others have nothing to lose
            if len(codes) < begun and stopped.sigval != signal.SIGINT:
                print(f"error: {begun - len(codes)} of {count} processes were ended before they could stop in order", file=sys.stderr)
                return 128 + signal.SIGTERM
            if not said_by_any("stop") and stopped.sigval != signal.SIGINT:  # it came before the first step
                print(f"stopped by {signal.Signals(stopped.sigval).name}", file=sys.stderr)
                print("hint: the same command, or --resume, goes on from what is complete", file=sys.stderr)
            return max(codes.values(), default=130 if stopped.sigval == signal.SIGINT else 0)
        except ChildFailedError as failed:
            codes, told = _codes(folder), Path(folder, "distill-error")  # by which process
            if told.exists() and (said := told.read_text()).isdecimal() and int(said) in codes:
                return codes[int(said)]
            ends = {number: failure.exitcode for number, failure in failed.failures.items()}
            ends = {number: code for number, code in ends.items() if code != -signal.SIGTERM} or ends  # which stopped the others
            number, code = min(ends.items(), key=lambda end: (end[1] > 0, -end[1]))  # killed, else the highest: 1 may have lost another
            if code > 0:
                return code
            print(f"error: process {number} was killed by {signal.Signals(-code).name}", file=sys.stderr)
            print("hint: out of memory? The same command, or --resume, goes on from what is complete", file=sys.stderr)
            return 128 - code
        finally:
            del os.environ[TOGETHER], os.environ[SAID]


def say(text: str) -> None:
    """A line for the person who watches, on stderr; of several processes the first says it."""
    if rank() == 0:
        print(printable_lines(text), file=sys.stderr)


def say_read(command: str, *things: Any) -> None:
    """The first line of a job: what each of `things` (a text, or its `about`) says of what was read, left out and assumed."""
    said = [about for thing in things if (about := thing if isinstance(thing, str) else getattr(thing, "about", ""))]
    if said:
        text = f"{command}: {'; '.join(said)}"
        say("".join(letter if letter.isprintable() else "?" for letter in text))

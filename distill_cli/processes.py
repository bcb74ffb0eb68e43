"""One process or many: which one this is, its share of the work, starting several, and telling an error once.

torchrun, `accelerate launch` and `srun` each say by environment variables which process this is. Knows torch only where it
starts processes.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import zlib
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill_cli.errors import UsageError

TOGETHER = "DISTILL_TOGETHER"
"""Names the folder in which processes that `start` has started leave that they have begun, and their exit codes."""
PREEMPTION = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What a scheduler sends, and a terminal that goes."""


def preemption() -> list[signal.Signals]:
    """Signals that preempt this process: what was ignored at its start, as under nohup, stays so."""
    return [number for number in PREEMPTION if signal.getsignal(number) is not signal.SIG_IGN]


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_cpus() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_host(hosts: str) -> str:
    """The first of Slurm's list of hosts: `gpu[03-07,09]-ib,x1` -> gpu03-ib."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in found.groups()) if found else hosts


def _tasks_of_node(counts: str, node: int) -> int:
    """Slurm's tasks a node: `4(x2),3` -> 4, 4, 3."""
    tasks: list[int] = []
    for entry in counts.split(","):
        number, _, times = entry.partition("(x")
        tasks += [int(number)] * int(times.rstrip(")") or 1)
    return tasks[node] if node < len(tasks) else 1


def adopt_slurm(variables: MutableMapping[str, str] | None = None) -> None:
    """Under `srun` with several tasks, set what torchrun would have set; what is set already stays.

    A step's own number of tasks is read, so a batch script outside `srun` is one process.
    """
    env = os.environ if variables is None else variables
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2 or "SLURM_PROCID" not in env:
        return
    job = int(env.get("SLURM_JOB_ID", "0"))
    local = _tasks_of_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(env.get("SLURM_NODEID", "0")))
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    bound = local > 1 and visible != "" and "," not in visible  # to one GPU a task, which is then its first
    found = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if bound else env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": first_host(env.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(15000 + (job * 7 + int(env.get("SLURM_STEP_ID", "0"))) % 15000),
    }
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
    """The units of work, of 0 .. units-1, that fall to this process of this part of the job."""
    index, count = part
    return range(index + count * rank(), units, count * world_size())


def share_cores() -> None:
    """Before torch is imported: divide the cores between the processes of a machine, unless whoever started them has."""
    if local_world_size() > 1:
        bound = os.environ.get("SLURM_CPUS_PER_TASK")
        os.environ.setdefault("OMP_NUM_THREADS", bound or str(max(1, usable_cpus() // local_world_size())))


def supervised() -> bool:
    """Whether somebody watches over this process who stops the others when one fails."""
    return TOGETHER in os.environ or "TORCHELASTIC_ERROR_FILE" in os.environ


def _claims() -> Path | None:
    """Where processes of this machine that run together can see what another has done."""
    if TOGETHER in os.environ:
        return Path(os.environ[TOGETHER])
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent.parent
    if world_size() > 1 and "SLURM_JOB_ID" in os.environ:
        step = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_STEP_ID', 0)}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        command = zlib.crc32(" ".join(sys.argv[1:]).encode())  # one step may run several after another
        folder = Path(tempfile.gettempdir(), f"distill-{os.getuid()}-{step}-{command}")
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
        return folder
    return None


def first_to(what: str) -> bool:
    """Whether this process is the first of those running together on this machine to say `what`."""
    folder = _claims()
    if folder is None:
        return True
    try:
        with open(folder / f"distill-{what}", "x") as file:
            file.write(str(rank()))
    except FileExistsError:
        return False
    except OSError:  # the folder is gone: say it rather than not
        return True
    return True


def begin() -> None:
    """Where `start` has started this process, say so, and have Linux kill it should that one be killed."""
    if TOGETHER not in os.environ:
        return
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with suppress(OSError):
        Path(os.environ[TOGETHER], f"begun-{rank()}").touch()


def leave(code: int) -> None:
    """Tell the process that started this one how it ends."""
    if TOGETHER in os.environ:
        place = Path(os.environ[TOGETHER], f"code-{rank()}")
        with suppress(OSError):
            place.with_name(f"half-{rank()}").write_text(str(code))
            place.with_name(f"half-{rank()}").rename(place)


def start(count: int, arguments: list[str]) -> int:
    """Run `distill ARGUMENTS` as `count` processes under torch's elastic agent; returns the exit code.

    When one fails the others are stopped, and the code is its; SIGTERM, SIGINT and SIGUSR1 (as SIGTERM) are passed on.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the agent's own words
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // count)))
    heard = [number.name for number in (signal.SIGINT, signal.SIGQUIT, *preemption()) if number != signal.SIGUSR1]
    options: dict[str, Any] = {"signals_to_handle": ",".join(heard)} if hasattr(LaunchConfig, "signals_to_handle") else {}
    signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        os.environ[TOGETHER] = folder
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
            codes = [int(path.read_text()) for path in Path(folder).glob("code-*")]
            begun = len(list(Path(folder).glob("begun-*")))  # the others have nothing to lose
            if len(codes) < begun and stopped.sigval != signal.SIGINT:
                print(f"error: {begun - len(codes)} of {count} processes were ended before they could stop in order", file=sys.stderr)
                return 128 + signal.SIGTERM
            return max(codes, default=130 if stopped.sigval == signal.SIGINT else 0)
        except ChildFailedError as failed:
            told = Path(folder, "distill-error")  # by which process
            if told.exists() and Path(folder, f"code-{told.read_text()}").exists():
                return int(Path(folder, f"code-{told.read_text()}").read_text())
            ends = {number: failure.exitcode for number, failure in failed.failures.items()}
            ends = {number: code for number, code in ends.items() if code != -signal.SIGTERM} or ends  # which stopped the others
            number, code = min(ends.items(), key=lambda end: (end[1] > 0, -end[1]))  # killed, else the highest: 1 may have lost another
            if code > 0:
                return code
            print(f"error: process {number} was killed by {signal.Signals(-code).name}", file=sys.stderr)
            print("hint: out of memory? The same command, or --resume, goes on from what is complete", file=sys.stderr)
            return 128 - code
        finally:
            del os.environ[TOGETHER]

"""Commands and functions in processes of their own, forked from one that has imported everything, so that each begins in no time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from distill_cli.processes import TOGETHER

PRELOADED = ("tests.contracts.preloaded",)


def work(task: Callable[[], None], variables: dict[str, str], place: str | Path, said: str) -> None:
    """What a process does in the folder `place`: the task, with its own words in `said`.out and `said`.err."""
    import torch

    os.fsync = lambda _: None  # as in this process' parent: a kill is no power cut
    os.environ.update(variables)
    os.chdir(place)
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT), number)
    task()


def command(arguments: list[str], few: bool) -> None:
    """A command line; in contracts captioned pictures are `few`."""
    from distill_cli.cli.app import main
    from tests.contracts.running import Seen, watched
    from tests.looking import little

    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # compiling it takes a minute; gloo does without
    sys.argv = ["distill", *arguments]
    with watched(Seen()) if few else little():
        main()


def told(process: multiprocessing.process.BaseProcess, name: str) -> str:
    """What a process wrote to its "out" or "err"."""
    return Path(f"{process.said}.{name}").read_text()


class Workers:
    """Starts commands, one or several processes each."""

    def __init__(self, place: Path) -> None:
        self.place, self.count = place, 0
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOADED))
        self.start(["--version"])[0].join()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]

    def start(
        self, task: list[str] | Callable[[], None], processes: int = 1, place: str | Path = ".", few: bool = True, **variables: str
    ) -> list[multiprocessing.process.BaseProcess]:
        """Start a command, or a function by its name, in the folder `place`, as `processes` like those that --num-processes starts."""
        if isinstance(task, list):
            task = partial(command, task, few)
        places: list[dict[str, str]] = [{}]
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            shared |= {TOGETHER: self.place / f"together-{self.count}"}
            shared[TOGETHER].mkdir()
            places = [{key: str(value) for key, value in {**shared, "RANK": k, "LOCAL_RANK": k}.items()} for k in range(processes)]
        out = []
        for own in places:
            self.count += 1
            said = str(self.place / f"said-{self.count}")
            process = self.context.Process(target=work, args=(task, {**own, **variables}, os.path.abspath(place), said))
            process.said = said
            process.start()
            out.append(process)
        return out

    def finish(self, task: list[str] | Callable[[], None], processes: int = 1, **variables: str) -> list[str]:
        """Run a command or a function to its end, which has to be a good one; returns the results of each process."""
        started = self.start(task, processes, **variables)
        for process in started:
            process.join(120)
        for process in started:
            assert process.exitcode == 0, told(process, "err")
        return [told(process, "out") for process in started]

    def ended(self, place: Path, *arguments: str, processes: int = 1, **variables: str) -> tuple[int, str, str]:
        """The highest exit code, results and messages of a command in the folder `place`, on all captioned pictures."""
        started = self.start([*arguments], processes, place, few=False, **variables)
        for process in started:
            process.join(240)
            assert process.exitcode is not None, told(process, "err")
        out, err = ("".join(told(process, name) for process in started) for name in ("out", "err"))
        assert "Traceback" not in err, err
        return max((process.exitcode or 0 for process in started), key=abs), out, err

    def killed(self, arguments: list[str], due: Callable[[], bool], wait: float) -> bool:
        """Start a command and kill it `wait` seconds after `due`; whether it was still there to be killed."""
        (process,) = self.start(arguments)
        until = time.monotonic() + 120
        while process.is_alive() and not due() and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(wait)
        process.kill()
        process.join()
        return process.exitcode != 0

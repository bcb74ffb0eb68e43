"""Commands in processes of their own, forked from one that has imported everything, so that each begins in no time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

PRELOADED = ("tests.contracts.preloaded",)


def work(arguments: list[str], variables: dict[str, str], said: str) -> None:
    """What a process does: the command, with its own words in the file `said`."""
    import torch

    from distill_cli.cli.app import main
    from tests.contracts.running import Seen, watched

    os.environ.update(variables)
    torch.set_num_threads(1)
    handle = open(said, "w")  # noqa: SIM115  for as long as the process is there
    for number in (1, 2):
        os.dup2(handle.fileno(), number)
    sys.argv = ["distill", *arguments]
    with watched(Seen()):
        main()


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

    def start(self, arguments: list[str], processes: int = 1) -> list[multiprocessing.process.BaseProcess]:
        """Start a command as `processes` that torchrun would have started."""
        places: list[dict[str, str]] = [{}]
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            places = [{key: str(value) for key, value in {**shared, "RANK": k, "LOCAL_RANK": k}.items()} for k in range(processes)]
        out = []
        for variables in places:
            self.count += 1
            process = self.context.Process(target=work, args=(arguments, variables, str(self.place / f"said-{self.count}")))
            process.said = self.place / f"said-{self.count}"
            process.start()
            out.append(process)
        return out

    def finish(self, arguments: list[str], processes: int = 1) -> None:
        """Run a command to its end, which has to be a good one."""
        started = self.start(arguments, processes)
        for process in started:
            process.join(120)
        for process in started:
            assert process.exitcode == 0, process.said.read_text()

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

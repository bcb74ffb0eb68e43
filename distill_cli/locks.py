"""One process at a time: a lock that the kernel releases, or, on file systems without locks, a lease that its holder renews."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distill_cli.errors import DistillError
from distill_cli.files import TEMPORARY, lives, os_errors
from distill_cli.messages import tell

NAME = f"{TEMPORARY}lock"
"""The lock file in a run's folder. A folder with nothing but temporary names counts as empty."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
RENEWED, STALE = 30.0, 300.0
"""Seconds between renewals of a lease, and the age at which it has expired."""

LEASES: set[Path] = set()
"""Leases that this process holds."""


class Lock:
    """A lock file that one process holds: by flock, or by a lease where flock is missing."""

    def __init__(self, path: Path) -> None:
        self.path, self.lease = path, path.with_name(f"{path.name}-lease")
        self.text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}) + "\n"
        self._handle: int | None = None
        self._done: threading.Event | None = None

    def take(self) -> str:
        """Take the lock; returns '', or the name of its holder if it is taken."""
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if self._is_there(handle):
                        break
                    os.close(handle)  # its holder has just ended and deleted the file
                except OSError as error:
                    os.close(handle)
                    if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                        return self._holder(self.path)
                    if error.errno not in NO_LOCKS:
                        raise
                    self.path.unlink(missing_ok=True)
                    return self._lease()
            self._handle = handle
            with suppress(OSError):  # on a full disk others cannot read who holds it
                os.ftruncate(handle, 0)
                os.pwrite(handle, self.text.encode(), 0)
            return ""

    def _is_there(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _holder(self, path: Path) -> str:
        host, process = (found := _content(path)).get("host"), found.get("process")
        known = isinstance(host, str) and host.isprintable() and isinstance(process, int)
        return f"{host}, process {process}" if known else "another process"

    def _lease(self) -> str:
        """Take the lease by making its file. An old one counts until its process is known to be dead, or it has expired."""
        while True:
            try:
                with open(self.lease, "x") as file:
                    file.write(self.text)
                break
            except FileExistsError:
                pass
            with suppress(FileNotFoundError):  # it is being released
                data, seen = _content(self.lease), self.lease.stat()
                here, process = data.get("host") == socket.gethostname(), data.get("process")
                earlier = process == os.getpid() and self.lease not in LEASES  # left by an earlier container with the same process number
                dead = here and (earlier or not lives(str(process)))
                if not dead and _now(self.lease) - seen.st_mtime < STALE:
                    return self._holder(self.lease)
                gone = self.lease.with_name(f"{self.lease.name}-{socket.gethostname()[:64]}+{os.getpid()}")
                os.rename(self.lease, gone)  # only one of several processes succeeds
                if os.path.samestat(gone.stat(), seen):
                    gone.unlink()
                else:  # another process has replaced it since: put its lease back
                    os.rename(gone, self.lease)
        LEASES.add(self.lease)
        self._done = threading.Event()
        threading.Thread(target=self._renew, args=(self._done,), daemon=True).start()
        return ""

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(RENEWED):
            found = _content(self.lease)
            if found and found != json.loads(self.text):  # this process was suspended until its lease had expired
                tell(f"{self.lease.parent} is now being trained by {self._holder(self.lease)}: stopping")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            with suppress(OSError):
                os.utime(self.lease)

    def release(self) -> None:
        """Release the lock and delete its file."""
        if self._done is not None:
            self._done.set()
            LEASES.discard(self.lease)
            if _content(self.lease) == json.loads(self.text):
                self.lease.unlink(missing_ok=True)
        if self._handle is not None:
            with suppress(OSError):
                self.path.unlink()
            os.close(self._handle)
        self._handle = self._done = None


def _content(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _now(path: Path) -> float:
    """The time by the clock of a file's disk, which may be another machine's."""
    probe = path.with_name(f"{NAME}-{socket.gethostname()[:64]}+{os.getpid()}")
    try:
        probe.write_text("")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


HELD: dict[Path, Lock] = {}
"""The runs' folders that this process holds."""


def hold(folder: Path) -> None:
    """Lock a run's folder until `release` or the end of this process; raises DistillError if another process trains in it."""
    place = folder.resolve()
    if place in HELD:
        return
    lock = Lock(folder / NAME)
    holder = lock.take()
    if holder:
        raise DistillError(f"{folder} is being trained by {holder}", "wait for its end, or stop it; distill watch shows how far it is")
    HELD[place] = lock


def release() -> None:
    """Release every lock of this process."""
    while HELD:
        HELD.popitem()[1].release()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Run the body while no other process holds `path`; waits for its turn."""
    lock = Lock(path)
    while lock.take():
        time.sleep(0.5)
    try:
        yield
    finally:
        lock.release()

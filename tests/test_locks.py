"""One process trains in a run's folder: by the kernel's lock, by a lease where a file system has none."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from distill_cli import locks
from distill_cli.errors import DistillError
from distill_cli.files import is_empty, remove_temporaries
from tests.cli.test_bad_input import one_line

TINY = ("dmd", "--teacher", "tiny", "--steps", "1", "batch_size=2", "sample_every=0", "regression_weight=0")
HOLD = (
    "import sys, time; from pathlib import Path; from distill_cli import locks;"
    "locks.hold(Path(sys.argv[1])); print(1, flush=True); time.sleep(60)"
)


@pytest.fixture(params=[None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL], ids=lambda e: errno.errorcode.get(e, "flock"))
def kind(request, monkeypatch):
    """Locks of the kernel, or a file system that answers this instead."""
    if request.param is not None:

        def refuse(*_):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    return request.param


@pytest.fixture(autouse=True)
def released():
    yield
    locks.release()


def test_one_holds_it_and_another_learns_who(kind, tmp_path):
    first = locks.Lock(tmp_path / locks.NAME)
    assert first.take() == ""
    with pytest.raises(DistillError, match=f"{tmp_path} is being trained by {socket.gethostname()}, process {os.getpid()}$"):
        locks.hold(tmp_path)
    first.release()
    assert os.listdir(tmp_path) == []
    locks.hold(tmp_path)
    locks.hold(tmp_path)  # this process has it already
    (name,) = os.listdir(tmp_path)
    assert name.startswith(locks.NAME)
    assert is_empty(tmp_path)
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == [name]
    locks.release()
    assert os.listdir(tmp_path) == []


def test_a_killed_process_holds_nothing(kind, tmp_path):
    """The kernel gives a lock back; a lease of this machine's dead process counts for nothing."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        if kind is None:
            with pytest.raises(DistillError, match=f"is being trained by {socket.gethostname()}, process {other.pid}"):
                locks.hold(tmp_path)
        other.kill()
    (tmp_path / locks.NAME).rename(tmp_path / (locks.NAME if kind is None else f"{locks.NAME}-lease"))
    locks.hold(tmp_path)
    assert locks.Lock(tmp_path / locks.NAME).take() == f"{socket.gethostname()}, process {os.getpid()}"


@pytest.mark.parametrize("kind", [errno.ENOLCK], indirect=True)
def test_a_lease_of_another_machine_is_its_until_it_is_stale(kind, tmp_path):
    lock = locks.Lock(tmp_path / locks.NAME)
    lock.lease.write_text(json.dumps({"host": "elsewhere", "process": 7, "since": 0}))
    assert lock.take() == "elsewhere, process 7"
    os.utime(lock.lease, (0, time.time() - locks.STALE - 1))
    assert lock.take() == ""
    assert os.listdir(tmp_path) == [lock.lease.name]
    lock.release()


@pytest.mark.parametrize("kind", [errno.ENOLCK], indirect=True)
def test_a_lease_is_renewed_while_its_holder_lives(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED", 0.05)
    lock = locks.Lock(tmp_path / locks.NAME)
    assert lock.take() == ""
    os.utime(lock.lease, (0, 0))
    time.sleep(0.5)
    assert time.time() - lock.lease.stat().st_mtime < 10
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("refusal", ["", "locks.fcntl.flock = lambda *_: (_ for _ in ()).throw(OSError(37, 'no locks'));"])
def test_of_many_at_once_one_gets_it(refusal, tmp_path):
    code = (
        f"import sys, time; from pathlib import Path; from distill_cli import locks; {refusal}"
        "sys.stdin.readline(); print(locks.Lock(Path('r') / locks.NAME).take(), flush=True); sys.stdin.readline()"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    others = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(5)]
    for other in others:
        other.stdin.write("\n")
        other.stdin.flush()
    got = [other.stdout.readline().strip() for other in others]
    for other in others:
        other.communicate("\n")
    assert got.count("") == 1
    assert set(got) <= {"", f"{socket.gethostname()}, process {others[got.index('')].pid}", "another process"}


@pytest.mark.parametrize("content", ["", "[1]", '{"host": "\\u001b[31mx", "process": "y"}', "\0\0", '{"host"'])
def test_what_a_holder_says_may_be_anything(content, tmp_path):
    lock, path = locks.Lock(tmp_path / locks.NAME), tmp_path / locks.NAME
    assert lock.take() == ""
    path.write_text(content)
    with pytest.raises(DistillError, match="is being trained by another process"):
        locks.hold(tmp_path)
    lock.release()


def test_a_file_that_its_holder_took_away_is_not_locked(tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder ends: the lock of a file without a name would keep nobody out."""
    path = tmp_path / locks.NAME
    original, calls = locks.fcntl.flock, []

    def late(handle, how):
        if not calls:
            path.unlink()
        calls.append(how)
        original(handle, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    assert locks.Lock(path).take() == ""
    assert len(calls) == 2
    assert path.exists()


def test_in_turn(tmp_path):
    seen = []

    def work(k):
        with locks.alone(tmp_path / "lock"):
            seen.append(k)
            time.sleep(0.02)
            seen.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[::2] == seen[1::2]


def test_a_live_run_is_left_alone(distill, tmp_path):
    """Begun anew, resumed, and resumed when it is finished: nothing in its folder is touched; what only looks at it looks."""
    assert distill(*TINY, "--out", "r").code == 0
    assert not (tmp_path / "r" / locks.NAME).exists()
    lock = locks.Lock(tmp_path / "r" / locks.NAME)
    assert lock.take() == ""
    (tmp_path / "r/.tmp-x+1-half").write_text("")  # of another machine, forgotten: who resumes would delete it
    os.utime(tmp_path / "r/.tmp-x+1-half", (0, 0))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}
    says = f"r is being trained by {socket.gethostname()}, process {os.getpid()}"
    one_line(distill(*TINY, "--out", "r"), 1, says)
    one_line(distill("dmd", "--resume", "r"), 1, says)
    one_line(distill("dmd", "--resume", "r", "--steps", 2), 1, says)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")} == before
    assert distill("dmd", "--resume", "r", "--dry-run").code == 0
    assert distill("models", "show", "r").code == 0
    assert distill("watch", "r").code == 0
    lock.release()
    assert distill("dmd", "--resume", "r", "--steps", 2).code == 0
    assert not locks.HELD


def test_begun_at_the_same_time(distill, tmp_path, monkeypatch):
    """Another begins the run while this one loads its model."""
    from distill_cli.methods.dmd import objective as dmd

    original, lock = dmd.DMD.__init__, locks.Lock(tmp_path / "r" / locks.NAME)

    def slow(self, *arguments):
        lock.take()
        original(self, *arguments)

    monkeypatch.setattr(dmd.DMD, "__init__", slow)
    result = distill(*TINY, "--out", "r")
    assert result.code == 1
    assert "error: r is being trained by" in result.err
    assert os.listdir(tmp_path / "r") == [locks.NAME]
    lock.release()

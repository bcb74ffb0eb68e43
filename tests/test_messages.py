"""Nobody can hear a run: full disks, gone readers, dead terminals, closed descriptors. Work goes on; results that are lost are said."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from distill_cli import launch, messages, processes

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["network.channels=[8,16]", "network.attention=[false,false]", "network.groups=4", "network.head=8", "sample_every=0"]


def shell(line, folder, **options):
    """A command line of bash in which DISTILL is the program; it fails where any part of a pipe fails."""
    program = f"{sys.executable} -m distill_cli"
    command = ["bash", "-c", f"set -o pipefail; {line.replace('DISTILL', program)}"]
    return subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=120, **options)


@FULL
@pytest.mark.parametrize("command", ["recipes ls", "recipes show digits-dmd", "--help", "--version"])
def test_a_result_that_cannot_be_written_is_said_and_is_1(command, tmp_path):
    done = shell(f"DISTILL {command} > /dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: standard output: no space left on device", "hint: what the command made is complete"]
    assert shell(f"DISTILL {command} > /dev/full 2> /dev/full", tmp_path).returncode == 1


def test_a_reader_who_has_gone_wanted_no_more(tmp_path):
    done = shell("DISTILL recipes show digits-dmd | true", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = shell("DISTILL recipes show digits-dmd | head -1", tmp_path)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


@pytest.mark.parametrize("how", ["2>&-", "2> /dev/full", "2>&1 | true", "<&- 2>&-"])
def test_an_error_that_nobody_hears_keeps_its_code_and_is_no_result(how, tmp_path):
    done = shell(f"DISTILL recipes show nonsense {how}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("how", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_those_of_no_file(how, tmp_path):
    """A file that were given number 1 or 2 would get the messages, or the signal handler's line, into its data."""
    code = (
        "import os, sys; from distill_cli import messages; messages.guard();"
        "file = open(sys.argv[1], 'w'); assert file.fileno() > 2, file.fileno();"
        "print('result'); print('message', file=sys.stderr); messages.tell('stopping'); sys.stderr.isatty(); sys.stdout.flush();"
        "os.write(2, b'x'); file.write('whole'); assert messages.lost() is None"
    )
    done = shell(f"{sys.executable} -c {shlex.quote(code)} data {how}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data").read_text() == "whole"


@FULL
def test_whatever_writes_to_stderr_never_fails(tmp_path):
    """print, writelines, flush, the bytes below, logging, warnings, tqdm, and names that the encoding lacks."""
    code = """if True:
        import logging, os, sys, warnings
        from distill_cli import messages
        messages.guard()
        from tqdm import tqdm
        print("x" * 100_000, file=sys.stderr)
        sys.stderr.writelines(["a", "b\\n"])
        sys.stderr.buffer.write(b"bytes")
        sys.stderr.buffer.flush()
        sys.stderr.flush()
        logging.warning("logged")
        warnings.warn("warned")
        for _ in tqdm(range(3), file=sys.stderr, mininterval=0):
            pass
        messages.tell("handled")
        print("\\udcff \\u732b")
        assert messages.lost() is None
    """
    with open("/dev/full", "w") as full:
        env = {**ENV, "PYTHONIOENCODING": "ascii"}
        out = subprocess.run([sys.executable, "-c", code], stderr=full, stdout=subprocess.PIPE, env=env)
    assert out.returncode == 0
    assert out.stdout == b"\\udcff \\u732b\n"


def test_a_terminal_that_is_gone_is_no_error():
    code = (
        "import sys, time; from distill_cli import messages; messages.guard();"
        "assert sys.stderr.isatty(); input(); print('m', file=sys.stderr)"
    )
    main, side = os.openpty()
    run = subprocess.Popen([sys.executable, "-c", code], stderr=side, stdin=subprocess.PIPE)
    os.close(side)
    time.sleep(0.5)
    os.close(main)  # writes to the other end are EIO from now
    run.communicate(b"\n", timeout=60)
    assert run.returncode == 0


def test_a_pipe_that_does_not_block_gets_the_whole_result():
    code = (
        "import os; from distill_cli import messages; messages.guard(); os.set_blocking(1, False);"
        "print('x' * 300_000); assert messages.lost() is None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, len(done.stdout)) == (0, 300_001), done.stderr


@FULL
def test_a_signal_whose_line_cannot_be_written_is_heard():
    kept = os.dup(2)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with launch.stoppable() as stop:
            os.dup2(full, 2)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested == signal.SIGTERM
    finally:
        os.dup2(kept, 2)
        os.close(full)
        os.close(kept)


def test_a_terminal_that_goes_preempts_unless_nohup_said_no():
    with launch.stoppable() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.interrupted(stop.requested, "", "").exit_code == 0
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in processes.preemption()
        with launch.stoppable() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, old)


def test_inside_a_stoppable_body_another_is_the_same():
    """Embeddings are made inside the training loop: a signal that came before they began stops them too."""
    with launch.stoppable() as outer:
        with launch.stoppable() as inner:
            assert inner is outer
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.requested == signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_preemption_before_the_first_step_ends_at_once(name, tmp_path):
    code = f"""if True:
        import os, signal, sys
        from distill_cli.cli import app, common
        begin = common.start_processes
        def preempted(*given):
            begin(*given)
            os.kill(os.getpid(), signal.{name})
            print("went on")
        common.start_processes = preempted
        sys.argv = ["distill", "train", "--out", "r"]
        app.main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"stopped by {name}\nhint: the same command, or --resume, goes on from what is complete\n"


def test_a_command_that_does_not_go_on_is_killed_as_ever(tmp_path):
    code = "import os, signal; from distill_cli.cli import app; app.run = lambda: os.kill(os.getpid(), signal.SIGTERM); app.main()"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == -signal.SIGTERM


def test_a_tracker_that_fails_ends_nothing(distill, tmp_path, monkeypatch):
    from accelerate import Accelerator

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("init_trackers", "log", "end_training"):
        monkeypatch.setattr(Accelerator, name, full)
    result = distill("train", "--steps", 3, "batch_size=2", "log_every=1", "tracker=tensorboard", *SMALL, "--out", "r")
    assert result.code == 0, result.err
    assert result.err.count("warning: tensorboard: ") == 1
    assert len((tmp_path / "r/metrics.jsonl").read_text().splitlines()) == 3


@FULL
@pytest.mark.slow
def test_sigterm_with_a_dead_stderr_writes_its_checkpoint(tmp_path):
    command = [sys.executable, "-m", "distill_cli", "train", "--steps", "9999", "batch_size=2", "log_every=1", "save_every=9999", *SMALL]
    with open("/dev/full", "w") as full:
        run = subprocess.Popen([*command, "--out", "r"], cwd=tmp_path, env=ENV, stdout=full, stderr=full)
    metrics = tmp_path / "r/metrics.jsonl"
    deadline = time.monotonic() + 120
    while run.poll() is None and not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 0
    (saved,) = (tmp_path / "r/checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) == json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert not (tmp_path / "r/.tmp-lock").exists()


def test_an_error_that_cannot_be_claimed_is_said(monkeypatch, tmp_path):
    """The temporary folder in which processes of a Slurm step agree on who says it is full, or not there."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "gone"))
    assert processes.first_to("error")
    monkeypatch.setenv(processes.TOGETHER, str(tmp_path / "gone"))
    processes.leave(0)
    assert messages.lost() is None

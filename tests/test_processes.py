"""Several processes: shares of the work, what starts them, and how they end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file

from distill_cli import processes
from distill_cli.config import PairsConfig, SampleConfig
from distill_cli.data.prompts import open_prompts
from distill_cli.errors import UsageError
from distill_cli.models import load
from distill_cli.pairs.generate import generate
from distill_cli.pairs.store import merge
from distill_cli.sample.batch import sample

PAIRS = ("pairs", "--teacher", "tiny", "--num", "20", "--steps", "2", "shard_size=4")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
NODE = {"SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[03-07,09]-ib,x1", "SLURM_STEP_NUM_TASKS": "7"}


def distill(folder, *arguments):
    """A command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "distill_cli", *arguments],
        cwd=folder, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process):
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def hashes(folder):
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_every_unit_falls_to_one_process(monkeypatch):
    seen = []
    for part in range(3):
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "2")
            seen += processes.mine(20, (part, 3))
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("text", ["3/3", "1", "/2", "-1/2", "a/b", "0/0"])
def test_parts_that_are_none(text):
    with pytest.raises(UsageError, match=f"--shards {text}"):
        processes.parse_part(text)
    assert processes.parse_part("2/3") == (2, 3)


def test_slurm_says_what_torchrun_would():
    env = {**NODE, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),3"}
    processes.adopt_slurm(env)
    got = {key: env[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert got == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu03-ib"}
    other = {**NODE, "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "7"}
    processes.adopt_slurm(other)
    assert env["MASTER_PORT"] == other["MASTER_PORT"]
    assert 15000 <= int(env["MASTER_PORT"]) < 30000
    bound = {**NODE, "SLURM_PROCID": "6", "SLURM_LOCALID": "6", "SLURM_STEP_TASKS_PER_NODE": "7", "CUDA_VISIBLE_DEVICES": "6"}
    processes.adopt_slurm(bound)
    assert bound["LOCAL_RANK"] == "0"  # it sees one GPU alone


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a batch script outside srun
        {**NODE, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # one task, which starts torchrun
        {**NODE, "SLURM_PROCID": "0", "RANK": "3", "WORLD_SIZE": "4"},  # torchrun inside srun
    ],
)
def test_slurm_is_left_alone(env):
    before = dict(env)
    processes.adopt_slurm(env)
    assert env == before


@pytest.mark.parametrize(
    ("hosts", "first"), [("node7", "node7"), ("a1,b2", "a1"), ("n[1-4]", "n1"), ("r-2-gpu[017,020-031]", "r-2-gpu017")]
)
def test_first_host(hosts, first):
    assert processes.first_host(hosts) == first


def test_under_srun_one_task_of_a_machine_speaks(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for key, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(sys, "argv", ["distill", "pairs"])
    assert [processes.first_to("error") for _ in range(3)] == [True, False, False]
    assert processes.first_to("result")
    monkeypatch.setattr(sys, "argv", ["distill", "sample"])  # the next command of the step
    assert processes.first_to("result")
    assert not processes.supervised()


@pytest.mark.parametrize(
    ("given", "wanted"), [({}, "2"), ({"SLURM_CPUS_PER_TASK": "7"}, "7"), ({"OMP_NUM_THREADS": "3", "SLURM_CPUS_PER_TASK": "7"}, "3")]
)
def test_cores_are_divided(given, wanted, monkeypatch):
    monkeypatch.setattr(processes, "usable_cpus", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    for key in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    processes.share_cores()
    assert os.environ.pop("OMP_NUM_THREADS") == wanted


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "files"), [("tiny", 6), ("tiny-sd", 9)])
def test_pairs_do_not_depend_on_who_makes_them(tmp_path, teacher, files, one_thread, workers):
    """One, two and three processes, three array parts in one folder and in three: equal byte for byte at one thread each."""
    config = PairsConfig(teacher=teacher, num=20, steps=2, shard_size=4)
    tiny = load(teacher)
    if tiny.text is not None:
        tiny = tiny.with_prompts(open_prompts("shapes"))
    assert generate(config, tiny.copy(), tmp_path / "one") == {"made": 5, "kept": 0, "missing": 0, "left": 0}
    for part, missing in ((2, 4), (0, 2), (1, 0)):  # shards 2; 0 and 3; 1 and 4
        assert generate(config, tiny.copy(), tmp_path / "parts", (part, 3))["missing"] == missing
        generate(config, tiny.copy(), tmp_path / f"part-{part}", (part, 3))
    assert merge([tmp_path / f"part-{k}" for k in (1, 0, 2)], tmp_path / "merged") == {"shards": 5, "of": 5, "copied": 5}
    for count in (2, 3):
        arguments = [teacher if word == "tiny" else word for word in PAIRS]
        if (teacher, count) == ("tiny", 2):
            code, out, err = ended(distill(tmp_path, *arguments, "--num-processes", str(count), "--out", str(count), "--json"))
        else:  # as torchrun would start them
            code, out, err = workers.ended(tmp_path, *arguments, "--out", str(count), "--json", processes=count)
        assert code == 0, err
        assert json.loads(out)["missing"] == 0  # said once, by the last
    whole = hashes(tmp_path / "one")
    assert len(whole) == files  # with text also the prompts, their embeddings and the null one
    assert all(hashes(tmp_path / name) == whole for name in ("2", "3", "parts", "merged"))


@pytest.mark.slow
def test_samples_do_not_depend_on_who_makes_them(tmp_path, tiny, one_thread, workers):
    config = SampleConfig(model="tiny", steps=2, num=18, batch_size=4)
    sample(config, tiny.copy(), tmp_path / "one")
    for part in (1, 0):
        sample(config, tiny.copy(), tmp_path / "parts", (part, 2))
    command = ("sample", "--model", "tiny", "--steps", "2", "--num", "18", "--batch-size", "4")
    code, out, err = workers.ended(tmp_path, *command, "--out", "two", processes=2)
    assert code == 0, err
    assert out == "samples: 18 in two\n"
    whole = hashes(tmp_path / "one")
    assert len(whole) == 20
    assert hashes(tmp_path / "two") == hashes(tmp_path / "parts") == whole


def test_parts_of_other_jobs_are_not_merged(tmp_path, tiny):
    for seed in (0, 1):
        generate(PairsConfig(teacher="tiny", num=2, steps=2, seed=seed), tiny.copy(), tmp_path / str(seed))
    with pytest.raises(UsageError, match="pairs of another job"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_evaluation_shared_by_two_processes_is_the_same(tmp_path, workers):
    command = ("evaluate", "--model", "digits@2", "--num", "200", "--json")
    reports = []
    for count in (1, 2):
        code, out, err = workers.ended(tmp_path, *command, "--out", f"e{count}", processes=count)
        assert code == 0, err
        reports.append(json.loads(out))
        assert (tmp_path / f"e{count}" / "picture.png").is_file()
    for row, other in zip(*(report["rows"] for report in reports), strict=True):
        assert {**row, "images_per_second": 0} == {**other, "images_per_second": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["batch_size=4", "lr=1e30", "clip_norm=1e30", "log_every=2"], 1, "error: student_loss is not a number at step"),
        (["batch_size=3"], 2, "error: batch_size 3: cannot be shared evenly by 2 processes"),
    ],
)
def test_an_error_of_two_processes_is_said_once(options, code, says, tmp_path, workers):
    """Of training, under the launcher; of what is found before, as the launcher would have started them."""
    command = ("dmd", "--teacher", "tiny", "--steps", "50", *options, "--out", "r")
    if code == 1:
        found, out, err = ended(distill(tmp_path, *command, "--num-processes", "2"))
    else:
        found, out, err = workers.ended(tmp_path, *command, processes=2)
    assert (found, out) == (code, "")
    assert err.count("error: ") == 1
    assert says in err


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "one"])
def test_two_processes_end_together(whom, tmp_path):
    """SIGTERM at the launcher: both stop after the same step, with a checkpoint. SIGKILL at one: the other does not wait for it."""
    process = distill(
        tmp_path, "dmd", "--teacher", "tiny", "--num-processes", "2", "--steps", "9999", "batch_size=2", "log_every=1", "--out", "r"
    )
    metrics = tmp_path / "r/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]
    assert len(children) == 2
    if whom == "launcher":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(children[1], signal.SIGKILL)
    code, out, err = ended(process)
    if whom == "launcher":
        assert (code, out) == (0, "")
        assert "hint: resume with --resume r" in err
        (saved,) = (tmp_path / "r/checkpoints").iterdir()
        assert int(saved.name.removeprefix("step-")) == len(metrics.read_text().splitlines())
    else:
        assert code == 128 + signal.SIGKILL
        assert err.count("error: ") == 1
        assert "error: process 1 was killed by SIGKILL" in err
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


DIGITS = ("dmd", "--teacher", "digits", "--steps", "12", "batch_size=4", "log_every=1", "sample_every=0", "save_every=12", "warmup_steps=5")


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: torch.tensor([line[name] for line in lines]) for name in ("student_loss", "fake_loss", "matching_loss")}


@pytest.mark.slow
def test_two_processes_and_two_nodes_follow_the_run_of_one(tmp_path, workers):
    """DMD on digits, the same global batch: 12 losses within 1e-4; the checkpoint of two processes goes on in one."""
    assert workers.ended(tmp_path, *DIGITS, "--out", "one")[0] == 0
    code, _, err = workers.ended(tmp_path, *DIGITS, "--out", "two", processes=2)
    assert code == 0, err
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    command = [*launcher, "-m", "distill_cli", *DIGITS, "--out", "nodes"]
    nodes = [subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for node in nodes:
        _, err = node.communicate(timeout=240)
        assert node.returncode == 0, err
    one = losses(tmp_path / "one")
    for other in (losses(tmp_path / "two"), losses(tmp_path / "nodes")):
        for name, values in one.items():
            assert len(values) == len(other[name]) == 12
            assert ((values - other[name]).abs() <= 1e-4 * values.abs()).all(), name
    code, _, err = workers.ended(tmp_path, "dmd", "--resume", "two", "--steps", "14")
    assert code == 0, err
    assert [path.name for path in sorted((tmp_path / "two/checkpoints").iterdir())] == ["step-000012", "step-000014"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "by"), [("dmd", "fsdp"), ("cm", "fsdp"), ("cm", "zero")])
def test_spread_networks_are_the_same_training(method, by, tmp_path, workers):
    """By FSDP, or moments by DeepSpeed's ZeRO, over two processes (gloo, CPU): one process's weights; a checkpoint resumes in one.

    dmd trains two LoRAs on one base.
    """
    if by == "zero":
        pytest.importorskip("deepspeed")
    options = ("--steps", "4", "--lr", "1e-3", "batch_size=8", "accumulate=2", "log_every=1", "save_every=2", "sample_every=0")
    options += ("ema_halflife=20", "warmup_steps=0", "optimizer=adamw", "weight_decay=0")
    more = {"cm": ("--data", "digits"), "dmd": ("--lora", "4", "health_every=4")}
    command = (method, "--teacher", "tiny", *more[method], *options)
    assert workers.ended(tmp_path, *command, "--out", "one")[0] == 0
    settings = {
        "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        "zero": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    }
    code, _, err = workers.ended(tmp_path, *command, "--out", "spread", processes=2, **settings[by])
    assert code == 0, err
    checkpoint = "checkpoints/step-000004"
    names = {path.name for path in (tmp_path / "one" / checkpoint).iterdir()}
    assert names == {path.name for path in (tmp_path / "spread" / checkpoint).iterdir()}
    if method == "dmd":  # the average is one process's, whole, and so are the pictures
        one, other = (json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("one", "spread"))
        looked = {key: value for key, value in one.items() if key.startswith("health_")}
        assert len(looked) >= 6
        assert {key: other[key] for key in looked} == pytest.approx(looked, rel=1e-3)
        pictures = [(tmp_path / run / "teacher-pictures.safetensors").read_bytes() for run in ("one", "spread")]
        assert pictures[0] == pictures[1]
    start = load("tiny").denoiser.state_dict()
    for name in names - {"state.json", "optimizers.pt"}:
        one, other = (load_file(tmp_path / run / checkpoint / name) for run in ("one", "spread"))
        moved = torch.cat([(one[key] - start.get(key, 0)).flatten() for key in one if ".lora_A." not in key])  # B begins at 0
        apart = torch.cat([(one[key] - other[key]).flatten() for key in one])
        assert moved.abs().max() > 1e-4
        assert apart.norm() < 1e-2 * moved.norm(), name  # Adam takes rounding for signs where gradients vanish
    moments = [
        torch.load(tmp_path / run / checkpoint / "optimizers.pt", weights_only=True)["student"]["state"] for run in ("one", "spread")
    ]
    for index, one in moments[0].items():
        assert (one["exp_avg"] - moments[1][index]["exp_avg"]).norm() <= 1e-3 * one["exp_avg"].norm() + 1e-9
    assert load(str(tmp_path / "spread/student")).lineage.method == ("dmd" if method == "dmd" else "cd")
    if by == "zero":
        third = {**settings[by], "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
        code, _, err = workers.ended(tmp_path, *command, "--out", "r", processes=2, **third)
        assert code == 2, err
        assert "ZeRO stage 3" in err  # so what was compared above was DeepSpeed's
        # its flat shares of the moments are put together and taken apart again without a bit's loss
        kept = [path for path in (tmp_path / "spread").rglob("*") if path.suffix in (".safetensors", ".pt") or path.name == "metrics.jsonl"]
        files = {path: path.read_bytes() for path in kept}
        for gone in (checkpoint, "student"):
            shutil.rmtree(tmp_path / "spread" / gone)
        code, _, err = workers.ended(tmp_path, method, "--resume", "spread", processes=2, **settings[by])
        assert code == 0, err
        assert all(path.read_bytes() == content for path, content in files.items())
    code, _, err = workers.ended(tmp_path, method, "--resume", "spread", "--steps", "5")
    assert code == 0, err

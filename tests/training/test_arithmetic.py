"""What the networks compute in: float32 that is float32, TF32 where it is asked for, FSDP as GPUs have it, the same bits every time."""

import json
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from distill_cli import launch
from distill_cli.data import open_images
from distill_cli.errors import UsageError
from distill_cli.methods.cm.objective import rounds
from distill_cli.methods.train.config import TrainConfig
from distill_cli.methods.train.denoising import Denoising
from distill_cli.models.backbones import Backbone
from distill_cli.recipes import dump
from distill_cli.runs import Run
from distill_cli.training.engine import Engine
from distill_cli.training.zero import honour_fsdp
from tests.contracts.running import call
from tests.options import consistency, options
from tests.training import fsdp_times

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def as_before():
    yield
    launch.repeatable(torch.device("cpu"), False)
    launch.arithmetic("no")


def flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()


def test_float32_is_float32_from_the_first_moment_on():
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    launch.device("cpu")
    assert flags() == (False, False, "highest")


def test_each_precision_sets_what_a_gpu_multiplies_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    seen = {}
    for precision in ("no", "tf32", "bf16", "fp16"):
        with launch.autocast(GPU, precision):
            half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
            seen[precision] = (half, *flags()[:2])
        assert flags()[:2] == seen[precision][1:]  # the gradient is taken outside
    assert seen == {
        "no": (None, False, False),
        "tf32": (None, True, True),
        "bf16": (torch.bfloat16, True, False),
        "fp16": (torch.float16, True, False),
    }
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(UsageError, match="precision tf32: this GPU has none"):
        launch.autocast(GPU, "tf32")


def test_a_cpu_has_no_tf32():
    with pytest.raises(UsageError, match="precision tf32: needs a GPU"):
        launch.autocast(torch.device("cpu"), "tf32")


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        (dict(method="ict"), True),
        (dict(method="ect"), True),
        (dict(method="ct", scales_end=150), True),
        (dict(method="cd", scales=120), True),
        (dict(method="cd", scales=100), False),
        (dict(method="ct", scales_end=100), False),
        (dict(method="ict", scales_end=80), False),
    ],
)
def test_bf16_is_warned_of_where_neighbouring_times_are_too_near(changes, warned, tiny, capsys):
    config = options("cm", teacher="tiny", data="digits", device="cpu", precision="bf16", **changes)
    assert rounds(config) == warned
    consistency(config, tiny.copy(), open_images("digits"))
    assert ("warning: precision bf16: times come so near" in capsys.readouterr().err) == warned
    assert not any(rounds(config.model_copy(update={"precision": other})) for other in ("no", "tf32", "fp16"))


def test_a_run_says_what_it_computes_in(tmp_path):
    config = TrainConfig(device="cpu", batch_size=4, precision="bf16", network=dict(channels=[8], attention=[False], groups=4, head=8))
    AcceleratorState._reset_state(True)
    engine = Engine(config, Denoising(config, open_images("digits")))
    assert engine.accelerator.mixed_precision == "no"  # the engine's own autocast is the only one
    engine.open(Run.create(tmp_path / "run", dump(config), "train"))
    env = json.loads((tmp_path / "run/env.json").read_text())
    assert env["arithmetic"] == {"precision": "bf16", "tf32_convolutions": True, "tf32_products": False, "deterministic": False}
    assert env["device"] == "cpu"
    assert torch.__version__.startswith(env["versions"]["torch"])


def test_the_same_bits_are_asked_of_gpus_alone(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    launch.repeatable(torch.device("cpu"), True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    launch.repeatable(GPU, True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    launch.repeatable(GPU, False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_an_operation_without_a_deterministic_kernel_is_named():
    torch.use_deterministic_algorithms(True)
    with pytest.raises(UsageError, match="deterministic: put_ has no kernel"), launch.naming_the_undetermined():
        raise RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'.")
    with pytest.raises(RuntimeError, match="another"), launch.naming_the_undetermined():
        raise RuntimeError("another")


def test_fp16_is_refused_under_fsdp():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, mixed_precision="fp16", state=state)
    with pytest.raises(UsageError, match="fp16: not with FSDP"):
        honour_fsdp(accelerator)


@pytest.mark.slow
def test_under_fsdp_networks_get_their_times_unrounded(workers):
    """With the plugin that GPUs get (honour_fsdp): a student of one step is asked at 999, which bf16 would make 1000."""
    said = workers.finish(partial(fsdp_times.main, "cpu"), 2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    lines = [line for each in said for line in each.splitlines() if line.startswith("SEEN")]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("SEEN FSDP"), line
        assert "('torch.float32', 999.0)" in line
        assert "1000.0" not in line
        assert line.endswith("['torch.float32']")


@pytest.mark.parametrize(
    "command",
    [
        ("dmd", "--teacher", "tiny-sd", "--prompts", "shapes", "--guidance-scale", "3"),
        ("dmd2", "--teacher", "tiny-sd", "--prompts", "shapes", "--guidance-scale", "3"),
        ("cm", "--method", "lcm", "--teacher", "tiny-sd", "--data", "shapes"),
        ("cm", "--teacher", "tiny", "--data", "digits"),
    ],
    ids=["dmd", "dmd2", "lcm", "cd"],
)
def test_a_frozen_teacher_is_stored_in_half_precision_and_gives_the_same_bits(command, tmp_path, monkeypatch):
    """Weights after 3 steps in bf16, with the teacher's matrices stored so once and cast at each call."""
    made, cast, stored = {}, Backbone.cast, []

    def seen(self, dtype):
        cast(self, dtype)
        stored.append(sum(p.dtype == torch.bfloat16 for p in self.parameters()))

    for name, method in (("stored", seen), ("cast", lambda self, dtype: None)):
        monkeypatch.setattr(Backbone, "cast", method)
        out = tmp_path / name
        call([*command, "--batch-size", "4", "--steps", "3", "precision=bf16", "sample_every=0", "health_every=0", "--device", "cpu",
              "--out", str(out)]).check()  # fmt: skip
        made[name] = load_file(next(out.glob("checkpoints/step-000003/student.safetensors")))
    assert len(stored) == 1
    assert stored[0] > 10
    assert all(torch.equal(value, made["cast"][key]) for key, value in made["stored"].items())

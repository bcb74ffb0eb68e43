"""Hostile files: nothing in them runs, and they take no memory and no time."""

import io
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

from distill_cli.errors import DistillError
from distill_cli.models.sources.convert import open_file
from tests.models import published
from tests.models.published import Persistent, dump, write_nvlabs
from tests.models.test_convert import SMALL, random_tensors


class Reduce:
    def __init__(self, *value):
        self.value = value

    def __reduce__(self):
        return self.value


def hostile(kind, marker):
    command = f"touch {marker}"
    if kind == "reduce":
        return {"ema": Reduce(os.system, (command,))}
    if kind == "eval":
        return {"ema": Reduce(eval, (f"__import__('os').system('{command}')",))}
    if kind == "nested":  # a pickle inside the bytes of a storage, which torch's own loader of storages would run
        return {"ema": Reduce(torch.storage._load_from_bytes, (pickle.dumps(Reduce(os.system, (command,))),))}
    if kind == "getattr":
        return {"ema": Reduce(getattr, ("x", "upper"))}
    buffer = io.BytesIO()
    torch.save(Reduce(os.system, (command,)), buffer, _use_new_zipfile_serialization=False)
    return {"ema": Reduce(torch.storage._load_from_bytes, (buffer.getvalue(),))}


@pytest.mark.parametrize("kind", ["reduce", "eval", "nested", "getattr", "legacy"])
def test_hostile_pickles_run_nothing(kind, tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(hostile(kind, marker), protocol=4))
    with pytest.raises(DistillError) as error:
        open_file(tmp_path / "x.pkl")
    assert "nothing in it was run" in error.value.hint
    assert "\n" not in error.value.message
    assert not marker.exists()


def test_module_source_is_never_executed(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.setattr(Persistent, "source", f"open({str(marker)!r}, 'w')")
    assert open_file(write_nvlabs(random_tensors(SMALL), SMALL, tmp_path / "x.pkl")).architecture == "DDPM++"
    assert not marker.exists()


def test_hostile_torch_files_run_nothing(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"input_blocks.0.0.weight": Reduce(os.system, (f"touch {marker}",))}, tmp_path / "edm_x.pt")
    with pytest.raises(DistillError, match="edm_x.pt: not read"):
        open_file(tmp_path / "edm_x.pt")
    assert not marker.exists()


def legacy_storage(numbers):
    """torch.save's legacy bytes of a storage of 4 floats that claims to have `numbers`."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(4).storage(), buffer, _use_new_zipfile_serialization=False)
    honest, lying = b"K\x04N", b"J" + struct.pack("<i", numbers) + b"N"
    assert buffer.getvalue().count(honest) == 1
    return buffer.getvalue().replace(honest, lying)


def shared_records(levels):
    """Modules of which each holds the next one twice."""
    record = Persistent("Linear", published.module([("weight", torch.zeros(1))]))
    for _ in range(levels):
        record = Persistent("Linear", published.module(modules=[("a", record), ("b", record)]))
    return record


def pickled(data):
    with tempfile.TemporaryDirectory() as folder:
        return dump(data, Path(folder) / "x").read_bytes()


def arguments(**changes):
    return pickled({"ema": Persistent("EDMPrecond", published.module(_init_kwargs=published.EasyDict(SMALL | changes)))})


def bombs():
    beyond = (torch.zeros(4).storage(), 0, (1 << 20, 1 << 20), (1, 1), False, {})
    return {
        "bytes of a terabyte": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        "a frame of a terabyte": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"x.",
        "a memo of 500 million places": b"\x80\x04Nr" + struct.pack("<I", 500_000_000) + b".",
        "a storage that claims more than it has": pickle.dumps({"ema": Reduce(torch.storage._load_from_bytes, (legacy_storage(1 << 30),))}),
        "a tensor beyond its storage": pickle.dumps({"ema": Reduce(torch._utils._rebuild_tensor_v2, beyond)}),
        "a tensor spread out": pickle.dumps({"ema": Reduce(torch._utils._rebuild_tensor_v2, (*beyond[:3], (0, 0), False, {}))}),
        "a storage that is an array": pickle.dumps({"ema": Reduce(torch.storage._load_from_bytes, (pickle.dumps(bytearray(100), 2),))}),
        "a tuple of tuples as a key": b"\x80\x04}N" + b"\x85" * 3_000_000 + b"Ns.",
        "numbers that collide as keys": pickle.dumps({k * (2**61 - 1): None for k in range(20_000)}),
        "attributes of a class": b"\x80\x04cdnnlib.util\nEasyDict\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
        "modules in modules": pickled({"ema": shared_records(60)}),
        "a wide network": arguments(model_channels=1 << 24),
        "a million classes": arguments(label_dim=1 << 40),
        "a long network": arguments(num_blocks=1 << 40),
        "an infinite picture": arguments(img_resolution=float("inf")),
        "nothing": b"",
        "no pickle": b"not a pickle",
    }


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_bombs_and_fragments_are_refused_and_take_no_memory(tmp_path):
    for name, content in bombs().items():
        (tmp_path / f"{name}.pkl").write_bytes(content)
    code = (
        "import resource, sys; from pathlib import Path; from distill_cli.errors import DistillError;"
        "from distill_cli.models.sources import convert;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.pkl')):\n"
        "    before = peak()\n"
        "    try: convert.open_file(path); print('read', path)\n"
        "    except DistillError as error: assert peak() - before < 300, path\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_zip_bombs_and_spread_tensors_are_refused(tmp_path):
    """OpenAI's format: compressed members, an array of zeros, and a tensor of a million rows that are one."""
    with zipfile.ZipFile(tmp_path / "edm_zip.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"0" * 50_000_000)
    with zipfile.ZipFile(tmp_path / "edm_array.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R.")
    torch.save({"input_blocks.0.0.weight": torch.zeros(1, 9).expand(1 << 20, 9)}, tmp_path / "edm_spread.pt")
    for name, says in (
        ("zip", "larger than the file"),
        ("array", "__builtin__.bytearray, which is not allowed"),
        ("spread", "larger than|more numbers"),
    ):
        with pytest.raises(DistillError, match=says):
            open_file(tmp_path / f"edm_{name}.pt")


def test_text_from_a_file_is_printed_as_text(tmp_path):
    with pytest.raises(DistillError) as error:
        open_file(dump({"ema": Persistent("Evil\x1b[1m\nname", {})}, tmp_path / "x.pkl"))
    assert "Evil\\x1b[1m name" in error.value.message

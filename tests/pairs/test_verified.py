"""A store is verified once: what was verified stands beside it, and only what has changed is read again."""

import json
import os
import shutil

import pytest
import torch

from distill_cli import shards, verified
from distill_cli.config import PairsConfig
from distill_cli.data.prompts import open_prompts
from distill_cli.errors import DistillError
from distill_cli.files import unsealed
from distill_cli.models import load
from distill_cli.models.embeddings import Embeddings
from distill_cli.pairs.generate import generate
from distill_cli.pairs.store import PairStore, check_all, read_manifest, shard_path
from tests.cli.test_bad_input import DMD, one_line

SETTINGS = dict(teacher="tiny", num=12, shard_size=5, batch_size=4, steps=3)


@pytest.fixture
def store(tiny_pairs, tmp_path):
    return shutil.copytree(tiny_pairs, tmp_path / "store", ignore=shutil.ignore_patterns("verified-*"))  # other tests use it too


@pytest.fixture
def read(monkeypatch):
    """The files whose checksums were computed, and how often noise was drawn anew."""
    from distill_cli.pairs import store as module

    seen = []
    check, noise = shards.check, module.noise_checksum

    def counted(path, again, whole=True):
        if whole:
            seen.append(path.name)
        return check(path, again, whole)

    def drawn(values):
        seen.append("noise")
        return noise(values)

    monkeypatch.setattr(shards, "check", counted)
    monkeypatch.setattr(module, "noise_checksum", drawn)
    return seen


def shard(k):
    return f"shard-{k:06d}.safetensors"


def spoil(path, at=-100):
    """Flip a bit, as a bad disk does: neither size nor time changes."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_store_is_verified_once(store, read):
    PairStore(store).verify()
    assert sorted(read) == ["noise", *map(shard, range(3))]
    remembered = unsealed((store / "verified-0.json").read_bytes())["files"]
    found = shard_path(store, 1).stat()
    assert remembered[shard(1)][:2] == [found.st_size, found.st_mtime_ns]
    read.clear()
    again = PairStore(store)
    again.verify()
    assert len(again.batch(range(12))["x0"]) == 12  # touches every shard
    assert read == []


def test_what_has_changed_is_verified_anew(store, read):
    PairStore(store).verify()
    read.clear()
    os.utime(shard_path(store, 1))
    PairStore(store).verify()
    assert read == [shard(1)]
    spoil(shard_path(store, 2))
    os.utime(shard_path(store, 2))
    with pytest.raises(DistillError, match=r"000002.safetensors: corrupt: its checksum does not match"):
        PairStore(store).verify()
    with pytest.raises(DistillError, match=r"000002.safetensors: corrupt"):
        PairStore(store)[11]
    shard_path(store, 2).write_bytes(shard_path(store, 2).read_bytes()[:-1])
    with pytest.raises(DistillError, match=r"000002.safetensors: corrupt"):
        PairStore(store).verify()


def test_a_shard_that_changes_while_a_run_has_it_known(store, read):
    pairs = PairStore(store)
    pairs.verify()
    spoil(shard_path(store, 1))
    os.utime(shard_path(store, 1))
    with pytest.raises(DistillError, match=r"000001.safetensors: corrupt"):
        pairs[5]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"files": {"shard-000000.safetensors": [1, 2, "x"]}, "seal": "0"}', b"\xff" * 9])
def test_a_damaged_memory_counts_for_nothing(store, read, content):
    PairStore(store).verify()
    (store / "verified-0.json").write_bytes(content)
    read.clear()
    PairStore(store).verify()
    assert len(read) == 4


def test_check_reads_everything_and_rewrites_the_memory(store, read, distill):
    PairStore(store).verify()
    shutil.copy(store / "verified-0.json", store / "verified-3.json")
    spoil(shard_path(store, 1))
    PairStore(store).verify()  # not seen: that is what --check is for
    read.clear()
    result = distill("pairs", "--check", store)
    assert result.code == 1
    assert f"{shard(1)}: corrupt" in result.err
    assert sorted(read) == ["noise", "noise", *map(shard, range(3))]  # of the two that are right
    assert not (store / "verified-3.json").exists()
    assert sorted(unsealed((store / "verified-0.json").read_bytes())["files"]) == [shard(0), shard(2)]
    with pytest.raises(DistillError, match=r"000001.safetensors: corrupt"):
        PairStore(store).verify()
    assert len(check_all(store, read_manifest(store))) == 1


def test_another_numpy_draws_the_first_noise_again(store, read, monkeypatch):
    PairStore(store).verify()
    read.clear()
    monkeypatch.setattr("numpy.__version__", "99")
    PairStore(store).verify()
    assert sorted(read) == ["noise", shard(0)]


def test_processes_share_the_work_and_know_what_the_others_did(store, read, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    pairs = []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        pairs.append(PairStore(store))
    for rank, share, mine in zip("10", ([shard(1)], ["noise", shard(0), shard(2)]), pairs, strict=True):
        monkeypatch.setenv("RANK", rank)
        read.clear()
        mine.verify()
        assert sorted(read) == share
    read.clear()
    for mine in pairs:
        mine.batch(range(12))
    assert read == []
    assert sorted(path.name for path in store.glob("verified-*")) == ["verified-0.json", "verified-1.json"]


def test_a_read_only_store_is_remembered_by_the_run(store, read, distill, tmp_path, monkeypatch):
    write = verified.write_atomic

    def refused(path, content):
        if path.parent == store.resolve():
            raise DistillError(f"{path}: read-only file system")
        write(path, content)

    monkeypatch.setattr(verified, "write_atomic", refused)
    before = sorted(store.iterdir())
    (tmp_path / "r").mkdir()  # a run may begin in an empty folder
    assert distill(*DMD, "--pairs", store, "--steps", 1, "--out", "r").code == 0
    assert len(read) == 4
    assert sorted(store.iterdir()) == before
    read.clear()
    assert distill("dmd", "--resume", "r", "--steps", 2).code == 0
    assert read == []
    assert set(unsealed((tmp_path / "r/verified-0.json").read_bytes())["files"]) == {str(shard_path(store, k)) for k in range(3)}


def test_a_restart_of_pairs_verifies_its_own_shards_once(store, read, tiny, tmp_path):
    generate(PairsConfig(**SETTINGS), tiny.copy(), store, (1, 2))
    assert read == [shard(1)]
    read.clear()
    generate(PairsConfig(**SETTINGS), tiny.copy(), store, (1, 2))
    assert read == []
    generate(PairsConfig(**SETTINGS), tiny.copy(), store)
    assert sorted(read) == ["noise", shard(0), shard(2)]
    assert {path.name for path in store.glob("verified-*")} == {"verified-0.json", "verified-1.json"}


def test_a_long_verification_is_announced(store, capsys, monkeypatch):
    monkeypatch.setattr(verified, "LONG", 1000)
    monkeypatch.setattr(verified, "SAID_EVERY", -1.0)
    PairStore(store).verify()
    err = capsys.readouterr().err
    assert f"verifying 3 files of {store}" in err
    assert "verifying: 3 of 3 files" in err
    PairStore(store).verify()
    assert capsys.readouterr().err == ""


def test_a_first_error_is_enough_to_start_nothing(store, distill, tmp_path):
    spoil(shard_path(store, 0))
    spoil(shard_path(store, 2))
    one_line(distill(*DMD, "--pairs", store, "--out", "r"), 1, f"{shard(0)}: corrupt: its checksum")
    assert not (tmp_path / "r").exists()


def test_embeddings_are_verified_once(tmp_path, read, monkeypatch):
    text = load("tiny-sd").text.given(open_prompts("shapes-held"), "blurry")
    Embeddings(text, tmp_path, "float16").complete(torch.device("cpu"))
    assert read == []
    Embeddings(text, tmp_path, "float16").complete(torch.device("cpu"))
    assert read == ["null.safetensors", shard(0)]
    read.clear()
    again = Embeddings(text, tmp_path, "float16")
    again.complete(torch.device("cpu"))
    assert again(torch.tensor([0, 1])).parts["encoder_hidden_states"].shape[0] == 2
    assert read == ["null.safetensors"]  # the null prompt's: small, so it is read whole
    spoil(again.path(0))
    os.utime(again.path(0))
    with pytest.raises(DistillError, match="corrupt"):
        Embeddings(text, tmp_path, "float16")(torch.tensor([0]))


def test_prompts_that_are_cut_are_counted_of_a_part_and_once(distill, tmp_path, monkeypatch):
    """Of six prompts those of the part alone, and on a restart only of what is still to make."""
    from distill_cli.models.conditioners import PromptConditioner

    counted = []
    cut = PromptConditioner.cut
    monkeypatch.setattr(PromptConditioner, "cut", lambda self, prompts: counted.extend(found := list(prompts)) or cut(self, found))
    (tmp_path / "p.txt").write_text("".join(f"{'word ' * (99 if k % 2 else 1)}{k}\n" for k in range(6)))
    job = ("--prompts", "p.txt", "--steps", 1, "--shards", "1/2")
    pairs = ("pairs", "--teacher", "tiny-sd", "--out", "q", "--shard-size", 1, *job)
    sample = ("sample", "--model", "tiny-sd", "--out", "s", "batch_size=1", *job)
    for command in (pairs, sample):
        counted.clear()
        result = distill(*command)
        assert result.code == 0
        assert "3 of 3 prompts are longer than the" in result.err
        assert [text[-1] for text in counted] == ["1", "3", "5"]
        counted.clear()
        assert "longer" not in distill(*command).err
        assert counted == []
    shard_path(tmp_path / "q", 3).unlink()
    assert "1 of 1 prompts" in distill(*pairs).err
    assert distill(*pairs[:-1], "0/2").code == 0
    run = (
        "dmd",
        "--teacher",
        "tiny-sd",
        "--pairs",
        "q",
        "--prompts",
        "p.txt",
        "--steps",
        1,
        "batch_size=2",
        "warmup_steps=0",
        "--out",
        "r",
    )
    counted.clear()
    assert "3 of 6 prompts" in distill(*run).err
    counted.clear()
    assert "longer" not in distill("dmd", "--resume", "r", "--steps", 2).err
    assert counted == []
    assert json.loads((tmp_path / "r/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2

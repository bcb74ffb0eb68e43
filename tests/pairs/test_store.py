"""A store of pairs: the same bytes however it was made, and nothing corrupt gets through."""

import os
import shutil
import time

import pytest
import torch

from distill_cli.config import PairsConfig
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, Interrupted, UsageError
from distill_cli.files import sealed, sha256, unsealed
from distill_cli.models.sampler import Sampling
from distill_cli.pairs import generate as module
from distill_cli.pairs.generate import generate
from distill_cli.pairs.store import Manifest, PairStore, check_all, read_manifest, shard_path, write_shard

SETTINGS = dict(teacher="tiny", num=12, shard_size=5, batch_size=4, steps=3)


@pytest.fixture
def store(tiny_pairs, tmp_path):
    return shutil.copytree(tiny_pairs, tmp_path / "store", ignore=shutil.ignore_patterns("verified-*"))


def sums(folder):
    return {path.name: sha256(path) for path in folder.iterdir() if not path.name.startswith("verified")}


def test_pairs_are_the_teachers_images_of_their_noise(tiny_pairs, tiny):
    pairs = PairStore(tiny_pairs)
    assert len(pairs) == 12
    batch = pairs.batch([11, 0, 7])
    labels = torch.tensor([1, 0, 7])
    assert batch["label"].tolist() == labels.tolist()
    assert torch.equal(batch["noise"], Draws(0, [11, 0, 7]).normal("prior", (3, 16, 16)))
    images = tiny.sample(Draws(0, [11, 0, 7]), labels, Sampling(steps=3))
    assert (batch["x0"] - images).abs().max() < 1e-3  # float16 on disk
    one = pairs[7]
    assert torch.equal(one["x0"], batch["x0"][2])


def test_restart_makes_only_what_is_missing(store, tiny, tiny_pairs):
    shard_path(store, 1).unlink()
    kept = shard_path(store, 0).stat().st_mtime_ns
    counts = generate(PairsConfig(**SETTINGS), tiny.copy(), store)
    assert counts == {"made": 1, "kept": 2, "missing": 0, "left": 0}
    assert shard_path(store, 0).stat().st_mtime_ns == kept
    assert sums(store) == sums(tiny_pairs)


def test_an_interrupt_loses_nothing(tmp_path, tiny, tiny_pairs, monkeypatch):
    """Stopped by a signal in the second shard: the first stays, no temporary file is left, the rest is made later."""
    import os
    import signal

    original = module.write_shard

    def write_then_signal(*arguments):
        original(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "write_shard", write_then_signal)
    with pytest.raises(Interrupted):
        generate(PairsConfig(**SETTINGS), tiny.copy(), tmp_path / "p")
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["manifest.json", "shard-000000.safetensors"]
    monkeypatch.undo()
    generate(PairsConfig(**SETTINGS), tiny.copy(), tmp_path / "p")
    assert sums(tmp_path / "p") == sums(tiny_pairs)


def test_processes_make_the_same_bytes(tmp_path, tiny, tiny_pairs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        generate(PairsConfig(**SETTINGS), tiny.copy(), tmp_path / "p")
    assert sums(tmp_path / "p") == sums(tiny_pairs)


def test_every_flipped_bit_is_found(store):
    path = shard_path(store, 0)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(content) * 8, (200,), generator=generator).tolist()
    header = int.from_bytes(content[:8], "little") + 8
    places += torch.randint(0, header * 8, (200,), generator=generator).tolist()
    for place in places:
        spoiled = bytearray(content)
        spoiled[place // 8] ^= 1 << place % 8
        path.write_bytes(spoiled)
        with pytest.raises(DistillError) as error:
            PairStore(store).batch([0])
        assert path.name in error.value.message


@pytest.mark.parametrize("size", [0, 7, 100, 3000, -1])
def test_truncated_shards_are_found(store, size):
    path = shard_path(store, 2)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DistillError, match=r"shard-000002.safetensors: corrupt") as error:
        PairStore(store)[11]
    assert "distill pairs again" in error.value.hint
    assert len(list(check_all(store, read_manifest(store)))) == 1


def test_missing_and_swapped_shards_are_found(store):
    shard_path(store, 0).rename(store / "away")
    with pytest.raises(DistillError, match="shard-000000.safetensors: missing"):
        PairStore(store)
    shutil.copy(shard_path(store, 1), shard_path(store, 0))
    with pytest.raises(DistillError, match="belongs to another store"):
        PairStore(store)[0]


def test_other_settings_are_refused_by_name(store, tiny):
    with pytest.raises(UsageError, match="steps is 3, not 4; seed is 0, not 1|seed is 0, not 1; .*steps is 3, not 4"):
        generate(PairsConfig(**{**SETTINGS, "steps": 4, "seed": 1}), tiny.copy(), store)
    other = tiny.copy()
    with torch.no_grad():
        other.net.conv_in.weight.add_(1e-3)
    with pytest.raises(UsageError, match="teacher_hash is"):
        generate(PairsConfig(**SETTINGS), other, store)


def test_other_noise_is_refused(store, monkeypatch):
    """Should (seed, i) ever give other numbers, the reader says so instead of training on them."""
    original = Draws.normal
    monkeypatch.setattr(Draws, "normal", lambda *a, **k: original(*a, **k) + 1e-7)
    with pytest.raises(DistillError, match="other noise"):
        PairStore(store)[0]


def test_a_spoiled_manifest_is_found(store):
    (store / "manifest.json").write_text((store / "manifest.json").read_text()[:-30])
    with pytest.raises(DistillError, match="manifest.json: corrupt"):
        PairStore(store)


def test_every_flipped_bit_of_a_manifest_is_found(store):
    path = store / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content) * 8):
        spoiled = bytearray(content)
        spoiled[place // 8] ^= 1 << place % 8
        path.write_bytes(spoiled)
        with pytest.raises(DistillError, match="manifest.json: corrupt"):
            read_manifest(store)


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.safetensors"])
def test_symbolic_links_in_a_store_are_refused(store, name):
    (store / name).rename(store.parent / name)
    (store / name).symlink_to(store.parent / name)
    with pytest.raises(DistillError, match=f"{name}: (corrupt|a symbolic link)"):
        PairStore(store)[0]


def test_an_edited_manifest_does_not_fit_its_shards(store):
    manifest = unsealed((store / "manifest.json").read_bytes())
    (store / "manifest.json").write_text(sealed(manifest | {"guidance_scale": 3.0}))
    with pytest.raises(DistillError, match="belongs to another store"):
        PairStore(store)[0]


def test_images_that_are_no_numbers_are_not_stored(tmp_path, tiny):
    broken = tiny.copy()
    with torch.no_grad():
        broken.net.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DistillError, match="not finite"):
        generate(PairsConfig(**SETTINGS), broken, tmp_path / "p")
    assert not list((tmp_path / "p").glob("*.safetensors"))


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_a_million_pairs_open_at_once_and_serve_random_batches(tmp_path, tiny_pairs):
    manifest = Manifest(**read_manifest(tiny_pairs).model_dump() | {"num": 1_000_000, "shape": (1, 1, 2), "shard_size": 2000})
    (tmp_path / "manifest.json").write_text(sealed(manifest.model_dump(mode="json")))
    for shard in range(manifest.shards):
        indices = torch.arange(manifest.range(shard).start, manifest.range(shard).stop)
        x0 = torch.stack([indices % 1000, indices // 1000], 1).view(-1, 1, 1, 2) / 1024
        write_shard(tmp_path, manifest, shard, x0, indices % 10)
    before, start = resident(), time.process_time()
    store = PairStore(tmp_path)
    assert time.process_time() - start < 1
    for turn in range(3):
        wanted = Draws(turn, range(64)).uniform("order").mul(1_000_000).long()
        batch = store.batch(wanted.tolist())
        assert torch.equal(batch["x0"].flatten(1) * 1024, torch.stack([wanted % 1000, wanted // 1000], 1).float())
        assert torch.equal(batch["label"], wanted % 10)
    assert resident() - before < 200e6

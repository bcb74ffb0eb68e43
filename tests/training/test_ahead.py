"""What a step does once and what it does early: casts of weights, pictures from disk."""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from distill_cli.data import open_images
from distill_cli.data.images import Folder
from distill_cli.diffusion.noise import Draws
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import DMD
from distill_cli.methods.train.config import TrainConfig
from distill_cli.methods.train.denoising import Denoising
from distill_cli.pairs.store import PairStore
from distill_cli.recipes import dump
from distill_cli.runs import Run
from distill_cli.training.engine import Engine

NETWORK = dict(channels=[8], attention=[False], groups=4, head=8)


class Casts(TorchDispatchMode):
    """Counts how often each trained weight is cast."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_to_copy" and isinstance(args[0], torch.nn.Parameter):
            self.seen[id(args[0])] += 1
        return func(*args, **kwargs or {})


def opened(images, folder, **options):
    AcceleratorState._reset_state(True)
    config = TrainConfig(device="cpu", batch_size=8, network=NETWORK, **options)
    engine = Engine(config, Denoising(config, images))
    engine.open(Run.create(folder, dump(config), "train"))
    return engine


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_weight_is_cast_once_for_all_parts_of_a_batch(accumulate, tmp_path):
    engine = opened(open_images("digits"), tmp_path / "run", precision="bf16", accumulate=accumulate)
    engine.train_step()
    with Casts() as casts:
        engine.train_step()
    assert len(casts.seen) > 10
    assert set(casts.seen.values()) == {1}
    assert torch.is_autocast_cache_enabled()


def test_the_parts_of_a_batch_share_the_casts_of_dmd(tmp_path, tiny, tiny_pairs):
    """Once for the student; twice for the fake score, which answers without a gradient before it learns."""
    seen = []
    for parts in (1, 4):
        options = dict(teacher="tiny", pairs=tiny_pairs, fake_steps=1, device="cpu", batch_size=8, precision="bf16", accumulate=parts)
        AcceleratorState._reset_state(True)
        config = DMDConfig(**options)
        engine = Engine(config, DMD(config, tiny.copy(), PairStore(tiny_pairs)))
        engine.open(Run.create(tmp_path / str(parts), dump(config), "dmd"))
        engine.train_step()
        with Casts() as casts:
            engine.train_step()
        networks = {name: {id(value) for value in network.parameters()} for name, network in engine.plain.items()}
        seen.append({name: {count for key, count in casts.seen.items() if key in its} for name, its in networks.items()})
    assert seen[0] == seen[1] == {"student": {1}, "fake": {2}}


@pytest.mark.parametrize("again", [False, True], ids=["", "gradient_checkpointing"])
def test_kept_casts_change_no_bit(again, tmp_path, monkeypatch):
    made = []
    for kept in (True, False):
        options = dict(precision="bf16", accumulate=4, gradient_checkpointing=again)
        engine = opened(open_images("digits"), tmp_path / str(kept), **options)
        if not kept:
            plain = engine.objective.turns
            monkeypatch.setattr(engine.objective, "turns", lambda *given, plain=plain: (torch.clear_autocast_cache(), plain(*given))[1])
        for _ in range(3):
            engine.train_step()
        made.append({name: value.clone() for name, value in engine.plain["teacher"].state_dict().items()})
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


@pytest.fixture
def pictures(tmp_path):
    folder, values = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for k in range(30):
        Image.fromarray(values.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k:02d}.png")
    return folder


def test_pictures_read_ahead_are_the_same(pictures, monkeypatch):
    read, plain = [], Folder._read

    def seen(self, position):
        read.append(position)
        return plain(self, position)

    monkeypatch.setattr(Folder, "_read", seen)
    folder, draws = Folder(pictures, 8, flip=True), Draws(0, range(4))
    expected, _ = folder.batch([3, 5, 3, 7], draws)
    read.clear()
    folder.ahead([5, 3, 9])
    made, _ = folder.batch([3, 5, 3, 7], draws)
    assert torch.equal(made, expected)
    assert sorted(read) == [3, 5, 7, 9]  # 9 is still to come
    folder.batch([9, 5], Draws(0, range(2)))
    assert sorted(read) == [3, 5, 5, 7, 9]
    assert not folder.coming


def test_the_next_part_is_read_while_one_is_computed(pictures, tmp_path, monkeypatch):
    announced, plain = [], Folder.batch

    def seen(self, positions, draws):
        announced.append(set(positions) <= set(self.coming))
        return plain(self, positions, draws)

    monkeypatch.setattr(Folder, "batch", seen)
    images = Folder(pictures, 8)
    engine = opened(images, tmp_path / "run", accumulate=2, steps=3, sample_every=0)
    while engine.step < engine.steps:
        engine.train_step()
    assert announced == [True] * 6
    assert not images.coming  # nothing is read that no step needs

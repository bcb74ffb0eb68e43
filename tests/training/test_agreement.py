"""What a run has begun with is held against what it is taken up with, by all processes alike; its result is rehearsed."""

import errno
import multiprocessing
import os
import shutil

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file

from distill_cli.config import PairsConfig, VAENetworkConfig
from distill_cli.errors import DistillError, UsageError
from distill_cli.files import sealed, unsealed
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import DMD
from distill_cli.models import load
from distill_cli.models.autoencoder import create
from distill_cli.models.classifier import Classifier, ClassifierInfo
from distill_cli.pairs.generate import generate
from distill_cli.training import checkpoint, health, identity
from distill_cli.training.rehearsal import rehearse
from tests.cli.test_bad_input import one_line
from tests.training.test_engine import NETWORK, engine_of, poison


def other_weights(folder, part="unet/diffusion_pytorch_model.safetensors"):
    """The same network after a little more training."""
    weights = load_file(folder / part)
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + 0.25}, folder / part)


def test_another_teacher_is_refused(tmp_path, tiny, tiny_pairs):
    """Before the first checkpoint too; a run of before goes on."""
    teacher, says = tiny.copy(), "teacher tiny: its content is not what the run has begun with"
    with torch.no_grad():
        teacher.net.conv_in.bias += 0.25
    made = engine_of("cm", tmp_path / "r", tiny, tiny_pairs, steps=2)
    with pytest.raises(UsageError, match=says) as error:
        engine_of("cm", tmp_path / "r", teacher, tiny_pairs, resume=True, steps=2)
    assert error.value.hint == "put that back, or begin anew"
    made.train_step()
    made.save()
    (tmp_path / "r/begun.json").unlink()
    with pytest.raises(UsageError, match=says):  # which the checkpoint says too
        engine_of("cm", tmp_path / "r", teacher, tiny_pairs, resume=True, steps=2)
    file = checkpoint.path_of(tmp_path / "r/checkpoints", 1) / "state.json"
    state = unsealed(file.read_bytes())
    del state["state"]["begun"]["teacher"]
    file.write_text(sealed(state))
    assert engine_of("cm", tmp_path / "r", teacher, tiny_pairs, resume=True, steps=2).step == 1
    assert unsealed((tmp_path / "r/begun.json").read_bytes())["teacher"] == teacher.weights_hash()
    (tmp_path / "r/begun.json").write_text("{}")
    with pytest.raises(DistillError, match="begun.json: corrupt"):
        engine_of("cm", tmp_path / "r", teacher, tiny_pairs, resume=True, steps=2)


def test_other_pairs_of_the_same_number_are_refused(tmp_path, tiny, tiny_pairs):
    others = PairsConfig(teacher="tiny", num=12, shard_size=5, batch_size=4, steps=3, seed=1)
    generate(others, tiny.copy(), tmp_path / "p")
    engine_of("dmd", tmp_path / "r", tiny, tiny_pairs, steps=2)
    with pytest.raises(UsageError, match="pairs .*: its content is not what the run has begun with"):
        engine_of("dmd", tmp_path / "r", tiny, tmp_path / "p", resume=True, steps=2)


def test_another_autoencoder_is_refused(distill, tmp_path):
    load("tiny-sd").codec.vae.save_pretrained(tmp_path / "v")
    command = (
        "train", "--data", "shapes", "vae=v", "prediction=v", "variants=1", "network.channels=[8]", "network.attention=[true]",
        "network.groups=4", "network.head=8", "text.width=8", "text.layers=1", "text.heads=1",
    )  # fmt: skip
    short = ("batch_size=2", "sample_every=0", "save_every=1", "--out", "r")
    import distill_cli.methods.train.text_to_image as objective

    class Few:
        """The first eight shapes."""

        def __init__(self, images):
            self.images, self.kind, self.classes, self.shape, self.about = images, images.kind, images.classes, images.shape, images.about
            self.batch, self.captions = images.batch, images.captions

        def __len__(self):
            return 8

    original = objective.TextToImage.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective.TextToImage, "__init__", lambda self, config, images: original(self, config, Few(images)))
        done = distill(*command, *short, "--steps", 1)
        assert done.code == 0, done.err
        other_weights(tmp_path / "v", "diffusion_pytorch_model.safetensors")
        one_line(distill("train", "--resume", "r", "--steps", 2), 2, f"vae {tmp_path / 'v'}: its content is not what")


def test_the_metric_the_decoder_and_the_prompts_are_held(monkeypatch):
    """VGG's weights and the tiny decoder's, whatever file they come from."""
    from diffusers import AutoencoderTiny

    import distill_cli.methods.dmd.objective as module

    network = torch.nn.Linear(2, 2)
    decoder = AutoencoderTiny(encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, num_encoder_blocks=(1,) * 4,
                              num_decoder_blocks=(1,) * 4)  # fmt: skip
    found, texts = [], ["c", "d"]
    for _ in texts:
        monkeypatch.setattr(module, "measure", lambda *_: (None, {"lpips": network, "decoder": decoder}))
        monkeypatch.setattr(module, "check_pairs", lambda *_: None)

        class Pairs:
            folder = None
            manifest = type("M", (), dict(guidance_scale=1.0, guidance_range=None, settings_hash="0", shape=(4, 8, 8),
                                          negative_prompt="", dtype="float16"))  # fmt: skip

            def __len__(self):
                return 3

            def prompts(self):
                return ["a", "b", texts[len(found)]]

        monkeypatch.setattr("distill_cli.models.conditioners.Embeddings", lambda *_: None)
        config = DMDConfig(teacher="tiny-sd", pairs="p", regression_loss="lpips", decoder="d")
        found.append(DMD(config, load("tiny-sd"), Pairs()).identity)
        with torch.no_grad():
            network.bias += 1
            decoder.decoder.layers[0].bias += 1
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"lpips_weights", "decoder", "prompts"}
    guides = {"classifier_guidance", "clip_guidance"}
    assert set(found[0]) == {"lpips_weights", "decoder", "prompts", "teacher", "pairs"} | guides


def test_lists_say_what_is_new():
    config = DMDConfig()
    then = {"classes": ["cat", "dog"], "optimizer": "adamw"}
    for now, says in ((["cat", "dog", "owl"], "owl is new"), (["cat"], "dog is gone"), (["dog", "cat"], "in another order")):
        with pytest.raises(UsageError, match=f"classes: {says}; the run has begun with 2"):
            identity.refuse(config, {"classes": now}, then)
    identity.refuse(config, {"classes": ["cat", "dog"], "pairs": "of what was not held before"}, then)


def test_another_network_in_the_recipe_is_one_line(tmp_path, tiny, tiny_pairs, monkeypatch):
    engine_of("train", tmp_path / "r", tiny, tiny_pairs, steps=2, network=NETWORK).train()
    with pytest.raises(UsageError, match=r"network.channels: \[8, 24\]; the run has begun with \[8, 16\]"):
        engine_of("train", tmp_path / "r", tiny, tiny_pairs, resume=True, steps=4, network=NETWORK | {"channels": [8, 24]})
    monkeypatch.setattr("distill_cli.training.identity.refuse", lambda *_: None)  # as of a run of an older version
    with pytest.raises(UsageError, match=r"teacher: .* is \(.*, in step-000002 \("):
        engine_of("train", tmp_path / "r", tiny, tiny_pairs, resume=True, steps=4, network=NETWORK | {"channels": [8, 24]})


# several processes


def together(work, folder):
    """The results of `work(rank, talk, folder)` of two processes that talk; an error's message stands for its result."""

    def one(rank, queue):
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), "2"
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        try:
            found = work(rank, torch.distributed.group.WORLD, folder)
        except DistillError as error:
            found = f"{type(error).__name__}: {error.message}"
        queue.put((rank, found))
        torch.distributed.barrier()

    (folder / "meet").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=one, args=(rank, queue)) for rank in range(2)]
    for child in children:
        child.start()
    found = dict(queue.get(timeout=60) for _ in children)
    for child in children:
        child.join(timeout=60)
    return found


def checkpoints(folder, *steps):
    network = torch.nn.Linear(2, 2)
    for step in steps:
        checkpoint.save(folder, step, {"student": network}, {}, {"begun": {}}, keep=9)
    return network


def taken_up(rank, talk, folder):
    """Each process has a view of its own of the same folder."""
    view = folder / str(rank)
    step = identity.newest(view, talk)
    if step is None:
        return None
    identity.take_up(view, step, {"student": torch.nn.Linear(2, 2)}, {}, lambda state: None, talk)
    return step


def test_all_processes_take_up_process_0s_checkpoint(tmp_path):
    checkpoints(tmp_path / "0", 2, 4)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    checkpoints(tmp_path / "1", 6)
    assert together(taken_up, tmp_path) == {0: 4, 1: 4}
    shutil.rmtree(tmp_path / "0")
    assert together(taken_up, tmp_path) == {0: None, 1: None}


def test_a_process_that_sees_it_later_waits(tmp_path, monkeypatch):
    checkpoints(tmp_path / "0", 2)

    def late(rank, talk, folder):
        if rank == 1:
            seen, look = iter([False, False]), identity.checkpoint.path_of

            def path_of(*place):
                if next(seen, None) is None and not (folder / "1").exists():
                    shutil.copytree(folder / "0", folder / "1")
                return look(*place)

            identity.checkpoint.path_of = path_of
        return taken_up(rank, talk, folder)

    assert together(late, tmp_path) == {0: 2, 1: 2}
    shutil.rmtree(tmp_path / "1")
    monkeypatch.setattr(identity, "SEEN_AFTER", 0.1)
    said = f"DistillError: {tmp_path / '1/step-000002'}: process 0 sees it, and another does not"
    assert together(taken_up, tmp_path) == {0: said, 1: said}


def test_one_that_cannot_read_it_ends_all(tmp_path):
    """With its own words, on both, and before any network is filled."""
    checkpoints(tmp_path / "0", 2)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    file = tmp_path / "1/step-000002/student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    found = together(taken_up, tmp_path)
    assert found[0] == found[1]
    assert found[0].startswith(f"DistillError: {file}: corrupt")


def test_what_differs_between_processes_is_named(tmp_path):
    def differing(what):
        def work(rank, talk, folder):
            network = torch.nn.Linear(3, 3)
            for parameter in network.parameters():
                parameter.data.fill_(1.0)
            optimizer = torch.optim.Adam(network.parameters())
            network(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            begun = {"teacher": "of 1" if what == "teacher" and rank else "of 0"}
            if rank and what == "weights of student":
                network.weight.data[1, 2] += 1e-7
            if rank and what == "moments of student":
                optimizer.state[network.bias]["exp_avg_sq"][0] *= 1.001
            identity.check_same(identity.shared(begun, None, {"student": network}, {"student": optimizer}), talk)

        return work

    assert together(differing(""), tmp_path) == {0: None, 1: None}
    for what in ("teacher", "weights of student", "moments of student"):
        found = together(differing(what), tmp_path)
        assert found[0] == found[1] == f"DistillError: {what}: process 1 has something else than process 0"


# the rehearsal


def nothing_left(folder):
    results = ("teacher", "student", "vae", "classifier")
    return not [path.name for path in folder.iterdir() if path.name.startswith(".tmp") or path.name in results]


@pytest.mark.parametrize("kind", ["train", "dmd", "cm"])
def test_a_result_that_cannot_be_saved_ends_before_the_first_step(kind, tmp_path, tiny, tiny_pairs, monkeypatch):
    from distill_cli.models.formats import folder

    made = engine_of(kind, tmp_path / "r", tiny, tiny_pairs, steps=3)
    write = folder.json.dumps

    def broken(value, **rest):
        if "_class_name" in value:
            raise UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")
        return write(value, **rest)

    monkeypatch.setattr(folder.json, "dumps", broken)
    with pytest.raises(DistillError, match="could not be saved and read again .*surrogates not allowed") as error:
        made.train()
    assert error.value.hint.endswith(f"then --resume {tmp_path / 'r'}")
    assert (made.step, checkpoint.steps(made.run.checkpoints)) == (0, [])
    assert nothing_left(tmp_path / "r")
    monkeypatch.undo()
    assert engine_of(kind, tmp_path / "r", tiny, tiny_pairs, resume=True, steps=3).train() is not None


def test_a_full_disk_is_found_too(tmp_path, tiny, tiny_pairs, monkeypatch):
    made = engine_of("train", tmp_path / "r", tiny, tiny_pairs, steps=3, network=NETWORK)

    def full(path, *content):
        raise OSError(errno.ENOSPC, "No space left on device", path.name)

    monkeypatch.setattr("distill_cli.tensors.write", full)
    says = r"could not be saved and read again \(diffusion_pytorch_model.safetensors: no space left on device\)"
    with pytest.raises(DistillError, match=says) as error:
        made.train()
    assert error.value.hint == f"free some space and start again: finished files are kept; then --resume {tmp_path / 'r'}"
    monkeypatch.undo()
    assert nothing_left(tmp_path / "r")
    room = shutil.disk_usage(tmp_path)
    made.save()
    taken = sum(path.stat().st_size for path in checkpoint.path_of(made.run.checkpoints, 0).iterdir())  # without moments
    count = 4 * sum(p.numel() for p in made.plain["teacher"].parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room._replace(free=4 * count - 1))
    with pytest.raises(DistillError, match=r"MB are free, a checkpoint takes") as error:
        made.train()
    assert error.value.hint == f"free some space, then --resume {tmp_path / 'r'}"
    assert 2 * count < taken < 2.5 * count
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room._replace(free=4 * count + 1000))
    assert made.train() is not None


def test_a_rehearsal_changes_nothing(tmp_path, tiny, tiny_pairs):
    """Results are read back by their loaders; weights, configuration and random numbers stay, and no picture is measured."""
    made = engine_of("train", tmp_path / "r", tiny, tiny_pairs, steps=3, network=NETWORK)
    before = identity.digest(made.ema.network)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rehearse(made._model, made.ema.network, "", tmp_path / "r/teacher")
    assert torch.equal(torch.rand(3), expected)
    assert identity.digest(made.ema.network) == before
    autoencoder = create(8, 3, VAENetworkConfig(channels=[8], groups=4), 0)
    classifier = Classifier(ClassifierInfo((3, 8, 8), ("a", "b"), 8, "d"))

    def measured(network):
        raise AssertionError("pictures are not measured")

    for network, name in ((autoencoder, "vae"), (classifier, "classifier")):
        rehearse(measured, network, "", tmp_path / "r" / name)
    assert autoencoder.vae.config.scaling_factor == 1.0
    assert nothing_left(tmp_path / "r")
    wrong = Classifier(ClassifierInfo((3, 8, 8), ("a", "b"), 8, "d"))
    wrong.body = torch.nn.Sequential(wrong.body)  # a wrapper changes the names of weights
    with pytest.raises(DistillError, match="classifier: could not be saved and read again"):
        rehearse(measured, wrong, "", tmp_path / "r/classifier")
    assert nothing_left(tmp_path / "r")


def test_fp16_ends_by_steps_left_out_in_a_row(tmp_path, tiny, tiny_pairs):
    """A scale far below 1 is no reason; 50 steps that the scaler leaves out are. AdamW is fused here, so accelerate does not see them."""

    def scaled(folder, **changes):
        made = engine_of("train", folder, tiny, tiny_pairs, steps=200, network=NETWORK, log_every=10, save_every=500, **changes)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-6)
        made.accelerator.scaler = scaler
        made.optimizers = {name: AcceleratedOptimizer(o.optimizer, False, scaler) for name, o in made.optimizers.items()}
        return made, scaler

    made, scaler = scaled(tmp_path / "r")
    made.train_step()
    before = [p.clone() for p in made.plain["teacher"].parameters()]
    hook = made.plain["teacher"].register_forward_pre_hook(poison)
    for _ in range(20):
        made.advance()
    hook.remove()
    assert all(map(torch.equal, before, made.plain["teacher"].parameters()))
    assert scaler.get_scale() < 1e-7
    assert made.health.skipped["teacher"].tolist() == [20, 20]
    made.save()
    again, _ = scaled(tmp_path / "r", resume=True)
    assert again.health.skipped["teacher"].tolist() == [20, 20]
    again.train_step()
    assert again.health.skipped["teacher"].tolist() == [0, 20]
    again.plain["teacher"].register_forward_pre_hook(poison)
    with pytest.raises(DistillError, match="5[0-9] steps in a row up to [0-9]+ had no finite gradient of teacher") as error:
        again._train()
    assert error.value.hint == "use --precision bf16"
    assert again.step < 22 + health.SKIPPED_AT_MOST + 10

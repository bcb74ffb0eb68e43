"""The memory that a plan counts on fake tensors is what real calls and steps hold, and what fits is found by it."""

import pytest
import torch
from accelerate.state import AcceleratorState

from distill_cli.commands import method_of
from distill_cli.config.base import size
from distill_cli.errors import UsageError
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd2.config import DMD2Config
from distill_cli.methods.registry import load as opener
from distill_cli.models import load
from distill_cli.recipes import resolve
from distill_cli.runs import Run
from distill_cli.training.activations import GPU, Held, peak, tensors_of
from distill_cli.training.engine import Engine
from distill_cli.training.fitting import Fitting, line, refuse
from distill_cli.training.job import Job
from distill_cli.training.memory import memory, networks_of
from tests.options import options

HOST = "ema_device=cpu optimizer_device=cpu"
SMALL = dict(steps=2, batch_size=8, device="cpu", sample_every=0)


def opened(config, dry_run=True):
    method = method_of(config)
    return opener(f"methods.{method.objective}")(config, Job(method.command, dry_run=dry_run))


@pytest.fixture(scope="module")
def latents():
    """The network of tiny-sd, and its inputs."""
    model = load("tiny-sd")
    model.denoiser.requires_grad_(True)
    x = (16, *model.shape)
    return model.backbone, lambda where: (torch.randn(x, device=where), torch.ones(16, device=where), model.example(16, where))


def most(call, network):
    """The bytes that a real call and its backward pass hold at once, the gradients of weights left out."""
    held = Held()
    for each in tensors_of([network]).values():
        held.know(each, 0)
    trained = [p for p in network.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
    with held:
        call().sum().backward()
    for handle in handles:
        handle.remove()
    return held.peak


def test_what_autograd_saves_is_counted(latents):
    network, inputs = latents
    weights = {each.untyped_storage()._cdata for each in tensors_of([network]).values()}
    saved = {}

    def pack(each):
        saved[each.untyped_storage()._cdata] = each.untyped_storage().nbytes()
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        out = network(*inputs("cpu"))
    real = sum(size for key, size in saved.items() if key not in weights)
    counted = peak(lambda: network(*inputs(GPU)), [network], network.parameters(), "no")
    del out
    assert counted == pytest.approx(real, rel=0.1)
    frozen = peak(lambda: network(*inputs(GPU)), [network], [], "no")
    assert frozen < counted / 4  # nothing is kept for weights that are not trained


def test_checkpointing_keeps_a_block(latents):
    network, inputs = latents
    planned = peak(lambda: network(*inputs(GPU)), [network], network.parameters(), "no", [network])
    assert not network.net.is_gradient_checkpointing  # as it was
    assert all(each.device.type == "cpu" for each in network.parameters())
    whole = most(lambda: network(*inputs("cpu")), network)
    network.net.enable_gradient_checkpointing()
    real = most(lambda: network(*inputs("cpu")), network)
    network.net.disable_gradient_checkpointing()
    assert planned == pytest.approx(real, rel=0.1)
    assert planned < 0.7 * whole


def test_decoding_with_gradient():
    codec = load("tiny-sd").codec
    codec.vae.requires_grad_(False)

    def decoded(where):
        return codec.raw(torch.zeros(8, 4, 8, 8, device=where, requires_grad=True))

    assert peak(lambda: decoded(GPU), [codec.vae], [], "no") == pytest.approx(most(lambda: decoded("cpu"), codec.vae), rel=0.1)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *[(DMDConfig, more) for more in ({}, {"accumulate": 4}, {"guidance_scale": 2.0, "match_pairs": True}, {"lora": 4})],
        *[
            (DMD2Config, more)
            for more in ({"fake_steps": 1}, {"fake_steps": 1, "data": "digits"}, {"fake_steps": 1, "data": "digits", "gan": "teacher"})
        ],
    ],
    ids=str,
)
def test_a_whole_step_holds_what_the_plan_says(tmp_path, tiny_pairs, kind, more):
    given = {"pairs": tiny_pairs} if kind is DMDConfig else {}
    config = kind(**SMALL, teacher="tiny", out=tmp_path / "r", **given, **more)
    planned = memory(opened(config))
    objective = opened(config, dry_run=False)
    assert memory(objective) == planned
    AcceleratorState._reset_state(True)
    engine = Engine(objective.config, objective)
    engine.open(Run.create(tmp_path / "r", "", "dmd"))
    engine.train_step()
    held = Held()
    moments = [each for optimizer in engine.optimizers.values() for state in optimizer.state.values() for each in state.values()]
    fixed = [*tensors_of([*networks_of(objective).values(), engine.ema.network]).values(), *moments]
    for each in fixed:
        held.know(each, 0)
    with held:
        engine.train_step()
    assert planned.total == pytest.approx(held.peak + sum(each.numel() * each.element_size() for each in fixed), rel=0.1)


def test_networks_that_are_shared_count_once(latents):
    network, _ = latents
    assert len(tensors_of([network, network.net])) == len(list(network.parameters()))


def test_half_precision_keeps_a_cast_of_the_weights(latents):
    """As a GPU's autocast does: normalisations stay float32, so activations are more than half."""
    network, inputs = latents
    full, half = (peak(lambda: network(*inputs(GPU)), [network], network.parameters(), precision) for precision in ("no", "bf16"))
    assert 0.5 * full < half < full
    assert not torch.is_autocast_enabled("cuda")


def test_what_is_judged_by_lpips_counts(tmp_path):
    """A plan of consistency distillation has VGG's activations, without VGG's weights."""
    plain, judged = (
        memory(opened(options("cm", method="cd", teacher="tiny", data="digits", metric=metric, batch_size=2))) for metric in ("l2", "lpips")
    )
    assert judged.weights - plain.weights == 4 * (14_714_688 + 1472) + 24  # VGG-16's convolutions, LPIPS' layers, its scaling
    pixels = 224 * 224 * 64 * 4  # one feature map of VGG's first layers
    assert judged.activations - plain.activations > 2 * 4 * pixels


def test_a_plan_is_of_the_heaviest_phase():
    """With match_pairs the student's batch stays when the regression, and with it LPIPS, ends."""
    plan = dict(SMALL, teacher="tiny", pairs="p", match_pairs=True, regression_loss="lpips")
    whole, ending = (memory(opened(DMDConfig(**plan, regression_steps=steps))) for steps in (None, 1))
    assert ending.activations == whole.activations


def test_a_loras_base_counts_in_the_type_of_each_option():
    """A run in bf16 stores it so: what is found by changing the option is what that run's own plan counts."""
    flags = dict(teacher="tiny-sd", prompts="shapes", lora=4, batch_size=2, device="cpu", memory="1GB")
    fitting, half = Fitting(opened(DMDConfig(**flags))), memory(opened(DMDConfig(**flags, precision="bf16")))
    assert fitting.needs(precision="bf16") == half
    assert fitting.needs().weights > half.weights


def test_options_that_fit(tmp_path):
    """The fewest parts that fit, for they cost nothing; with activations that are computed again fewer parts do."""
    config = DMDConfig(**SMALL, teacher="tiny", out=tmp_path)
    needs = memory(opened(config))
    limited = config.model_copy(update={"memory": f"{(needs.total - needs.activations / 3) / 1e6:.4f}MB"})
    objective = opened(limited)
    fitting = Fitting(objective)
    choice, again = fitting.choice(), fitting.fewest({"gradient_checkpointing": True})
    assert choice.changes == {"accumulate": 2}
    assert again.changes == {"gradient_checkpointing": True}
    assert memory(opened(limited.model_copy(update=choice.changes))) == choice.needs
    assert max(choice.needs.total, again.needs.total) <= size(limited.memory) < needs.total
    assert line(objective, 1, needs).startswith(f"accumulate=2 fits in {limited.memory}: about ")
    refuse(opened(limited.model_copy(update=choice.changes)), 1)
    with pytest.raises(UsageError, match=r"memory .*: the run needs .* by its plan"):
        refuse(objective, 1)
    assert line(opened(config.model_copy(update={"memory": "1GB"})), 1, needs) == "fits in 1GB as it stands"


def test_a_size_below_the_smallest_plan(tmp_path):
    objective = opened(DMDConfig(**SMALL | {"batch_size": 2}, teacher="tiny", out=tmp_path, memory="1MB"))
    with pytest.raises(UsageError, match="memory 1MB: the smallest plan needs") as error:
        line(objective, 1, memory(objective))
    assert error.value.hint == f"that is gradient_checkpointing=true {HOST} precision=bf16 accumulate=2"


def test_processes_share_a_batch(tmp_path):
    config = DMDConfig(**SMALL, teacher="tiny", out=tmp_path)
    one, four = memory(opened(config)), memory(opened(config), 4)
    assert four.activations == pytest.approx(one.activations / 4, rel=0.05)
    assert four.gradients == 2 * one.gradients  # of student and fake score: what processes exchange stays


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "24gb", "-1GB", "1e3MB"])
def test_sizes_have_a_unit(text):
    with pytest.raises(UsageError, match="no size such as 24GB"):
        resolve(DMDConfig, None, [f"memory={text}"])


def test_sizes():
    assert (size("24GB"), size("22.5GiB")) == (24 * 10**9, 22.5 * 2**30)
    assert resolve(DMDConfig, None, [], {"memory": "24 GB"}).memory == "24GB"

import json

import numpy as np
import pytest
import torch

from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import TableSchedule
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import load, pixel
from distill_cli.models.formats import save
from distill_cli.models.lineage import Lineage
from distill_cli.models.sampler import Sampler, Sampling
from tests.conditions import of


@pytest.fixture(scope="module")
def student(tiny):
    """A one-step student as DMD saves it: the teacher's EDM parameterisation, one time."""
    out = tiny.copy(sampler=Sampler.one_step(tiny.denoiser.schedule))
    with torch.no_grad():
        out.net.conv_out.bias.add_(0.05)
    return out


def test_a_student_gives_the_same_pictures_in_plain_diffusers(student, tmp_path):
    from diffusers import ConsistencyModelPipeline

    save(student, tmp_path / "m")
    pipeline = ConsistencyModelPipeline.from_pretrained(tmp_path / "m")
    pipeline.set_progress_bar_config(disable=True)
    draws, labels = Draws(0, range(6)), student.conditioner.labels(6)
    ours = student.sample(draws, labels)
    theirs = pipeline(
        batch_size=6, class_labels=labels.tolist(), num_inference_steps=1, latents=draws.normal("prior", student.shape), output_type="pt"
    ).images
    theirs = torch.as_tensor(theirs) * 2 - 1
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


def test_save_and_load_are_inverse(student, tmp_path):
    save(student, tmp_path / "m")
    again = load(str(tmp_path / "m"))
    assert again.weights_hash() == student.weights_hash()
    assert (again.lineage, again.sampling, again.sampler.times) == (student.lineage, student.sampling, student.sampler.times)
    draws, labels = Draws(1, range(3)), student.conditioner.labels(3)
    assert torch.equal(again.sample(draws, labels), student.sample(draws, labels))


def test_half_precision_on_disk(student, tmp_path):
    save(student, tmp_path / "m", torch.float16)
    size = (tmp_path / "m/unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 2.3 * sum(p.numel() for p in student.net.parameters()) + 20_000
    again = load(str(tmp_path / "m"))
    assert again.net.dtype == torch.float32
    assert (again.net.conv_out.bias - student.net.conv_out.bias).abs().max() < 1e-3


def test_a_foreign_consistency_model_is_a_student(tmp_path, student):
    """A ConsistencyModelPipeline without distill.json is read with the boundary scalings, as diffusers does."""
    save(student, tmp_path / "m")
    (tmp_path / "m/distill.json").unlink()
    again = load(str(tmp_path / "m"))
    assert again.denoiser.parameterisation == "consistency"
    assert again.sampler.times == (80.0,)
    draws, labels = Draws(1, range(3)), student.conditioner.labels(3)
    assert (again.sample(draws, labels) - student.sample(draws, labels)).abs().max() < 1e-4


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddpm_models_round_trip(prediction, tmp_path):
    schedule = TableSchedule.from_config({"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": prediction == "v"})
    model = pixel.create(
        resolution=8, channels=[8], attention=[False], groups=4, head=8, classes=[], schedule=schedule, parameterisation=prediction,
        lineage=Lineage(name="x"),
    )  # fmt: skip
    model.denoiser.eval()
    save(model, tmp_path / "m")
    again = load(str(tmp_path / "m"))
    assert (again.denoiser.schedule.alphas_cumprod - schedule.alphas_cumprod).abs().max() < 1e-12
    if prediction == "v":
        assert again.denoiser.schedule.alpha(torch.tensor([999.0])) < 1e-7
    for part in ("unet", "scheduler"):  # as the first published ones have it
        for file in (tmp_path / "m" / part).iterdir():
            file.rename(tmp_path / "m" / file.name)
        (tmp_path / "m" / part).rmdir()
    (tmp_path / "m/distill.json").unlink()
    assert load(str(tmp_path / "m")).weights_hash() == again.weights_hash()
    sampling = Sampling(solver="ddim", steps=4)
    ours, theirs = (m.sample(Draws(0, [0, 1]), torch.zeros(2).long(), sampling) for m in (model, again))
    assert (ours - theirs).abs().max() < 1e-4


def test_tiny_is_the_same_everywhere(tiny):
    state = torch.random.get_rng_state()
    again = load("tiny")
    assert again.weights_hash() == tiny.weights_hash()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sum(p.numel() for p in tiny.denoiser.parameters()) < 100_000


def test_the_weights_hash_sees_one_bit(tiny):
    other = tiny.copy()
    weight = other.net.conv_in.weight.data.view(-1)
    weight[0] = np.nextafter(weight[0].numpy(), np.float32(9), dtype=np.float32).item()
    assert other.weights_hash() != tiny.weights_hash()


def test_a_student_is_sampled_as_it_was_made(student):
    assert student.with_defaults(None, None, None) == Sampling(solver="few-step", steps=1)
    with pytest.raises(UsageError, match="--solver heun: a student"):
        student.with_defaults("heun", None, None)
    with pytest.raises(UsageError, match="--guidance-scale 3: a student's guidance is built in"):
        student.with_defaults(None, None, 3)
    with pytest.raises(UsageError, match="--steps 2: the student was made for at most 1"):
        student.with_defaults(None, 2, None)


def test_labels_go_round(tiny):
    assert tiny.conditioner.labels(5, [3, 7], start=1).tolist() == [7, 3, 7, 3, 7]
    assert tiny.conditioner.labels(12).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    with pytest.raises(UsageError, match="no class 10"):
        tiny.conditioner.labels(1, [10])


def test_null_class_is_another_condition(tiny):
    x, t = torch.randn(2, 3, 16, 16), torch.ones(2)
    with torch.no_grad():
        one, null = (tiny.denoiser(x, t, of(torch.full((2,), c))) for c in (3, tiny.conditioner.null_label))
    assert tiny.conditioner.null_label == 10
    assert (one - null).abs().max() > 1e-4


def test_half_precision_networks_are_combined_in_float32():
    """c_skip x + c_out F is not rounded to the network's precision."""

    class Half(torch.nn.Module):
        def forward(self, x, t, condition):
            return torch.zeros_like(x, dtype=torch.bfloat16)

    from distill_cli.diffusion.schedule import EDMSchedule

    x = torch.full((1, 1, 2, 2), 1.2345678)
    out = NetworkDenoiser(Half(), EDMSchedule(), "edm")(x, torch.tensor([0.002]))
    assert out.dtype == torch.float32
    assert (out - x * 0.25 / (0.25 + 4e-6)).abs().max() < 1e-7


def broken(tmp_path, tiny):
    save(tiny, tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: (m / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 40), "unet"),
        (lambda m: (m / "unet/diffusion_pytorch_model.safetensors").unlink(), "unet"),
        (lambda m: (m / "model_index.json").write_text("{"), "model_index.json"),
        (lambda m: (m / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"})), "FluxPipeline"),
        (lambda m: (m / "distill.json").write_text('{"format": 3}'), "format"),
        (lambda m: (m / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json"),
    ],
)
def test_broken_folders_are_said_in_one_line(spoil, says, tmp_path, tiny):
    folder = broken(tmp_path, tiny)
    spoil(folder)
    with pytest.raises(DistillError) as error:
        load(str(folder))
    assert says in error.value.message
    assert "\n" not in error.value.message


def test_unknown_models():
    with pytest.raises(UsageError) as error:
        load("digitz")
    assert "digits" in error.value.hint
    with pytest.raises(DistillError) as error:
        load("nobody/nothing")
    assert "hf download nobody/nothing" in error.value.hint

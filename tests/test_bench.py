"""distill bench: it counts the right calls, and times both sides of the same."""

import pytest
import torch
from PIL import Image

from distill_cli.bench import cases, measure, stand_ins
from distill_cli.config import PairsConfig, SampleConfig
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.models import cost, load, stable_diffusion
from distill_cli.models.language import LanguageReader
from distill_cli.models.sources.catalog import HUB, MADE
from distill_cli.recipes import resolve
from tests.fake_card_cases import adapter
from tests.options import options


@pytest.fixture(autouse=True)
def any_precision():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # accelerate keeps one precision a process
    yield
    AcceleratorState._reset_state(True)


def calls_of(case, monkeypatch):
    """For each side: images forward without gradient, with gradient, networks that got one, optimizer steps."""
    from diffusers import UNet2DModel

    counts = []
    original, stepped = UNet2DModel.forward, {}

    def counting(self, x, *arguments, **options):
        counts[-1][1 if torch.is_grad_enabled() else 0] += len(x)
        return original(self, x, *arguments, **options)

    def stepping(optimizer):
        def step(self, *arguments, **options):
            counts[-1][2] += all(p.grad is not None for p in self.param_groups[0]["params"] if p.requires_grad and p.ndim == 4)
            counts[-1][3] += 1
            return stepped[optimizer](self, *arguments, **options)

        return step

    monkeypatch.setattr(UNet2DModel, "forward", counting)
    for optimizer in (torch.optim.AdamW, torch.optim.RAdam):
        stepped[optimizer] = optimizer.step
        monkeypatch.setattr(optimizer, "step", stepping(optimizer))
    for side in (case.ours, case.bare()):
        counts.append([0, 0, 0, 0])
        side()
    return counts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [8, 12, 2, 2]),  # teacher and fake score; student on noise and on pairs, fake score
        ({"fake_steps": 2}, [8, 16, 3, 3]),
        ({"regression_weight": 0}, [8, 8, 2, 2]),
        ({"matching_weight": 0}, [0, 4, 1, 1]),
        ({"regression_steps": 1}, [8, 12, 2, 2]),
        ({"fake_score": False, "regression_weight": 0}, [4, 4, 1, 1]),
        ({"guidance_scale": 2.0, "precision": "bf16"}, [12, 12, 2, 2]),
    ],
)
def test_both_sides_of_dmd_call_the_networks_alike(options, expected, tmp_path, monkeypatch, tiny_pairs):
    config = DMDConfig(teacher="tiny", batch_size=4, device="cpu", pairs=tiny_pairs, **options)
    case = cases.training("dmd", config, tmp_path)
    case.ours()  # steps of warm-up do not leave the first phase
    ours, raw = calls_of(case, monkeypatch)
    assert ours == raw == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "cd"}, [12, 4, 1, 1]),  # the teacher's Heun step, the target; the student
        ({"method": "cd", "solver": "euler", "guidance_scale": 2.0}, [12, 4, 1, 1]),
        ({"method": "cd", "teacher_steps": 2}, [20, 4, 1, 1]),
        ({"method": "ct"}, [4, 4, 1, 1]),
        ({"method": "ect"}, [4, 4, 1, 1]),
        ({"method": "ect", "precision": "bf16"}, [4, 4, 1, 1]),
    ],
)
def test_both_sides_of_cm_call_the_networks_alike(given, expected, tmp_path, monkeypatch):
    config = options("cm", **{"teacher": "tiny", "data": "digits", "batch_size": 4, "device": "cpu"} | given)
    ours, raw = calls_of(cases.training("cm", config, tmp_path), monkeypatch)
    assert ours == raw == expected


def test_both_sides_of_pairs_call_the_networks_alike(tmp_path, monkeypatch):
    config = PairsConfig(teacher="tiny", batch_size=4, steps=2, device="cpu")
    ours, raw = calls_of(cases.bench_pairs(config, tmp_path), monkeypatch)
    assert ours == raw == [3 * 4 * 3, 0, 0, 0]


@pytest.mark.parametrize("command", ["train", "dmd", "sample"])
def test_the_command(command, distill):
    options = {"train": ["batch_size=8"], "dmd": ["teacher=tiny", "batch_size=4"], "sample": ["model=tiny", "steps=1", "batch_size=8"]}
    result = distill("bench", command, "--repeats", 2, "--json", "device=cpu", *options[command])
    assert result.code == 0, result.err
    data = result.json
    assert data["bench"] == command
    assert 0.5 < data["ratio"] < 100
    assert data["images_per_second"] == pytest.approx({"train": 8, "dmd": 4, "sample": 24}[command] / data["ours_seconds"], rel=2e-3)


def test_an_unknown_command_names_the_nearest(distill):
    result = distill("bench", "dme")
    assert result.code == 2
    assert "did you mean dmd?" in result.err


def test_text_models_are_timed_against_diffusers_pipeline(tmp_path, monkeypatch):
    """Both sides make the same pictures' worth of calls, guided: two images a picture and step."""
    from diffusers import UNet2DConditionModel

    seen = []
    original = UNet2DConditionModel.forward
    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda self, x, *a, **o: seen.append(len(x)) or original(self, x, *a, **o))
    case = cases.bench_sample(SampleConfig(model="tiny-sd", batch_size=2, steps=3, solver="ddim", device="cpu"), tmp_path)
    counts = []
    for side in (case.ours, case.bare()):
        seen.clear()
        side()
        counts.append(list(seen))
    assert counts[0] == counts[1] == [4] * 3 * cases.BATCHES
    assert case.images == 2 * cases.BATCHES


@pytest.mark.parametrize(("more", "forwards"), [({}, [4] * 6), ({"guidance_scale": 2.0}, [8] * 6)])
def test_both_sides_of_pairs_call_the_network_alike(more, forwards, tmp_path, monkeypatch):
    """Guidance asks for twice as many images in one call."""
    from diffusers import UNet2DModel

    seen, original = [], UNet2DModel.forward
    monkeypatch.setattr(UNet2DModel, "forward", lambda self, x, *a, **o: seen.append(len(x)) or original(self, x, *a, **o))
    config = PairsConfig(teacher="tiny", batch_size=4, steps=2, solver="ddim", device="cpu", **more)
    case = cases.bench_pairs(config, tmp_path)
    bare = case.bare()
    for side in (case.ours, bare):
        seen.clear()
        side()
        assert seen == forwards


def test_both_sides_of_latent_dmd_are_the_same_network(tmp_path):
    case = cases.training("dmd", DMDConfig(teacher="tiny-sd", batch_size=2, device="cpu", out=tmp_path / "o"), tmp_path)
    assert case.calls == "2 forwards, 2 x (forward, backward, optimizer)"  # guided teacher (twice the batch), fake score
    case.ours()
    case.bare()()


def test_what_a_recipe_names_is_made_where_it_is_not_there(distill, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = distill("bench", "dmd", "--recipe", "digits-dmd", "--repeats", 1, "--json", "--profile", "device=cpu", "batch_size=4")
    assert result.code == 0, result.err
    assert "bench: random, since it is not there: 16 pairs for runs/digits/pairs" in result.err
    data = result.json
    assert data["raw_calls"] == "2 forwards, 2 x (forward, backward, optimizer)"  # with the regression on pairs
    assert data["share_of_peak"] == pytest.approx(data["tflop"] / data["ours_seconds"] / data["peak_tflops"], rel=2e-3)
    shares = [each["share"] for each in data["profile"]]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert 0.3 < sum(shares) <= 1
    assert not (tmp_path / "runs").exists()


def test_the_arithmetic_of_a_step_is_counted_from_its_calls(tmp_path, tiny_pairs):
    """Teacher and fake score answer on 4 images, student (8) and fake score (4) are trained, which costs three evaluations."""
    case = cases.training("dmd", DMDConfig(teacher="tiny", batch_size=4, device="cpu", pairs=tiny_pairs), tmp_path)
    model = stand_ins.load("tiny")
    assert case.flop == (4 + 4 + 3 * (8 + 4)) * cost.evaluation(model)
    weights = sum(p.numel() for p in model.net.parameters())
    held = 4 * weights * 4 + 4 * 2 * 2 * weights  # three networks, an average; moments of two
    assert held + 4 * weights <= case.planned < held + 60 * weights * 4  # and a gradient, or activations, whichever is more


def small(monkeypatch):
    """Make sd15 a small network of the same classes."""
    wide = dict(block_out_channels=(8, 16), norm_num_groups=4)
    kinds = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    unet = dict(sample_size=8, cross_attention_dim=16, attention_head_dim=2, layers_per_block=1, **kinds, **wide)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    monkeypatch.setitem(stable_diffusion.UNETS, "sd15", unet)
    monkeypatch.setitem(stable_diffusion.TEXTS, "sd15", text)
    monkeypatch.setattr(stable_diffusion, "VAE", dict(latent_channels=4, layers_per_block=1, **blocks, **wide))


def test_a_recipe_of_stable_diffusion_runs_with_nothing_there(tmp_path, monkeypatch):
    small(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    settings = ["batch_size=4", "accumulate=2", "device=cpu"]
    case = cases.training("dmd", resolve(DMDConfig, "sd15-dmd", settings, {}), tmp_path, random=True)
    assert case.images == 2
    assert case.calls == "2 forwards, 2 x (forward, backward, optimizer)"  # teacher with and without its prompt in one call, fake score
    case.ours()
    case.bare()()


def test_random_weights_take_a_text_model_through_sampling(distill, monkeypatch, tmp_path):
    small(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    command = ["bench", "sample", "model=sd15", "steps=1", "batch_size=1", "device=cpu", "--repeats", 1, "--json"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not in the Hugging Face cache" in distill(*command).err
    result = distill(*command, "--random-weights")
    assert result.code == 0, result.err
    assert "weights of sd15's published architecture" in result.err
    assert result.json["images_per_second"] > 0


def test_random_weights_are_of_unit_scale_where_norms_multiply(monkeypatch):
    small(monkeypatch)
    model = stand_ins.StandIns("dmd", random=True).model("sd15")
    assert not any(value.is_meta for part in model.parts().values() for value in [*part.parameters(), *part.buffers()])
    norm = model.net.conv_norm_out
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()
    assert model.net.conv_in.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.conditioner.given(["a red circle"])(torch.zeros(1, dtype=torch.long)).parts["encoder_hidden_states"].std() > 0


def test_pictures_of_a_folder_that_is_not_there(distill, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--method=ect", "teacher=tiny", "data=/nowhere/at/all", "resolution=16", "batch_size=4", "device=cpu"]
    result = distill("bench", "cm", "--repeats", 1, "--json", *(each.removeprefix("--") for each in options))
    assert result.code == 0, result.err
    assert "40 pictures of 16 pixels" in result.err


def test_the_peak_is_that_of_a_product_in_the_type_of_the_arithmetic(monkeypatch):
    monkeypatch.setattr(measure, "SIDES", {"cpu": 256})
    monkeypatch.setattr(measure, "_timed", lambda work, where: work() is None or 0.001)
    rate, kind = measure.peak_of(torch.device("cpu"), "bf16")
    assert (rate, kind) == (pytest.approx(2 * 256**3 / 0.001), "bfloat16")


FAMILIES = {made.module: name for name, made in MADE.items() if name != "tiny"}


@pytest.mark.parametrize("name", [next(hub for hub, known in HUB.items() if known.module == module) for module in FAMILIES])
def test_random_weights_stand_in_for_every_family(name, distill, monkeypatch, tmp_path):
    def sketch(name):
        model = load(FAMILIES[HUB[name].module]).to("meta")
        for reader in model.text.readers.values():
            reader.tokenizer = None
            if isinstance(reader, LanguageReader):
                reader.encoder.bfloat16()  # as they are published
        return model

    monkeypatch.setattr(cost, "sketch", sketch)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shape = ["steps=1", "batch_size=1", "device=cpu", "--repeats", 1, "--random-weights", "--json"]
    result = distill("bench", "sample", f"model={name}", *shape)
    assert result.code == 0, result.err
    assert f"weights of {name}'s published architecture" in result.err
    assert result.json["images_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "against"),
    [
        ({"model": "tiny-sd", "resolution": 128}, "StableDiffusionPipeline, pndm 1"),
        ({"model": "tiny-sd", "solver": "heun"}, "1 forwards a batch of 2"),
        ({"model": "tiny-sd3", "solver": "dpm++"}, "1 forwards a batch of 2"),
        ({"model": "lora"}, "StableDiffusion3Pipeline, euler 1"),
    ],
)
def test_both_sides_of_a_sampling_make_the_same_pictures(options, against, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if options["model"] == "lora":
        adapter(tmp_path / "lora")
    case = cases.bench_sample(SampleConfig(**options, steps=1, batch_size=1, device="cpu"), tmp_path / "bench")
    case.ours()
    case.bare()()
    assert against in case.calls
    drawn = [Image.open(file).size for file in (tmp_path / "bench").rglob("*.png")]
    assert len(drawn) == case.images * (2 if "Pipeline" in against else 1)
    assert set(drawn) == {(options.get("resolution", 64),) * 2}


def test_what_bench_leaves_out_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = SampleConfig(model="tiny-sd", negative_prompt="grey", clip_guidance="clip", steps=1, batch_size=1, device="cpu")
    cases.bench_sample(config, tmp_path / "bench")
    said = capsys.readouterr().err
    assert "bench: clip_guidance: left out" in said
    assert "bench: negative_prompt: left out for prompts of shapes" in said

"""Teachers with LoRAs: the pictures that diffusers makes with the LoRA beside the model, and one line for what does not fit."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from distill_cli.errors import DistillError, UsageError
from distill_cli.models import load
from distill_cli.models.lora_keys import Layer, kohya_name, layers_of, split
from distill_cli.models.original import unet_names
from distill_cli.models.sources import names
from tests.models import pipelines

UNET, TEXT = ("to_q", "to_out.0", "proj_in", "net.2", "conv1", "samplers.0.conv"), ("q_proj", "out_proj", "fc1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    pipelines.pipeline(1).save_pretrained(folder)
    return folder


def loras(pipe, rank=2, seed=0):
    """Random LoRAs of the network and the text encoder, in peft's layout."""
    return pipelines.adapter(pipe.unet, rank, seed, UNET), pipelines.adapter(pipe.text_encoder, rank, seed + 1, TEXT)


def as_kohya(unet, text, alpha):
    """The same as kohya's scripts write them, with `alpha`."""
    out = {}
    for part, tensors in (("unet", unet), ("text_encoder", text)):
        for name, value in tensors.items():
            module, half = name.split(".lora_")
            module = module if part == "unet" or module.startswith("text_model.") else f"text_model.{module}"
            key = kohya_name(Layer(part, module))
            out[f"{key}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = value.contiguous()
            out[f"{key}.alpha"] = torch.tensor(alpha)
    return out


def ours(name):
    model = load(name)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(Path(name.split("+")[0]))
    pipe.unet, pipe.text_encoder = model.net, model.parts()["text_encoder"]
    pipe.set_progress_bar_config(disable=True)
    return pipelines.picture(pipe), model


def theirs(base, *files):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    for k, (file, _) in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=f"a{k}")
    pipe.set_adapters([f"a{k}" for k in range(len(files))], [weight for _, weight in files])
    return pipelines.picture(pipe)


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """A LoRA of diffusers, in a folder, and one of kohya's scripts with alpha 1 of rank 2, stored as a whole number."""
    place = tmp_path_factory.mktemp("loras+")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    unet, text = loras(pipe)
    kind = diffusers.StableDiffusionPipeline
    kind.save_lora_weights(place / "style", unet_lora_layers=unet, text_encoder_lora_layers=text)
    save_file(as_kohya(*loras(pipe, seed=7), 1), place / "kohya.safetensors")
    return place / "style", place / "kohya.safetensors"


def test_the_teachers_pictures_are_those_of_diffusers(base, files):
    """Both layouts on one model, each at its weight: text encoder, linear layers and convolutions, alpha other than the rank."""
    style, kohya = files
    plain = ours(str(base))[0]
    given = [(style, 0.7), (kohya, -0.4)]
    picture, model = ours("+".join([str(base), *(f"{file}@{weight}" for file, weight in given)]))
    torch.testing.assert_close(picture, theirs(base, *given), atol=1e-5, rtol=0)
    assert (picture - plain).abs().max() > 1e-2
    assert model.lineage.name == "base+style@0.7+kohya.safetensors@-0.4"
    assert [note.partition(" merged")[0] for note in model.notes[-2:]] == [f"LoRA {style}", f"LoRA {kohya}"]
    assert model.weights_hash() != load(str(base)).weights_hash()


def test_files_of_2023_and_options_in_the_header(base, files, tmp_path):
    """Names of diffusers' attention processors; alpha of adapter metadata, and of rsLoRA: alpha / sqrt(rank)."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    unet, text = pipelines.adapter(pipe.unet, 4, 0, ["to_q", "to_out.0"]), pipelines.adapter(pipe.text_encoder, 4, 1, ["q_proj"])
    new = {**{f"unet.{name}": value for name, value in unet.items()}, **{f"text_encoder.{name}": value for name, value in text.items()}}
    old = {}
    for name, value in new.items():
        name = name.replace(".to_q.", ".processor.to_q_lora.").replace(".to_out.0.", ".processor.to_out_lora.")
        name = name.replace(".q_proj.", ".to_q_lora.").replace("lora_A.", "down.").replace("lora_B.", "up.")
        old[name] = value
    save_file(new, tmp_path / "new.safetensors")
    save_file(old, tmp_path / "old.safetensors")
    hashes = {name: load(f"{base}+{tmp_path / name}.safetensors").weights_hash() for name in ("new", "old")}
    assert hashes["new"] == hashes["old"]
    for root, alpha in ((False, 8.0), (True, 4.0)):
        said = {
            f"{part}.{key}": value
            for part in ("unet", "text_encoder")
            for key, value in dict(r=4, lora_alpha=alpha, use_rslora=root).items()
        }
        save_file(new, tmp_path / "said.safetensors", {"lora_adapter_metadata": json.dumps(said)})
        twice, expected = (load(f"{base}+{tmp_path / name}").net for name in ("said.safetensors", "new.safetensors@2"))
        for a, b in zip(twice.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("version", [1, 3])
def test_names_of_kohyas_scripts_have_the_layers_of_diffusers_converter(version):
    """Every layer in attentions and resnets of small networks, XL by the original blocks, and both text encoders."""
    pipe = pipelines.pipeline(version)
    networks = {name: part for name, part in pipelines.networks(pipe).items() if name != "vae"}
    layers, original = layers_of(networks), unet_names(pipe.unet.config) if version == 3 else None
    unet = pipelines.adapter(pipe.unet, 1, 0, ("to_q", "to_out.0", "proj_in", "net.2", "conv1", "conv_shortcut", "time_emb_proj"))
    for module in {name.split(".lora_")[0] for name in unet}:
        key = kohya_name(Layer("unet", module), original)
        assert layers[key] == ("unet", module)
        halves = {f"{key}.lora_{half}.weight": torch.zeros(1) for half in ("down", "up")}
        found = type(pipe).lora_state_dict(halves, unet_config=pipe.unet.config)[0]
        assert layers[split(next(iter(found)))[0]] == ("unet", module)
    if version == 3:
        assert layers["lora_te2_text_model_encoder_layers_1_mlp_fc1"].part == "text_encoder_2"
        assert layers["lora_te1_text_model_encoder_layers_1_mlp_fc1"].part == "text_encoder"


def test_what_does_not_fit_is_refused_in_one_line(base, tmp_path):
    """By its first key; nothing is left out silently, as diffusers does."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    good = {f"unet.{name}": value for name, value in pipelines.adapter(pipe.unet, 2, 0, ["to_q"]).items()}
    first = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = f"{first}.lora_A.weight", f"{first}.lora_B.weight"
    cases = {
        "other architecture": (
            good | {"unet.down_blocks.3.resnets.0.conv1.lora_A.weight": torch.zeros(1)},
            "down_blocks.3.*is of no layer of the model",
        ),
        "unknown": (
            good | {"transformer.x.lora_A.weight": torch.zeros(1)},
            r"transformer.x.lora_A.weight is of no layer of the model \(1 of 17 keys\)",
        ),
        "half": ({key: value for key, value in good.items() if key != b}, "lora_A.weight has no other half: .*attn1.to_q lacks its up"),
        "shape": (good | {a: torch.zeros(2, 9)}, r"have shapes \(2, 9\) and \(8, 2\), which do not fit \(8, 8\)"),
        "rank": (good | {b: torch.zeros(8, 3)}, r"have shapes \(2, 8\) and \(8, 3\)"),
        "twice": (good | {f"{first}.lora_down.weight": torch.zeros(1)}, "are of the same layer"),
        "dora": (good | {f"{first}.lora_magnitude_vector": torch.zeros(8)}, "a DoRA, by its .*lora_magnitude_vector"),
        "loha": ({"lora_unet_x.hada_w1_a": torch.zeros(1)}, "a LoHa, by its lora_unet_x.hada_w1_a"),
        "lokr": ({"lora_unet_x.lokr_w1": torch.zeros(1)}, "a LoKr"),
        "nan": (good | {a: good[a] * torch.nan}, "the change to .*attn1.to_q is not finite"),
        "alpha": (good | {f"{first}.alpha": torch.ones(2)}, "the alpha of .*attn1.to_q is nan, not one number"),
        "none": ({}, "no tensors"),
    }
    for name, (tensors, message) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(DistillError, match=message):
            load(f"{base}+{tmp_path / name}.safetensors")
    with pytest.raises(DistillError, match="no such LoRA file"):
        load(f"{base}+gone.safetensors")
    with pytest.raises(DistillError, match="no pytorch_lora_weights.safetensors in the folder"):
        load(f"{base}+{tmp_path}")
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(DistillError, match="only safetensors|not a .safetensors file"):
        load(f"{base}+{tmp_path / 'x.pt'}")


def test_names_are_cut_at_pluses_outside_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c++").mkdir()
    (tmp_path / "c++/a@2").touch()
    assert names.split("c++") == ("c++", ())
    assert names.split("c+++c++/a@2@0.5") == ("c++", ((Path("c++/a@2"), 0.5),))
    assert names.split("sd15+s.safetensors@-1+c++/a@2") == ("sd15", ((Path("s.safetensors"), -1.0), (Path("c++/a@2"), 1.0)))
    assert names.absolute("sd15+c++/a@2@0.25", ["sd15"]) == f"sd15+{tmp_path}/c++/a@2@0.25"
    for wrong in ("sd15+", "sd15+x@0", "sd15+x@nan", "sd15+x@much"):
        with pytest.raises(UsageError, match="a \\+ without a file|is no weight other than 0"):
            names.split(wrong)


def test_commands_take_them_and_a_run_goes_on_from_elsewhere(distill, tmp_path, monkeypatch):
    """The first line says what was merged, the student's lineage names it; --resume finds a file that was named relatively."""
    low = pipelines.adapter(load("tiny").net, 2, 0, ["conv1"])
    save_file({f"unet.{name}": value * 0.1 for name, value in low.items()}, "style.safetensors")
    name = "tiny+style.safetensors@0.5"
    assert distill("models", "show", name, "--json").json["name"] == name
    options = ["--steps", "1", "--out", "run", "--device", "cpu", "batch_size=1", "sample_every=100"]
    done = distill("cm", "--method", "cd", "--data", "digits", "--teacher", name, *options)
    assert done.code == 0, done.err
    assert "LoRA style.safetensors merged at weight 0.5: layers" in done.err
    assert json.loads(Path("run/student/distill.json").read_text())["lineage"]["teacher"] == name
    assert f"tiny+{tmp_path}/style.safetensors@0.5" in Path("run/recipe.yaml").read_text()
    monkeypatch.chdir("/")
    done = distill("cm", "--resume", tmp_path / "run", "--steps", "2")
    assert done.code == 0, done.err


def test_a_dry_run_downloads_nothing_and_holds_the_file_against_the_architecture(base, files, distill):
    style, kohya = files
    done = distill("dmd", "--teacher", f"sd15+{kohya}", "--prompts", "shapes", "--dry-run")
    assert (done.code, "is of no layer of the model" in done.err) == (1, False), done.err
    assert "which do not fit (3072, 768)" in done.err
    assert "download" in distill("models", "show", f"sd15+{style}").out

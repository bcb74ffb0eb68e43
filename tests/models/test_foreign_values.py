"""Values in foreign folders that a type or a bound refuses: one line that names the file and the key, never a wrong picture."""

import json
import shutil

import pytest
import torch

from distill_cli.errors import DistillError
from distill_cli.models import classifier, load
from distill_cli.models.formats import save
from distill_cli.models.parts import check_file, load_network, quiet
from distill_cli.models.sources import convert
from tests.models.test_foreign_folders import DDPM, UNET, configure, pixels, refused, rewrite, whole  # noqa: F401
from tests.models.test_single_file import beside, written  # noqa: F401

SCHEDULER, TOKENIZER, NETWORK = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "unet/config.json"
STUDENT = {"solver": "few-step", "steps": 1, "knows": "every level", "answers": "endpoint", "guidance": "inside", "times": [80.0, 1.4]}
VALUES = [
    *((TOKENIZER, {"model_max_length": value}, "model_max_length") for value in (0, -1, "77", 1, 7.5)),
    (TOKENIZER, {"tokenizer_class": "T5Tokenizer"}, "tokenizer_class"),
    *((NETWORK, {"sample_size": size}, "sample_size") for size in ([8], [8, 8, 8], 8.0, "8", "888", True, [], {}, 0, -8, [8, 0])),
    (SCHEDULER, {"prediction_type": ["epsilon"]}, "prediction_type"),
    (SCHEDULER, {"beta_schedule": {"a": 1}}, "beta_schedule"),
    (SCHEDULER, {"timestep_spacing": ["leading"]}, "timestep_spacing"),
    (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "2 trained_betas"),
    (SCHEDULER, {"_class_name": "DDIMScheduler"}, 'model_index.json names "PNDMScheduler"'),
    *(("vae/config.json", {"scaling_factor": value}, "scaling_factor is") for value in (float("inf"), True, "1", 0)),
    ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, "T5Tokenizer"),
    ("model_index.json", {"unet": []}, "its unet is missing"),
]


@pytest.mark.parametrize(("file", "values", "says"), VALUES, ids=str)
def test_values_of_another_form(whole, tmp_path, file, values, says):  # noqa: F811
    shutil.copytree(whole, tmp_path / "m")
    configure(tmp_path / "m" / file, **values)
    refused(tmp_path / "m", says)


@pytest.mark.parametrize("size", [[16, 16, 16], "16", 16.0, True, [], 0])
def test_sizes_of_pixel_models(tmp_path, size):
    configure(pixels(tmp_path / "m", DDPM) / NETWORK, sample_size=size)
    refused(tmp_path / "m", "sample_size is ")


def test_a_tokenizer_without_its_words(whole, tmp_path):  # noqa: F811
    """transformers makes an empty one, and every prompt the same tokens."""
    folder = shutil.copytree(whole, tmp_path / "m") / "tokenizer"
    (folder / "tokenizer.json").unlink(missing_ok=True)
    words = json.loads((folder / "vocab.json").read_text())

    def written(**change):
        (folder / "vocab.json").write_text(json.dumps({key: value for key, value in (words | change).items() if value is not None}))

    assert load(str(tmp_path / "m")).text.readers["text_encoder"].tokens(["a red circle"]).unique().numel() > 3
    written(**{"circle</w>": 9999})
    refused(tmp_path / "m", "'circle</w>' is word 9999")
    written(ÿ=None)
    refused(tmp_path / "m", "lacks 'ÿ'")
    written(**{"<|endoftext|>": None})
    refused(tmp_path / "m", "lacks '<|endoftext|>'")
    written()
    (folder / "merges.txt").unlink()
    refused(tmp_path / "m", "no vocabulary")


def test_a_text_encoder_of_another_shape(whole, tmp_path):  # noqa: F811
    shutil.copytree(whole, tmp_path / "m")
    name = "text_model.final_layer_norm.bias"
    rewrite(tmp_path / "m/text_encoder/model.safetensors", lambda w: w | {name: torch.zeros(3)})
    refused(tmp_path / "m", "final_layer_norm.bias is of another shape")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampler", {"steps": 0}),
        ("sampler", {"solver": "none"}),
        ("sampler", {"guidance_scale": float("nan")}),
        *(
            ("sampler", {"guidance": "inside", "times": times})
            for times in ([], [1.0, 2.0], [0.0], [1e9], [float("nan")], [float("inf")], [-1.0])
        ),
        *(("learned", learned) for learned in ([], [10], [-1])),
        *(("null_label", label) for label in (3, -1, 11)),
        ("time_input", "t"),
        *(("parameterisation", name) for name in ("eps", "v", "x0", "flow")),
        ("sampler", []),
        ("sampler", {"answers": "endpoint"}),
        ("sampler", STUDENT | {"guidance": "outside"}),
        ("sampler", STUDENT | {"solver": "heun"}),
        ("sampler", STUDENT | {"answers": "mean"}),
        ("sampler", STUDENT | {"knows": "pure noise", "steps": 3}),
        ("sampler", STUDENT | {"knows": "own times", "answers": "mean", "solver": "euler", "steps": 3}),
    ],
    ids=str,
)
def test_what_distill_json_may_say(tmp_path_factory, key, value):
    folder = tmp_path_factory.getbasetemp() / "values-tiny"
    if not folder.exists():
        save(load("tiny"), folder)
    before = (folder / "distill.json").read_text()
    try:
        configure(folder / "distill.json", **{key: value})
        refused(folder, f"distill.json: {key}")
    finally:
        (folder / "distill.json").write_text(before)


@pytest.mark.parametrize(
    ("key", "value"),
    [*(("sampling", value) for value in ([1], "abc", None, 0)), *(("lineage", value) for value in ("x", [1], None))],
    ids=str,
)
@pytest.mark.parametrize("times", [None, [80.0]], ids=str)
def test_what_distill_json_of_format_1_may_say(key, value, times, tmp_path):
    save(load("tiny"), tmp_path / "m")
    path = tmp_path / "m/distill.json"
    stored = json.loads(path.read_text())
    sampling = {"solver": "heun" if times is None else "few-step", "steps": 1}
    old = {name: stored[name] for name in stored if name != "sampler"} | {"format": 1, "sampling": sampling, "few_step_times": times}
    path.write_text(json.dumps(old))
    assert load(str(tmp_path / "m")).sampler.teaches == (times is None)
    path.write_text(json.dumps(old | {key: value}))
    refused(tmp_path / "m", f"distill.json: {'sampler' if key == 'sampling' else key}")


def test_no_student_of_every_level_is_of_a_table(tmp_path):
    """Its other times are points of a grid, which a table has not."""
    save(load("tiny-sd"), tmp_path / "m")
    configure(tmp_path / "m/distill.json", sampler=STUDENT | {"times": [999.0]})
    refused(tmp_path / "m", "distill.json: sampler")


def test_distill_json_of_another_prediction(tmp_path):
    save(load("tiny-sd"), tmp_path / "m")
    configure(tmp_path / "m/distill.json", parameterisation="v")
    refused(tmp_path / "m", 'distill.json: parameterisation is "v"')


def test_an_incomplete_variant_hides_no_complete_one(tmp_path, capfd):
    import diffusers

    quiet()
    unet = pixels(tmp_path / "m", DDPM) / "unet"
    whole_file, half = unet / UNET, unet / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(whole_file, half)
    index = unet / f"{UNET}.index.json"
    for make in (
        lambda: whole_file.write_bytes(b""),
        lambda: whole_file.write_bytes(b"version https://git-lfs"),
        lambda: whole_file.symlink_to("nowhere"),
        lambda: index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}})),
        lambda: index.write_text(json.dumps({"weight_map": {"a": ["x"]}})),
    ):
        for file in (whole_file, index):
            file.unlink(missing_ok=True)
        make()
        load_network(diffusers.UNet2DModel, unet)
        assert "the fp16 weights are read" in capfd.readouterr().err
    shutil.copy(half, whole_file)  # beside a stale index
    load_network(diffusers.UNet2DModel, unet)
    assert capfd.readouterr().err == ""


def test_an_empty_file_behind_a_link_is_named(tmp_path):
    (tmp_path / "blob").touch()
    (tmp_path / "link").symlink_to("blob")
    with pytest.raises(DistillError, match="blob") as caught:
        check_file(tmp_path / "link")
    assert "delete both" in caught.value.hint


def test_a_classifier_of_other_numbers(tmp_path):
    classifier.load("digits").save(tmp_path)
    for change, says in ((lambda v: v.to(torch.int8), "kept as"), (lambda v: v * torch.nan, "no number")):
        classifier.load("digits").save(tmp_path)
        rewrite(tmp_path / "model.safetensors", lambda w, change=change: {key: change(value) for key, value in w.items()})
        with pytest.raises(DistillError, match=says):
            classifier.load(str(tmp_path))


def test_conversions_rehearse(tmp_path):
    from tests.models.published import CIFAR10, nvlabs_shapes, write_nvlabs

    small = dict(CIFAR10, img_resolution=17, model_channels=16, num_blocks=1, attn_resolutions=[4], channel_mult=[1, 2], label_dim=3)
    state = {name: torch.zeros(shape) for name, shape in nvlabs_shapes(small).items()}
    with pytest.raises(DistillError, match=r"x\.pkl: the network does not take \(3, 17, 17\)"):
        convert.convert_file(write_nvlabs(state, small, tmp_path / "x.pkl"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_openai_files_rehearse(tmp_path):
    from tests.models.published import openai_shapes

    tensors = {name: torch.zeros(shape) for name, shape in openai_shapes(32, [1, 2], 1, [False, True], 0).items()}
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(DistillError, match="--resolution 63: the network does not take"):
        convert.convert_file(tmp_path / "x.pt", tmp_path / "m", size=63, head=32)
    torch.save({name: value.to(torch.int8) for name, value in tensors.items()}, tmp_path / "x.pt")
    with pytest.raises(DistillError, match="kept as torch.int8"):
        convert.convert_file(tmp_path / "x.pt", tmp_path / "m", size=64, head=32)
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DistillError, match="before version 1.6"):
        convert.open_file(tmp_path / "x.pt")
    (tmp_path / "p.txt").write_text("a circle")
    with pytest.raises(DistillError, match=r"not a \.pkl, \.pt or \.safetensors file"):
        convert.open_file(tmp_path / "p.txt")


def test_what_a_single_file_has_beside(beside):  # noqa: F811
    scale = load(str(beside / "whole")).codec.vae.config["scaling_factor"]
    model = load(written(beside, lambda w: w | {"more.weight": torch.zeros(1), "scale_factor": torch.tensor(scale)}))
    assert any("1 tensors of no part left out, such as more.weight" in note for note in model.notes)
    network = {"model.diffusion_model.": "model.diffusion_model._orig_mod."}
    for change, says in (
        (lambda w: w | {"first_stage_model.more": torch.ones(2)}, "first_stage_model.more has no place"),
        (lambda w: w | {"scale_factor": torch.tensor(scale / 2)}, "scale_factor differs from"),
        (lambda w: w | {"alphas_cumprod": torch.linspace(1, 0, 1000)}, "alphas_cumprod differs from"),
        (lambda w: {f"{network[k[:22]]}{k[22:]}" if k[:22] in network else k: v for k, v in w.items()}, "its UNet"),
        (lambda w: w | {f"model_ema.{k[6:].replace('.', '')}": v.to(torch.int8) for k, v in w.items() if k[:22] in network}, "kept as I8"),
    ):
        with pytest.raises(DistillError, match=says):
            load(written(beside, change))

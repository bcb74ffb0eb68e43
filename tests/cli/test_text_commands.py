"""The commands on a model with text: what they write, and one line for what they cannot do."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from distill_cli.diffusion.noise import Draws
from distill_cli.models import load
from distill_cli.models.formats import save
from tests.cli.test_bad_input import one_line
from tests.looking import no_memory

DMD = ("dmd", "--teacher", "tiny-sd", "--steps", 4, "batch_size=4", "log_every=2", "save_every=2", "sample_every=0", "warmup_steps=0")


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a small red circle\na large blue cross\n" + "word " * 30 + "\n")
    return "prompts.txt"


def test_sample_names_prompts_and_seed(distill, prompts, tmp_path):
    done = distill(
        "sample", "--model", "tiny-sd", "--prompts", prompts, "--images-per-prompt", 2, "--steps", 2, "--seed", 5, "--grid", "--out", "s"
    )
    assert done.code == 0, done.err
    assert "1 of 3 prompts are longer than the 16 tokens" in done.err
    assert "longer" not in distill("sample", "--model", "tiny-sd", "--prompts", prompts, "--num", 1, "--steps", 1, "--out", "first").err
    lines = [json.loads(line) for line in (tmp_path / "s/samples.jsonl").read_text().splitlines()]
    assert [line["prompt"].split()[1] for line in lines] == ["small", "small", "large", "large", "word", "word"]
    assert {line["seed"] for line in lines} == {5}
    first = np.asarray(Image.open(tmp_path / "s" / lines[0]["file"]))
    assert first.shape == (64, 64, 3)
    assert not np.array_equal(first, np.asarray(Image.open(tmp_path / "s" / lines[1]["file"])))
    grid = np.asarray(Image.open(tmp_path / "s/grid.png"))
    assert grid.shape[0] > 4 * 64 + 12  # captions below the pictures
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").glob("*.png")}
    (tmp_path / "s/000003.png").unlink()
    (tmp_path / "s/000002.png").unlink()
    again = distill(
        "sample", "--model", "tiny-sd", "--prompts", prompts, "--images-per-prompt", 2, "--steps", 2, "--seed", 5, "--grid", "--out", "s"
    )
    assert again.code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").glob("*.png")} == before
    (tmp_path / "other.txt").write_text("something else\n" * 3)
    others = ("--prompts", "other.txt", "--images-per-prompt", 2, "--steps", 2, "--seed", 5, "--out", "s")
    one_line(
        distill("sample", "--model", "tiny-sd", *others),
        2, "made with other settings: prompts",
    )  # fmt: skip


def test_a_negative_prompt_changes_the_picture(distill, prompts, tmp_path):
    for name, negative in (("a", ""), ("b", "pink"), ("c", "")):
        done = distill(
            "sample",
            "--model",
            "tiny-sd",
            "--prompts",
            prompts,
            "--num",
            1,
            "--steps",
            2,
            "--out",
            name,
            *(("--negative-prompt", negative) if negative else ()),
        )
        assert done.code == 0, done.err
    a, b, c = ((tmp_path / name / "000000.png").read_bytes() for name in "abc")
    assert a == c != b


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_main_job_on_text(distill, prompts, tmp_path, precision):
    """pairs, dmd, sample: the student opens in plain diffusers, and a restart makes what is missing."""
    options = (
        "--teacher",
        "tiny-sd",
        "--prompts",
        prompts,
        "--num",
        9,
        "--steps",
        2,
        "batch_size=4",
        "shard_size=4",
        f"precision={precision}",
    )
    assert distill("pairs", *options, "--out", "p").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "p").rglob("*.safetensors")}
    (tmp_path / "p/shard-000001.safetensors").unlink()
    shutil.rmtree(next((tmp_path / "p").glob("text-*")))
    assert distill("pairs", *options, "--out", "p").code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "p").rglob("*.safetensors")} == before
    (tmp_path / prompts).unlink()  # the store has its own copy
    assert distill("pairs", "--check", "p").code == 0
    kept = (tmp_path / "p/prompts.jsonl").read_text()
    (tmp_path / "p/prompts.jsonl").write_text(kept.replace("red", "rad"))
    one_line(distill(*DMD, "--pairs", "p", "--out", "d"), 1, "prompts.jsonl: corrupt")
    checked = distill("pairs", "--check", "p")
    assert checked.code == 1
    assert "prompts.jsonl: corrupt" in checked.err
    (tmp_path / "p/prompts.jsonl").write_text(kept)
    AcceleratorState._reset_state(True)  # one precision a process
    done = distill(*DMD, "--pairs", "p", "--out", "d", f"precision={precision}")
    AcceleratorState._reset_state(True)
    assert done.code == 0, done.err
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "d/student")
    (tmp_path / "q.txt").write_text("a large blue cross\n")
    assert distill("sample", "--model", "d", "--prompts", "q.txt", "--seed", 3, "--out", "s").code == 0
    latents = Draws(3, [0]).normal("prior", (4, 8, 8))
    theirs = pipeline("a large blue cross", latents=latents, num_inference_steps=1, guidance_scale=1, output_type="np").images[0]
    ours = np.asarray(Image.open(tmp_path / "s/000000.png"))
    assert abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1
    assert (abs(ours / 255 - theirs) < 1 / 255).all()
    card = (tmp_path / "d/student/README.md").read_text()
    for text in ("tiny-sd", "Apache-2.0", "guidance_scale", "command: dmd", "num_inference_steps=1"):
        assert text in card


def test_prompts_without_pairs_are_not_embedded(distill, tmp_path):
    """Of 9 prompts 4 have pairs: their embeddings are made once, and `dmd` finds them."""
    (tmp_path / "many.txt").write_text("".join(f"a red circle {k}\n" for k in range(9)))
    assert distill("pairs", "--teacher", "tiny-sd", "--prompts", "many.txt", "--num", 4, "--steps", 1, "--out", "p").code == 0
    (made,) = (tmp_path / "p").glob("text-*/shard-*.safetensors")
    assert load_file(made)["text"].shape[0] == 4
    before = made.stat().st_mtime_ns
    assert distill(*DMD, "--pairs", "p", "--out", "d").code == 0
    assert [path.stat().st_mtime_ns for path in (tmp_path / "p").glob("text-*/shard-*")] == [before]


def test_parts_of_the_loss_alone(distill, tmp_path):
    """Each part of the matching and regression can be left out, on pairs of a model with text."""
    assert distill("pairs", "--teacher", "tiny-sd", "--num", 4, "--steps", 1, "--out", "p").code == 0
    for k, options in enumerate((("regression_weight=0", "match_pairs=true", "regression_loss=lpips"), ("matching_weight=0",))):
        done = distill(*DMD, "--pairs", "p", *options, "--out", f"d{k}")
        assert done.code == 0, done.err
        line = json.loads((tmp_path / f"d{k}/metrics.jsonl").read_text().splitlines()[-1])
        assert ("regression_loss" in line) == (k == 1)
        assert ("matching_loss" in line) == (k == 0)


def test_a_student_of_another_resolution_keeps_it(distill, tmp_path):
    assert distill("pairs", "--teacher", "tiny-sd", "--num", 4, "--steps", 1, "resolution=32", "--out", "p").code == 0
    assert distill(*DMD, "--pairs", "p", "--out", "d").code == 0
    assert distill("sample", "--model", "d", "--num", 1, "--out", "s").code == 0
    assert Image.open(tmp_path / "s/000000.png").size == (32, 32)
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "d/student")
    assert pipeline("a red circle", num_inference_steps=1, guidance_scale=1).images[0].size == (32, 32)


def test_folders_of_before_there_was_text_go_on(distill, tmp_path):
    """Pairs and samples whose settings say nothing of prompts are those without them."""
    from distill_cli.files import sealed, unsealed

    jobs = (
        ("pairs", "--teacher", "tiny", "--num", 4, "--steps", 1, "--out", "p"),
        ("sample", "--model", "tiny", "--num", 4, "--steps", 1, "--out", "s"),
    )
    for job, file in zip(jobs, ("p/manifest.json", "s/sampling.json")):
        assert distill(*job).code == 0
        path = tmp_path / file
        stored = unsealed(path.read_bytes())
        for key in ("guidance_calls", "prompts", "negative_prompt", "images_per_prompt"):
            stored.pop(key, None)
        path.write_text(sealed(stored, indent=2))
        assert distill(*job).code == 0
    assert distill("pairs", "--check", "p").code == 0


def test_clip_score(distill, prompts, tmp_path):
    """The score is 100 max(cos, 0) of transformers' own embeddings."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from distill_cli.data.pictures import to_uint8
    from distill_cli.evaluate.text import CLIP
    from distill_cli.models import load
    from distill_cli.models.text import save_tokenizer

    tokenizer = load("tiny-sd").text.tokenizers()["tokenizer"]
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=8, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=8
    )
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).eval()
    model.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path / "clip")
    save_tokenizer(tokenizer, tmp_path / "clip")
    pictures = to_uint8(torch.rand(2, 3, 64, 64) * 2 - 1)
    scores = CLIP(str(tmp_path / "clip"), torch.device("cpu")).scores(pictures, ["a red circle", "a cross"])
    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "clip")(list(pictures), return_tensors="pt").pixel_values
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
        tokens = tokenizer(["a red circle", "a cross"], padding="max_length", max_length=16, return_tensors="pt").input_ids
        read = model.text_projection(model.text_model(tokens).pooler_output)
    assert torch.allclose(scores, 100 * torch.nn.functional.cosine_similarity(seen, read).clamp(min=0), atol=1e-2)
    done = distill("evaluate", "--model", "tiny-sd@2", "--prompts", prompts, "--clip", "clip", "--out", "e", "--json")
    assert done.code == 0, done.err
    row = done.json["rows"][0]
    assert row["images"] == 3
    assert row["network_evaluations"] == 6
    assert 0 <= row["clip_score"] <= 100
    assert (tmp_path / "e/picture.png").exists()
    asked = [line.strip() for line in (tmp_path / prompts).read_text().splitlines()]
    made = np.stack([np.asarray(Image.open(tmp_path / f"e/samples/0-tiny-sd@2/{i:06d}.png")) for i in range(3)])
    scores = CLIP("clip", torch.device("cpu")).scores(made, asked).tolist()
    page = (tmp_path / "e/report.html").read_text()
    captions = [page.index(f"<div>{scores[i]:.2f}: {asked[i]}</div>") for i in sorted(range(3), key=scores.__getitem__)[:2]]
    assert captions == sorted(captions)  # the worst first, each with its prompt


def test_bad_input(distill, prompts, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    sample = ("sample", "--model", "tiny-sd", "--num", 1, "--out", "s")
    one_line(distill(*sample, "--prompts", "nothing.txt"), 1, "--prompts nothing.txt: no such file")
    one_line(distill(*sample, "--prompts", "empty.txt"), 1, "no prompts")
    one_line(distill(*sample, "--prompts", "binary.txt"), 1, "not a text file")
    one_line(distill(*sample, "--prompts", "bad.jsonl"), 1, "bad.jsonl line 2: not JSON")
    one_line(distill(*sample, "--prompts", prompts, "--guidance-scale", 0.5), 2, "--guidance-scale 0.5: below 1")
    one_line(
        distill(*sample, "--prompts", prompts, "resolution=60"), 2, "resolution 60: the autoencoder and the network make multiples of 16"
    )
    one_line(distill(*sample, "--classes", 3), 2, "the model has no classes")
    one_line(distill("sample", "--model", "tiny", "--prompts", prompts, "--out", "s"), 2, "--prompts: tiny has no text")
    one_line(distill("sample", "--model", "tiny", "--negative-prompt", "ugly", "--out", "s"), 2, "--negative-prompt: tiny has no text")
    one_line(
        distill("sample", "--model", "tiny", "resolution=32", "--out", "s"), 2, "resolution 32: tiny makes pictures of 16 pixels alone"
    )
    one_line(distill("sample", "--model", "tiny", "--solver", "pndm", "--out", "s"), 2, "--solver pndm")
    one_line(distill("evaluate", "--model", "tiny-sd", "--out", "e"), 2, "makes pictures of prompts")
    one_line(distill("evaluate", "--model", "tiny-sd", "--prompts", prompts, "--out", "e"), 2, "CLIP model: none given")
    one_line(
        distill("evaluate", "--model", "tiny-sd", "--prompts", prompts, "--clip", "none", "--out", "e"),
        2,
        "clip none: no CLIP model of that name",
    )
    assert not (tmp_path / "s").exists()
    assert distill("pairs", "--teacher", "tiny-sd", "--num", 4, "--steps", 1, "--out", "p").code == 0
    lpips = distill(*DMD, "--pairs", "p", "--out", "d", "regression_loss=lpips", "lpips_weights=vgg.pth")
    one_line(lpips, 1, "lpips_weights vgg.pth: no such file")
    one_line(distill(*DMD, "decoder=x", "--out", "d"), 2, "decoder is for regression_loss=lpips")
    one_line(distill(*sample, "--prompts", prompts, "--solver", "ddim", "--steps", 1000), 2, "--steps 1000: the model has 1000 times")
    one_line(
        distill("evaluate", "--model", "tiny-sd", "--prompts", prompts, "classifier=x", "--out", "e"), 2, "classifier is not for prompts"
    )
    one_line(distill("evaluate", "--model", "tiny", "guidance_scale=3", "--out", "e"), 2, "guidance_scale needs prompts")
    save(load("tiny-sd"), tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder/vae")
    for command in ("sample", "--model"), ("pairs", "--teacher"), ("dmd", "--teacher"):
        one_line(distill(*command, "folder", "--out", "x"), 1, "folder/vae: no such folder")
    one_line(distill("pairs", "--teacher", "sd15", "--prompts", prompts, "--out", "q"), 1, "not in the Hugging Face cache")


def test_plans_and_licences_without_a_download(distill, prompts):
    shown = distill("models", "show", "sd15")
    assert shown.code == 0
    assert "CreativeML Open RAIL-M" in shown.out
    assert "2134 MB" in shown.out
    plan = distill("pairs", "--teacher", "tiny-sd", "--prompts", prompts, "--num", 10, "--dry-run").out
    assert "text embeddings" in plan
    assert "of 3 prompts" in plan
    plan = distill("pairs", "--recipe", "sd15-pairs", "--prompts", prompts, "--dry-run").out
    assert "download: sd15: about 2134 MB" in plan
    assert "51,000,000 (102 an image), each of 803 GFLOP" in plan
    assert "disk: 16386.0 MB" in plan  # 4 x 64 x 64 in fp16, and a label
    plan = distill("sample", "--model", "sd15", "--prompts", prompts, "--dry-run").out
    assert "download: sd15" in plan
    with no_memory():  # which tests/test_recipes.py counts
        plan = distill("dmd", "--recipe", "sd15-dmd", "--dry-run").out
    assert "fake 859,520,964, vae 83,653,863" in plan  # the published sizes


def test_a_text_teacher_is_trained_from_captions(distill, tmp_path):
    """`distill vae`, then `distill train vae=...`: a pipeline that samples; the scale makes its latents' deviation 1."""
    small = ("network.channels=[8,8,8,8]", "network.groups=4", "log_every=1", "--batch-size", 4)
    assert distill("vae", "--data", "shapes", "--steps", 2, *small, "--out", "v").code == 0
    from distill_cli.data.shapes import Shapes
    from distill_cli.diffusion.noise import Draws
    from distill_cli.models import stable_diffusion
    from distill_cli.models.codec import VAECodec

    codec = VAECodec(stable_diffusion.load_vae(tmp_path / "v/vae"))
    images, _ = Shapes().batch(range(200), Draws(3, range(200)))
    with torch.no_grad():
        mean, spread = codec.encode(images)
    assert (mean.var() + spread.square().mean()).sqrt().item() == pytest.approx(1, abs=0.1)
    train = (
        "network.channels=[16,16]",
        "network.attention=[false,true]",
        "network.groups=4",
        "network.head=8",
        "text.width=16",
        "text.heads=2",
    )
    done = distill(
        "train",
        "--data",
        "shapes",
        "vae=v",
        "prediction=v",
        "variants=1",
        *train,
        "--steps",
        2,
        "--batch-size",
        4,
        "log_every=1",
        "--out",
        "t",
    )
    assert done.code == 0, done.err
    assert distill("sample", "--model", "t", "--num", 2, "--steps", 2, "--out", "s").code == 0
    assert json.loads((tmp_path / "s/samples.jsonl").read_text().splitlines()[0])["prompt"].startswith("a small red circle")
    one_line(distill("train", "--data", "digits", "vae=v/vae", "prediction=v", "--out", "u"), 2, "has no captions")
    one_line(distill("train", "--data", "shapes", "vae=v/vae", "--out", "u"), 2, "prediction edm is for pixels")

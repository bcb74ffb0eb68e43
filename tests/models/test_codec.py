"""How latents become pictures in a sampling job: another decoder, tiles, half precision."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from distill_cli.config import SampleConfig
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError, UsageError
from distill_cli.models import formats, load
from distill_cli.models.codec import VAECodec
from distill_cli.sample.batch import sample
from tests.contracts.running import call

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory):
    """An AutoencoderTiny with random weights for the latents of tiny-sd."""
    folder = tmp_path_factory.mktemp("decoder") / "taesd"
    torch.manual_seed(1)
    levels = (8,) * (1 + int(math.log2(load("tiny-sd").codec.factor)))
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=levels, decoder_block_out_channels=levels, num_encoder_blocks=(1,) * len(levels),
        num_decoder_blocks=(1,) * len(levels), latent_channels=4,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def test_another_decoder_makes_the_pictures_that_it_makes_in_diffusers(tiny_decoder, tmp_path):
    """The pipeline with this `vae`, from the same noise; a line says how far it is from the model's own."""
    out = tmp_path / "samples"
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")
    job = ["sample", "--model", "tiny-sd", "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--guidance-scale", "2",
           "--device", "cpu", "--out", str(out)]  # fmt: skip
    err = call([*job, "--decoder", str(tiny_decoder)]).check().err
    model = load("tiny-sd")
    formats.save(model, tmp_path / "pipeline")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae = diffusers.AutoencoderTiny.from_pretrained(tiny_decoder)
    x = Draws(0, [0]).normal("prior", model.shape)
    made = pipeline([PROMPT], latents=x, num_inference_steps=2, guidance_scale=2.0, output_type="np").images[0]
    assert np.abs(picture(out / "000000.png") - np.rint(made * 255)).max() <= 1
    own = model.codec.apart(model.codec.with_decoder(str(tiny_decoder)))
    assert own > 0
    assert f"decoder {tiny_decoder}: a test picture is {own:.1f} of 255 from that of the model's own decoder, in the mean" in err
    assert model.codec.apart(model.codec) == 0
    assert json.loads((out / "sampling.json").read_text())["decoder"] == str(tiny_decoder)
    refused = call(job)
    assert refused.refused()
    assert "decoder" in refused.err


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_guide_that_sees_pictures_decodes_in_float32(precision, tmp_path):
    """CLIP guidance by pictures in half precision: the gradient goes through the decoder, whose weights are not rounded."""
    job = ["sample", "--model", "shapes", "--prompts", "shapes-held", "--num", "1", "--steps", "2", "--clip-guidance", "shapes-clip",
           f"precision={precision}", "--device", "cpu", "--out", str(tmp_path / precision)]  # fmt: skip
    call(job).check()


def test_a_plan_names_a_decoder_that_is_not_here(tmp_path):
    plan = ["sample", "--model", "sd15", "--num", "1", "--dry-run", "--out", str(tmp_path / "samples")]
    planned = call([*plan, "--decoder", "madebyollin/taesd"]).check()
    assert "--decoder: madebyollin/taesd" in planned.err
    assert "would be downloaded" in planned.err
    refused = call([*plan, "--decoder", "./no-such-folder"])
    assert refused.refused()
    assert "decoder ./no-such-folder: no such folder" in refused.err


@pytest.mark.parametrize("levels", [3, 5])
def test_tiles_of_a_tiny_decoder_of_another_factor(levels):
    kind = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4,) * levels, decoder_block_out_channels=(4,) * levels, num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels, latent_channels=4,
    )  # fmt: skip
    codec = VAECodec(kind)
    codec.tile(8 * codec.factor)
    with torch.no_grad():
        assert codec.raw(torch.randn(1, 4, 20, 12)).shape == (1, 3, 20 * codec.factor, 12 * codec.factor)


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sana", "tiny-klein", "taesd"])
def test_tiles_are_those_of_diffusers(name, tiny_decoder):
    """A picture of several tiles is the one by enable_tiling with tiles of this size; a picture of one tile is that of the whole."""
    codec = load("tiny-sd").codec.with_decoder(str(tiny_decoder)) if name == "taesd" else load(name).codec
    other = codec.fresh()
    other.vae.load_state_dict(codec.vae.state_dict())
    own = 2 ** (len(codec.vae.config.get("block_out_channels") or codec.vae.config.encoder_block_out_channels) - 1)
    side, pixels = 16 * codec.factor // own, 8 * own  # two tiles of eight places and what is left of one
    x = torch.randn(1, codec.channels, 2 * side, 2 * side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, small = codec.raw(x), codec.raw(x[..., : 8 * own // codec.factor, : 8 * own // codec.factor])
        codec.tile(pixels)
        found = codec.raw(x)
        assert torch.equal(codec.raw(x[..., : 8 * own // codec.factor, : 8 * own // codec.factor]), small)
        other.vae.enable_tiling()
        for key, value in {"sample_min": pixels, "latent_min": 8, "sample_stride": pixels * 3 // 4}.items():
            for end in ("size", "height", "width"):
                if hasattr(other.vae, f"tile_{key}_{end}"):
                    setattr(other.vae, f"tile_{key}_{end}", value)
        assert torch.equal(other.raw(x), found)
    assert not torch.allclose(found, whole, atol=1e-3)
    with pytest.raises(UsageError, match=f"multiples of {pixels} pixels"):
        codec.tile(pixels + 1)


def test_tiles_of_a_job(tmp_path):
    """They change the pictures where there are several, and are part of the job's settings."""
    model, seen = load("tiny-sd").with_prompts([PROMPT]), {}
    factor = model.codec.factor
    model = model.with_resolution(16 * factor)
    for tiles in (None, 8 * factor, 16 * factor):
        config = SampleConfig(model="tiny-sd", num=1, steps=1, guidance_scale=1.0, device="cpu", tiles=tiles)
        sample(config, model.decoding(None, tiles), tmp_path / str(tiles))
        seen[tiles] = picture(tmp_path / str(tiles) / "000000.png")
        assert json.loads((tmp_path / str(tiles) / "sampling.json").read_text()).get("tiles") == tiles
    assert np.array_equal(seen[None], seen[16 * factor])
    assert not np.array_equal(seen[None], seen[8 * factor])


@pytest.mark.parametrize("options", [["--decoder", "DECODER"], ["--tiles", "64"]])
def test_pixels_need_no_decoder(options, tiny_decoder, tmp_path):
    options = [str(tiny_decoder) if option == "DECODER" else option for option in options]
    ended = call(["sample", "--model", "tiny", "--num", "1", "--out", str(tmp_path / "samples"), *options])
    assert ended.refused()
    assert f"{options[0][2:]} {options[1]}: for latents, and the model's data are pixels" in ended.err


def test_a_decoder_of_other_latents(tmp_path):
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        latent_channels=16,
    ).save_pretrained(tmp_path / "taesd3")  # fmt: skip
    with pytest.raises(UsageError, match="for other latents than the model's") as raised:
        load("tiny-sd").codec.with_decoder(str(tmp_path / "taesd3"))
    assert "taesdxl for XL" in str(raised.value.hint)
    with pytest.raises(DistillError, match="decoder nowhere"):
        load("tiny-sd").codec.with_decoder("nowhere")


@pytest.mark.parametrize("name", ["tiny-sd", "shapes", "tiny-sana", "tiny-klein", "taesd"])
def test_half_precision_is_stored_once(name, tiny_decoder):
    """The matrices of a decoder stored in bf16 give autocast's own bits; in fp16 a decoder that overflows stays in float32."""
    codec = load("tiny-sd").codec.with_decoder(str(tiny_decoder)) if name == "taesd" else load(name).codec
    x = torch.randn(2, codec.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = codec.raw(x)
        codec.cast(torch.bfloat16)
        assert torch.equal(codec.raw(x), before)
    assert torch.equal(codec.raw(x).detach(), before)  # in its own type where nobody asks
    stored = [p.dtype for p in codec.decoders()[0].parameters() if p.ndim > 1]
    assert stored.count(torch.bfloat16) >= len(stored) - 1 > 0
    codec.cast(None)
    codec.upcast = True
    codec.cast(torch.float16)
    assert {p.dtype for p in codec.vae.parameters()} == {torch.float32}

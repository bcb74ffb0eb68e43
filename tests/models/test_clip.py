"""CLIP models: transformers' own numbers, the loss, the folder; and CLIP guidance against finite differences."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill_cli.config import CLIPNetworkConfig, TextConfig, VAENetworkConfig
from distill_cli.data.pictures import to_uint8
from distill_cli.data.shapes import HELD, THINGS, TRAINED, Shapes
from distill_cli.diffusion.condition import GUIDE, Condition
from distill_cli.diffusion.denoiser import MixtureDenoiser, NetworkDenoiser
from distill_cli.diffusion.guidance import Steered
from distill_cli.diffusion.noise import Draws
from distill_cli.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from distill_cli.diffusion.solvers import ddim
from distill_cli.errors import DistillError, UsageError
from distill_cli.methods.clip.config import CLIPConfig
from distill_cli.methods.clip.objective import Contrast
from distill_cli.models import autoencoder, clip
from distill_cli.models.clip_guide import ClipGuide
from distill_cli.models.codec import Codec, VAECodec
from distill_cli.models.text import make_tokenizer
from tests import clip_judge

NETWORK, TEXT = CLIPNetworkConfig(width=8, layers=1, heads=2, patch=8, features=8), TextConfig(width=8, layers=1, heads=2)
CONFIG = CLIPConfig(batch_size=4, captions=4, network=NETWORK, text=TEXT, shift=0, zoom=0, noise=0)


def tiny(pixels=16, seed=0):
    """A CLIP model with random weights, whose embeddings differ clearly."""
    made = clip.create(pixels, NETWORK, TEXT, make_tokenizer((thing.caption for thing in TRAINED), 16), seed)
    torch.manual_seed(seed)
    for p in made.towers.parameters():
        nn.init.normal_(p, std=0.3)
    made.towers.eval().requires_grad_(False)
    return made


def test_a_saved_model_is_transformers_own(tmp_path):
    """Its folder opens in transformers, whose processor and model give the same embeddings: of wide pictures, cropped and resized."""
    from transformers import CLIPModel, CLIPProcessor

    made = tiny()
    made.save(tmp_path / "c", torch.float32)
    model, processor = CLIPModel.from_pretrained(tmp_path / "c").eval(), CLIPProcessor.from_pretrained(tmp_path / "c")
    smooth = F.interpolate(torch.rand(3, 3, 6, 9) * 2 - 1, size=(32, 48), mode="bicubic").clamp(-1, 1)
    texts = [thing.caption for thing in HELD[:2]]
    given = processor(text=texts, images=list(to_uint8(smooth)), return_tensors="pt", padding="max_length", max_length=16)
    found = model(input_ids=given.input_ids, pixel_values=given.pixel_values)
    again = clip.load(str(tmp_path / "c"))
    assert torch.allclose(again.texts(texts), found.text_embeds, atol=1e-5)
    assert torch.allclose(again.pictures(smooth), found.image_embeds, atol=0.02)  # 8 bits
    assert (again.pictures(smooth) - again.pictures(smooth.roll(1, 0))).abs().max() > 0.1


def test_the_loss_is_that_of_transformers_logits():
    """Cross-entropy of logits_per_image, where all captions differ; without augmentation."""
    objective = Contrast(CONFIG, Shapes())
    draws = Draws(CONFIG.seed, range(4, 8))
    (loss,) = objective.turns(1, draws)
    positions = [objective.order[i] for i in draws.indices]
    assert len(set(positions)) == 4
    pixels, tokens = objective.images.batch(positions, draws)[0], objective.tokens[positions]
    logits = objective.clip.towers.model(input_ids=tokens, pixel_values=pixels).logits_per_image
    assert torch.allclose(loss.value, F.cross_entropy(logits, torch.arange(4)), rtol=1e-5)


def test_equal_captions_are_one_and_further_captions_are_wrong_ones():
    same = Contrast(CONFIG, Shapes(THINGS[:1]))
    (loss,) = same.turns(0, Draws(0, range(4)))
    assert loss.value == 0
    more = Contrast(CONFIG.model_copy(update={"captions": 40}), Shapes(THINGS[:4]))
    (loss,) = more.turns(0, Draws(0, range(4)))
    positions = [more.order[i] for i in range(4)]
    pixels = more.images.batch(positions, Draws(0, range(4)))[0]
    logits = more.clip.towers.model(input_ids=more.tokens, pixel_values=pixels).logits_per_image
    assert torch.allclose(loss.value, F.cross_entropy(logits, torch.tensor(positions)), rtol=1e-5)  # forty captions are four


def test_pictures_are_moved_within_bounds():
    """A picture of its own column numbers says where each pixel came from; noise is of the size drawn."""
    x = torch.linspace(-1, 1, 64).expand(64, 3, 64, 64)
    moved = Contrast(CONFIG.model_copy(update={"shift": 0.1}), Shapes()).moved(x, Draws(0, range(64)))
    away = (moved - x)[:, 0, 32, 32]
    assert 0.15 < away.abs().max() <= 0.2 * 64 / 63 + 1e-5
    noisy = Contrast(CONFIG.model_copy(update={"noise": 0.5}), Shapes()).moved(x, Draws(0, range(64))) - x
    sizes = noisy.std((1, 2, 3))
    assert sizes.max() < 0.52
    assert sizes.mean() == pytest.approx(0.25, abs=0.05)


def test_the_judge_sees_chance_in_random_weights(tmp_path):
    tiny(64).save(tmp_path / "c")
    found = clip_judge.judge(str(tmp_path / "c"), each=1)
    assert found["pictures"] == len(HELD)
    assert 0.3 < found["random"] < 0.7


def test_the_built_in_model_ranks_the_right_caption_first():
    """Above a random wrong one in at least 99%, above one that differs in a single attribute in at least 95%."""
    found = clip_judge.judge(str(clip.BUILTIN / "shapes-clip"), each=2)
    assert found["random"] >= 0.99
    assert found["single"] >= 0.95


class Small(nn.Module):
    """A network of two convolutions, which a time shifts."""

    def __init__(self, channels):
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x, time, condition):
        return self.two(torch.tanh(self.one(x) + 0.1 * time.sin()[:, None, None, None]))


def latents():
    vae = autoencoder.create(16, 3, VAENetworkConfig(channels=[4, 8], groups=2), 0).vae.double().requires_grad_(False).eval()
    return VAECodec(vae)


def led(schedule, kind, codec, through, cutouts=0, pixels=16):
    """A small denoiser, a guide by a small CLIP model, noisy samples and what is asked for; float64."""
    made = tiny(pixels)
    made.towers.double()
    guide = ClipGuide(made, codec, schedule, 2.0, spread=0.7, through=through, cutouts=cutouts)
    torch.manual_seed(1)
    channels, side = (3, 16) if codec.factor == 1 else (4, 8)
    denoiser = NetworkDenoiser(Small(channels).double().requires_grad_(False), schedule, kind, time_input="t")
    x, t = torch.randn(2, channels, side, side, dtype=torch.float64), schedule.at(torch.tensor([0.4, 0.7], dtype=torch.float64)).double()
    told = guide.told(torch.tensor([1, 0]), [thing.caption for thing in HELD[:2]])
    return denoiser, guide, x, t, Condition({guide.part: told})


SCHEDULES = {
    "edm": (EDMSchedule(), "edm"),
    "table": (TableSchedule.from_config({"beta_schedule": "linear"}), "eps"),
    "flow": (FlowSchedule(2.0), "flow"),
}


@pytest.mark.parametrize("through", ["estimate", "network"])
@pytest.mark.parametrize("codec", ["pixels", "latents"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_gradient_is_that_of_finite_differences(name, codec, through):
    """Of the cosine by x_t, along random directions, to 1e-5; Steered adds scale sigma^2 / alpha times it."""
    schedule, kind = SCHEDULES[name]
    denoiser, guide, x, t, condition = led(schedule, kind, latents() if codec == "latents" else Codec(), through)
    with torch.no_grad():
        estimate, gradient = guide(denoiser, x, t, condition)
        assert torch.equal(estimate, denoiser(x, t, condition))
        alpha, sigma = (each(t).double()[:, None, None, None] for each in (schedule.alpha, schedule.sigma))

        def cosine(moved):
            normal = alpha * 0.49 / (alpha**2 * 0.49 + sigma**2)  # the derivative of the best estimate of normal data
            x0 = denoiser(moved, t) if through == "network" else estimate + (moved - x) * normal
            seen, asked = guide.clip.pictures(guide.codec.raw(x0)), condition.parts[GUIDE + "clip"].double()
            return (seen * asked).sum(1)

        step = 2e-5
        for seed in range(3):
            along = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            found = (cosine(x + step * along) - cosine(x - step * along)) / (2 * step)
            assert torch.allclose((gradient * along).sum((1, 2, 3)), found, rtol=1e-5, atol=1e-9)
            assert found.abs().min() > 1e-6
        steered = Steered(denoiser, schedule, guide)(x, t, condition)
    assert torch.allclose(steered, estimate + 2 * sigma**2 / alpha * gradient, rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_of_normal_data_both_derivatives_are_the_same(name):
    """The best estimate of normal data is linear: what is added is scale r^2 times the gradient by x0, r^2 the variance given x_t."""
    schedule, _ = SCHEDULES[name]
    exact = MixtureDenoiser(torch.zeros(1, 3, 16, 16, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 0.7, schedule)
    _, guide, x, t, condition = led(schedule, "eps", Codec(), "network")
    alone = replace(guide, through="estimate")
    assert torch.allclose(guide(exact, x, t, condition)[1], alone(exact, x, t, condition)[1], rtol=1e-9, atol=1e-14)


def test_samples_go_to_the_picture_that_fits():
    """Of two equally likely pictures, by the exact denoiser: log odds of 10 by CLIP's cosines take most samples to one of them."""
    schedule = EDMSchedule()
    means = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2)).clamp(-1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    exact = MixtureDenoiser(means, torch.tensor([0.5, 0.5]), 0.1, schedule)
    guide = ClipGuide(tiny(), Codec(), schedule, 1.0)
    asked = guide.told(torch.zeros(100, dtype=torch.long), [HELD[0].caption])
    odds = (guide.clip.pictures(means) * asked[:2]).sum(1)
    best, guide.scale = int(odds.argmax()), 10 / float(odds.max() - odds.min())
    x = schedule.prior_std * torch.randn(100, 3, 16, 16, generator=torch.Generator().manual_seed(3))

    def share(denoiser):
        made = ddim(denoiser, schedule, x, schedule.times(20), Condition({guide.part: asked}))
        return ((made[:, None] - means).flatten(2).norm(dim=2).argmin(1) == best).float().mean().item()

    assert 0.35 < share(exact) < 0.65
    assert share(Steered(exact, schedule, guide)) > 0.8


def test_nothing_asked_for_is_no_gradient_and_no_signal_is_none_either():
    denoiser, guide, x, t, condition = led(*SCHEDULES["flow"], Codec(), "estimate")
    assert guide(denoiser, x, t, condition.map(torch.zeros_like))[1].abs().max() == 0
    last = torch.ones_like(t)  # alpha = 0
    assert guide(denoiser, x, last, condition)[1].abs().max() == 0
    assert torch.equal(Steered(denoiser, guide.schedule, guide)(x, last, condition), denoiser(x, last, condition))


def test_cutouts_depend_on_the_time_alone():
    """A sample is the same in any batch; other times have other cut-outs, all inside and at least of CLIP's size."""
    denoiser, guide, x, t, condition = led(*SCHEDULES["edm"], Codec(), "network", cutouts=4, pixels=8)
    both, alone = guide(denoiser, x, t, condition)[1], guide(denoiser, x[1:], t[1:], condition[1:])[1]
    assert torch.allclose(both[1:], alone, rtol=1e-12)
    picture = torch.arange(16 * 16, dtype=torch.float64).reshape(1, 1, 16, 16)
    one, two = ([(int(part[0, 0, 0, 0]), part.shape[-1]) for part in guide.parts(picture, float(each))] for each in t)
    assert one == [(int(part[0, 0, 0, 0]), part.shape[-1]) for part in guide.parts(picture, float(t[0]))]
    assert one != two
    assert all(8 <= side <= 16 and part + side <= 16 for at, side in one + two for part in divmod(at, 16))
    assert len(set(one)) > 1


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no CLIP model: no config.json"),
        ({"config.json": {"model_type": "clip_text_model"}}, 'no CLIP model: its config.json says model_type "clip_text_model"'),
    ],
)
def test_a_folder_that_is_no_clip_model(files, says, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DistillError, match=says):
        clip.load(str(tmp_path), f"--clip-guidance {tmp_path}")
    with pytest.raises(DistillError, match="no such folder"):
        clip.load(str(tmp_path / "none"))


def test_sizes_that_do_not_fit(tmp_path):
    tiny().save(tmp_path / "c")
    file = tmp_path / "c" / clip.PROCESSOR
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"size": {"shortest_edge": 32}}))
    with pytest.raises(DistillError, match="the network takes a shortest_edge of 16"):
        clip.load(str(tmp_path / "c"))
    file.write_text(json.dumps(stored | {"image_std": [1, 2]}))
    with pytest.raises(DistillError, match=r"image_std is \[1, 2\], three numbers"):
        clip.load(str(tmp_path / "c"))
    with pytest.raises(UsageError, match="network.patch 7: does not divide the pictures' 64 pixels"):
        Contrast(CONFIG.model_copy(update={"network": NETWORK.model_copy(update={"patch": 7})}), Shapes())

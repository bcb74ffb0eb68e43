"""LPIPS on a VGG file that the test makes: against the lpips package's own forward, in its cache and out of it."""

import pytest
import torch
import torch.nn.functional as F

from distill_cli.config import PairsConfig
from distill_cli.diffusion.noise import Draws
from distill_cli.errors import DistillError
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import DMD
from distill_cli.models import load
from distill_cli.models.perceptual import FILE, Perceptual
from distill_cli.pairs.generate import generate
from distill_cli.pairs.store import PairStore
from tests.conditions import of


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file as torchvision's, with random weights, and without the layers that LPIPS does not use."""
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.vgg16(weights=None)
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save({key: value for key, value in network.state_dict().items() if key.startswith("features.")}, path)
    return path


@pytest.fixture(scope="module")
def metric(vgg):
    return Perceptual(vgg)


def test_it_is_lpips_on_images_of_224_pixels(metric, vgg):
    import lpips

    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    stored = torch.load(vgg, weights_only=True)
    for part in theirs.net.children():
        for place, layer in part.named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.data.copy_(stored[f"features.{place}.weight"])
                layer.bias.data.copy_(stored[f"features.{place}.bias"])
    x, y = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    large = [F.interpolate(v, size=(224, 224), mode="bilinear", align_corners=False) for v in (x, y)]
    expected = theirs(*large).flatten()
    assert expected.min() > 1e-4
    assert torch.allclose(metric(x, y), expected, rtol=1e-4)
    assert torch.equal(metric(x, x), torch.zeros(2))
    grey = metric(x[:, :1], y[:, :1])
    assert torch.allclose(grey, metric(x[:, :1].repeat(1, 3, 1, 1), y[:, :1].repeat(1, 3, 1, 1)))


def test_openais_program_has_average_pooling_and_leaves_large_pictures(vgg):
    """Against VGG written out here; `seen` is what its first layer is given."""
    stored = torch.load(vgg, weights_only=True)
    seen = []

    def expected(metric, x, y):
        maps = []
        for image in (x, y):
            h, out = metric.metric.scaling_layer(image), []
            for place in range(30):
                if f"features.{place}.weight" in stored:
                    h = F.relu(F.conv2d(h, stored[f"features.{place}.weight"], stored[f"features.{place}.bias"], padding=1))
                elif place in (4, 9, 16, 23):
                    out.append(h)
                    h = F.avg_pool2d(h, 2)
            maps.append([m / m.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10) for m in (*out, h)])
        return sum(lin((a - b).square()).mean((1, 2, 3)) for lin, a, b in zip(metric.metric.lins, *maps, strict=True))

    def pictures(size):
        return [torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1)]

    ours = Perceptual(vgg, below=256, pooling="average")
    ours.metric.net.slice1[0].register_forward_hook(lambda layer, given, out: seen.append(given[0].shape[-1]))
    with torch.no_grad():
        for size, given in ((64, 224), (256, 256)):
            seen.clear()
            x, y = pictures(size)
            resized = [F.interpolate(v, size=(224, 224), mode="bilinear", align_corners=False) if size < 256 else v for v in (x, y)]
            distance = ours(x, y)
            assert seen == [given, given]
            assert torch.allclose(distance, expected(ours, *resized), rtol=1e-4)
        papers = Perceptual(vgg)
        papers.metric.net.slice1[0].register_forward_hook(lambda layer, given, out: seen.append(given[0].shape[-1]))
        seen.clear()
        assert not torch.allclose(papers(x, y), distance, rtol=1e-3)
        assert seen == [224, 224]


def test_consistency_distillation_asks_for_it(vgg, tiny):
    from distill_cli.data import open_images
    from distill_cli.recipes import check
    from tests.options import consistency
    from tests.options import options as of

    def pooling(metric):
        return {type(layer).__name__ for layer in metric.modules() if "Pool" in type(layer).__name__}

    images = open_images("digits")
    options = {"teacher": "tiny", "data": "digits", "metric": "lpips", "lpips_weights": vgg}
    theirs = consistency(of("cm", **options, lpips_pooling="average", lpips_resize="below-256"), tiny.copy(), images).perceptual
    assert (pooling(theirs), theirs.below) == ({"AvgPool2d"}, 256)
    papers = consistency(of("cm", **options), tiny.copy(), images).perceptual
    assert (pooling(papers), papers.below) == ({"MaxPool2d"}, float("inf"))
    for recipe in ("imagenet64-cd", "imagenet64-ct"):  # which name OpenAI's script
        config = check(recipe)
        assert (config.lpips_pooling, config.lpips_resize) == ("average", "below-256")
        assert config.decay_over == ("N-1" if recipe.endswith("ct") else "N")
    assert check("cifar10-ct").lpips_pooling == "max"  # the paper's appendix


def test_half_precision_is_for_vgg_alone(metric):
    x, y = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        half = metric(x, y)
        near = metric(x, x + 1e-3)
    assert half.dtype == torch.float32
    assert torch.allclose(half, metric(x, y), rtol=0.02)
    assert near.min() >= 0


def test_its_gradient_is_a_number_where_all_features_are_0(metric):
    """sqrt has no derivative at 0; lpips' own normalisation gives NaN there."""
    x = torch.zeros(1, 3, 224, 224)
    original = metric.metric.net.forward
    metric.metric.net.forward = lambda images: [F.relu(m - 1e9) for m in original(images)]
    try:
        x.requires_grad_(True)
        metric(x, torch.ones_like(x)).sum().backward()
    finally:
        metric.metric.net.forward = original
    assert torch.isfinite(x.grad).all()


def test_dmd_regresses_by_it(tiny, tiny_pairs, vgg, metric):
    config = DMDConfig(teacher="tiny", device="cpu", pairs=tiny_pairs, regression_loss="lpips", lpips_weights=vgg, matching_weight=0)
    dmd = DMD(config, tiny.copy(), PairStore(tiny_pairs))
    loss = next(dmd.turns(0, Draws(0, range(2))))
    pairs = PairStore(tiny_pairs).batch([dmd.order[i] for i in range(2)])
    with torch.no_grad():
        expected = metric(dmd.generate(pairs["noise"], of(pairs["label"])), pairs["x0"]).mean().item()
    assert loss.value.item() == pytest.approx(0.25 * expected, rel=1e-4)
    loss.value.backward()
    assert all(torch.isfinite(p.grad).all() for p in dmd.trained["student"].module.parameters() if p.grad is not None)


def test_without_weights_both_ways_out_are_said(tmp_path, monkeypatch, vgg):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DistillError, match="VGG's weights are not in .*vgg16-397923af.pth") as error:
        Perceptual()
    assert "download.pytorch.org/models/vgg16-397923af.pth" in error.value.hint
    assert "lpips_weights=FILE" in error.value.hint
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(vgg.read_bytes())
    with pytest.raises(DistillError, match="corrupt: its checksum is not the one in its name"):
        Perceptual()
    monkeypatch.setattr("distill_cli.models.perceptual.sha256", lambda path: "397923af" + "0" * 56)
    assert isinstance(Perceptual(), Perceptual)  # found in torchvision's cache


@pytest.mark.parametrize("content", [b"nothing", None])
def test_a_file_of_something_else_is_said(content, tmp_path):
    path = tmp_path / "vgg.pth"
    path.write_bytes(content) if content else torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(DistillError, match="not torchvision's VGG-16"):
        Perceptual(path)
    with pytest.raises(DistillError, match="no such file"):
        Perceptual(tmp_path / "nowhere.pth")


def test_regression_of_latents_is_lpips_of_their_pictures_as_large_as_they_are(vgg, tmp_path):
    """Through the objective: decoded by the teacher's autoencoder, not resized; or by a tiny one."""
    import diffusers

    teacher = load("tiny-sd").with_prompts(["a small red circle", "a large blue cross"])
    folder = tmp_path / "pairs"
    generate(PairsConfig(teacher="tiny-sd", num=4, shard_size=4, batch_size=4, steps=1, dtype="float32"), teacher, folder)
    options = dict(teacher="tiny-sd", device="cpu", pairs=folder, regression_loss="lpips", lpips_weights=vgg, matching_weight=0)
    dmd = DMD(DMDConfig(**options), teacher, PairStore(folder))
    loss = next(dmd.turns(0, Draws(0, range(2))))
    batch = PairStore(folder).batch([dmd.order[i] for i in range(2)])
    with torch.no_grad():
        made = dmd.generate(batch["noise"], dmd.of_pairs(batch["label"]))
        pictures = [teacher.codec.vae.decode(x / teacher.codec.scale).sample for x in (made, batch["x0"])]
        expected = 0.25 * Perceptual(vgg, below=0)(*pictures).mean()
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.value.backward()
    assert dmd.trained["student"].module.network.unet.conv_in.weight.grad.abs().max() > 0
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4, latent_channels=4,
    ).save_pretrained(tmp_path / "taesd")  # fmt: skip
    tiny = DMD(DMDConfig(**options, decoder=str(tmp_path / "taesd")), teacher, PairStore(folder))
    other = next(tiny.turns(0, Draws(0, range(2)))).value
    assert other.item() != pytest.approx(expected.item(), rel=1e-2)

"""What test_fake_card.py runs: every method and every family in training, every family in sampling."""

from math import log2
from pathlib import Path

from tests.contracts.families import TRANSFORMERS, Made, moons, pixels
from tests.unchanged.record import FOLDERS, RUNS, SMALL


def edm(place):
    """A folder of an NCSN++ with random weights, the EDM network with most parts of its own."""
    import torch

    from distill_cli.diffusion.denoiser import NetworkDenoiser, Scales
    from distill_cli.diffusion.schedule import EDMSchedule
    from distill_cli.models import formats
    from distill_cli.models.backbones import backbone_of
    from distill_cli.models.conditioners import ClassConditioner
    from distill_cli.models.edm import EDMUNet
    from distill_cli.models.lineage import Lineage
    from distill_cli.models.model import Model

    torch.manual_seed(0)
    network = EDMUNet(
        sample_size=16, in_channels=3, model_channels=16, channel_mult=(1, 1), num_blocks=1, attention_resolutions=(8,), noise_mult=2,
        fourier=True, residual=True, fir=True,
    )  # fmt: skip
    torch.nn.init.normal_(network.frequencies)
    denoiser = NetworkDenoiser(backbone_of(network.eval()), EDMSchedule(), "edm", Scales(), "ln sigma / 4")
    formats.save(Model(denoiser, ClassConditioner(()), Lineage(name=place.name, data="digits")), place)


def adapter(place):
    """A folder of a LoRA with random weights on tiny-sd3."""
    from dataclasses import replace

    import torch

    from distill_cli.diffusion.denoiser import NetworkDenoiser
    from distill_cli.models import formats, load
    from distill_cli.models.lora import adapted

    base = load("tiny-sd3")
    old = base.denoiser
    lora = adapted(base.backbone, 2, None, None, 0)
    lora.source = "tiny-sd3"
    for number, parameter in enumerate(lora.parameters()):
        torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(number))
    lineage = base.lineage.model_copy(update={"kind": "student", "method": "dmd2", "teacher_hash": base.weights_hash()})
    denoiser = NetworkDenoiser(lora, old.schedule, old.parameterisation, old.scales, old.time_input).eval().requires_grad_(False)
    formats.save(replace(base, denoiser=denoiser, lineage=lineage), place)


def decoder(place):
    """A folder of an AutoencoderTiny for the latents of tiny-sd."""
    import diffusers
    import torch

    from distill_cli.models import load

    torch.manual_seed(1)
    levels = (8,) * (1 + int(log2(load("tiny-sd").codec.factor)))
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=levels, decoder_block_out_channels=levels, num_encoder_blocks=(1,) * len(levels),
        num_decoder_blocks=(1,) * len(levels), latent_channels=4,
    ).save_pretrained(place)  # fmt: skip


EPS, LATENTS = FOLDERS / "train-eps", FOLDERS / "train-latents"
FLOW, MOONS, EDM = pixels("flow"), Made("tiny-moons", moons), Made("tiny-edm", edm)
BATCH, SHAPES, PROMPTS = ("--batch-size", 4), ("--data", "shapes"), ("--prompts", "prompts.txt")
DMD2 = ("student_steps=1", "fake_steps=1", *BATCH)
TEXT = ("text.width=16", "text.layers=1", "text.heads=2")
CLIP = ("clip", *BATCH, "captions=8", "network.width=16", "network.layers=1", "network.heads=2", "network.features=16", *TEXT)
CASES = {
    **{name: RUNS[name] for name in ("dmd-tiny", "dmd-tiny-sd", "cd-tiny", "ct-tiny", "ict-tiny", "ect-tiny")},
    "dmd-eps": ("dmd", "--teacher", EPS, *BATCH),
    "dmd-guided": ("dmd", "--teacher", "tiny-sd", "--prompts", "shapes", "--guidance-scale", 3, *BATCH, "precision=bf16"),
    "dmd-lora": ("dmd", "--teacher", "tiny-sd3", *PROMPTS, *BATCH, "lora=2"),
    "cd-guided": (*RUNS["cd-tiny"], "--guidance-scale", 2, "precision=bf16"),
    "cd-edm": ("cm", "--method", "cd", "--teacher", EDM, "--data", "digits", *BATCH),
    "lcm-tiny-sdxl": ("cm", "--method", "lcm", "--teacher", "tiny-sdxl", *SHAPES, *BATCH, "guidance_range=1,4"),
    "pd-flow": ("pd", "--teacher", FLOW, "--data", "digits", *BATCH, "first_steps=4", "last_steps=2"),
    **{name: RUNS[name] for name in ("train-edm", "train-eps", "train-v", "vae", "train-latents", "classifier")},
    "train-flow": ("train", "--data", "digits", *BATCH, *SMALL, "prediction=flow"),
    "train-moons": ("train", "--data", "moons", *BATCH, "network.channels=[32,32]", "network.dropout=0.1"),
    "classifier-noisy": ("classifier", "noisy=true", "model=tiny", "--data", "digits", *BATCH, "width=8"),
    "clip": (*CLIP, *SHAPES),
    "clip-noisy": (*CLIP, *SHAPES, "noisy=true", "model=tiny-sd", "versions=1"),
    **{f"dmd2-{name}": ("dmd2", "--teacher", name, *PROMPTS, *DMD2) for name in TRANSFORMERS},
    "dmd2-tiny-sdxl": ("dmd2", "--teacher", "tiny-sdxl", *PROMPTS, *DMD2),
    "dmd2-moons": ("dmd2", "--teacher", MOONS, *DMD2),
    "dmd2-gan": ("dmd2", "--teacher", "tiny", "--data", "digits", "student_steps=2", "fake_steps=1", *BATCH, "r1_weight=1"),
    "dmd2-gan-of-the-teacher": ("dmd2", "--teacher", "tiny-sd", *SHAPES, *DMD2, "gan=teacher"),
}  # fmt: skip
"""name -> the command that trains; what is Made is made first"""
WAITS = {"dmd2-tiny-lumina2": 4, "dmd2-tiny-z-image": 4}
"""Waits of a step, at most, for how long the texts are: diffusers' networks ask the mask in each call."""
BLOCKING = {"cd-edm": 20}
"""Copies of a step, at most, for which the host waits: diffusers' FIR filters make their kernels on it in each call."""
COPIES = {
    "dmd-tiny": 12, "dmd-tiny-sd": 10, "dmd-eps": 6, "dmd-guided": 6, "cd-tiny": 5, "cd-guided": 7, "ct-tiny": 5, "ict-tiny": 5,
    "ect-tiny": 5, "train-edm": 4, "train-eps": 4, "train-v": 4, "vae": 2, "train-latents": 5, "classifier": 2,
    "train-flow": 4, "train-moons": 4, "classifier-noisy": 4, "clip": 3, "clip-noisy": 5, "dmd2-gan": 16, "dmd2-moons": 7,
    "dmd2-tiny-sdxl": 9, "lcm-tiny-sdxl": 8, "pd-flow": 6, "dmd-lora": 7, "dmd2-gan-of-the-teacher": 13,
    "cd-edm": 24,  # 16 of them are the kernels of its resampling, which diffusers makes on the host in each call
    **{f"dmd2-{name}": 8 for name in TRANSFORMERS},
}  # fmt: skip
"""Copies to the card in a step, at most; none comes back."""
CAST = {"dmd-tiny": 5_500_000, "dmd-guided": 1_300_000, "cd-guided": 3_280_000, "train-edm": 580_000}
"""Values cast in a step in bf16, at most: activations, and weights that are trained."""
HELD = ("--prompts", "shapes-held")
SAMPLES = {
    "tiny": ("--model", "tiny", "--steps", 3),
    "tiny-guided": ("--model", "tiny", "--steps", 3, "--guidance-scale", 2),
    "tiny-ancestral": ("--model", "tiny", "--steps", 3, "--solver", "ancestral"),
    "eps": ("--model", EPS, "--steps", 3),
    "flow": ("--model", FLOW, "--steps", 3),
    "edm": ("--model", EDM, "--steps", 2),
    "moons": ("--model", MOONS, "--steps", 3),
    "latents": ("--model", LATENTS, "--steps", 3, *HELD),
    "tiny-sd": ("--model", "tiny-sd", "--steps", 3, *HELD),
    "tiny-sd-dpm++": ("--model", "tiny-sd", "--steps", 3, *HELD, "--solver", "dpm++"),
    "tiny-sd-decoder": ("--model", "tiny-sd", "--steps", 1, *HELD, "--decoder", Made("taesd", decoder)),
    "tiny-sd-tiles": ("--model", "tiny-sd", "--steps", 1, *HELD, "--resolution", 128, "tiles=64"),
    **{name: ("--model", name, "--steps", 2, *HELD) for name in ("tiny-sdxl", "tiny-sd3", *TRANSFORMERS)},
    "lora": ("--model", Made("tiny-sd3-lora", adapter), "--steps", 2, *HELD),
    "dmd-tiny": ("--model", FOLDERS / "dmd-tiny"),
    "dmd-tiny-sd": ("--model", FOLDERS / "dmd-tiny-sd", *HELD),
    "cd-tiny": ("--model", FOLDERS / "cd-tiny", "--steps", 2),
    "ect-tiny": ("--model", FOLDERS / "ect-tiny", "--steps", 2),
}
CAST_FOR_FOUR = {"tiny-sd": 3_604_000, "tiny-sd-dpm++": 3_196_000, "dmd-tiny-sd": 2_175_000}
"""Values cast for four pictures in bf16, at most: activations alone."""


def made(command):
    """A command with the folders of what is Made, in the current folder."""
    for part in command:
        if isinstance(part, Made) and not Path(part.name).exists():
            part.make(Path(part.name))
    return tuple(part.name if isinstance(part, Made) else part for part in command)

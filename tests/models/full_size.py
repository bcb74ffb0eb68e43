"""Stable Diffusion 1.5 at full size with random weights, and what one guided step and a pair take of memory.

python -m tests.models.full_size FOLDER        # makes the model there (2.1 GB), prints peak memory of both commands
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

COMMAND = (
    "import json, resource, sys; from distill_cli.cli.app import run; code = run(sys.argv[1:]);"
    "print(json.dumps({'code': code, 'gib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))"
)


def filled(kind, config):
    """A network of small random weights in fp16, made without first making it in float32."""
    with torch.device("meta"):
        network = kind(config) if "Text" in kind.__name__ else kind(**config)
    network = network.half().to_empty(device="cpu")
    torch.manual_seed(0)
    drawn = 0.02 * torch.randn(2**20)  # again and again: a billion numbers take a while to draw
    with torch.no_grad():
        for name, value in network.named_parameters():
            count = value.numel()
            value.copy_(
                torch.ones(()) if "norm" in name and name.endswith("weight") else drawn.repeat(-(-count // 2**20))[:count].view(value.shape)
            )
        for name, value in network.named_buffers():
            value.copy_(torch.arange(value.numel()).view(value.shape) if "position_ids" in name else torch.zeros(value.shape))
    return network


def make(folder: Path) -> None:
    """The architecture of stable-diffusion-v1-5 (its unet/, vae/ and text_encoder/config.json), as a diffusers folder."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from distill_cli.data.shapes import TRAINED
    from distill_cli.models.schedulers import STABLE_DIFFUSION
    from distill_cli.models.stable_diffusion import TEXTS, UNETS, VAE
    from distill_cli.models.text import make_tokenizer, save_tokenizer

    filled(UNet2DConditionModel, UNETS["sd15"]).save_pretrained(folder / "unet")
    filled(AutoencoderKL, {**VAE, "sample_size": 512}).save_pretrained(folder / "vae")
    filled(CLIPTextModel, CLIPTextConfig(**TEXTS["sd15"])).save_pretrained(folder / "text_encoder")
    save_tokenizer(make_tokenizer((thing.caption for thing in TRAINED), 77), folder / "tokenizer")
    PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1).save_pretrained(folder / "scheduler")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))


def measure(folder: Path) -> dict[str, float]:
    """GiB at most of one guided sampling step with its picture, and of a pair of one step, each a process, in bf16."""
    (folder / "prompts.txt").write_text("a small red circle in the centre of a white background\n")
    common = ["--prompts", str(folder / "prompts.txt"), "--device", "cpu", "precision=bf16"]
    commands = {
        "sample": ["sample", "--model", str(folder), "--num", "1", "--solver", "ddim", "--steps", "1", "--out", str(folder / "s"), *common],
        "pairs": ["pairs", "--teacher", str(folder), "--num", "1", "--solver", "ddim", "--steps", "1", "--out", str(folder / "p"), *common],
    }
    out = {}
    for name, command in commands.items():
        done = subprocess.run([sys.executable, "-c", COMMAND, *command], capture_output=True, text=True, check=True, env=os.environ)
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["code"] == 0, done.stderr
        out[name] = result["gib"]
    return out


if __name__ == "__main__":
    if not Path(sys.argv[1], "model_index.json").exists():
        make(Path(sys.argv[1]))
    print(json.dumps(measure(Path(sys.argv[1]))))

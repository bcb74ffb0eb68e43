"""The timed sections of docs/gpu.sh: what a training step and a picture cost at Stable Diffusion 1.5's size, with random weights."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from docs.gpu import DEVICE, FULL, PROMPT, WORK, figure, known, timed

PEAK, UNET = "bf16 8192^3 product", "UNet, forward, 64x64 latents"
OPTIONS = {
    "blocks": ("compile=blocks",),
    "whole": ("compile=whole",),
    "last": ("channels_last=true",),
    "blocks-last": ("compile=blocks", "channels_last=true"),
    "whole-last": ("compile=whole", "channels_last=true"),
    "checkpointing": ("gradient_checkpointing=true",),
}
"""Options of a bench by the end of a section's name: dmd-16-blocks."""


def unet() -> Any:
    """The UNet of Stable Diffusion 1.5 with random weights on the card."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(FULL / "unet", torch_dtype=torch.float32).to(DEVICE)


def flops() -> float:
    """10^12 operations of a forward call of that UNet for one picture."""
    from distill_cli.models.cost import evaluation, sketch

    return evaluation(sketch("sd15")) / 1e12


def benched(what: str, *settings: str, repeats: int = 1) -> dict[str, Any]:
    """What `distill bench` prints of a command as JSON."""
    command = [sys.executable, "-m", "distill_cli", "bench", what, "--repeats", str(repeats), "--json", f"device={DEVICE}", *settings]
    done = subprocess.run(command, cwd=WORK, capture_output=True, text=True)
    print(done.stderr)
    if done.returncode:
        raise SystemExit(done.stderr[-1500:])
    found: dict[str, Any] = json.loads(done.stdout)
    print(found)
    return found


def bench(name: str, *settings: str, repeats: int = 1) -> None:
    """`distill bench dmd`: its time, share of the peak, ratio, memory, first call, which compiles, and kernels if it is profiled."""
    found = benched("dmd", *settings, repeats=repeats)
    seconds, share, memory = found["ours_seconds"], found["share_of_peak"], found["peak_memory_mb"] * 1e6 / 2**30
    figure(f"dmd step, {name}, bf16, pairs, guidance 3", f"{seconds * 1000:.0f} ms", seconds)
    figure(f"dmd, {name}: share of the peak", f"{share:.1%}, {found['tflop'] / seconds:.0f} TFLOP/s", share)
    figure(f"dmd, {name}: over its raw calls", f"{found['ratio']:.3f}", found["ratio"])
    figure(f"dmd, {name}: images a second", found["images_per_second"], found["images_per_second"])
    figure(f"dmd, {name}: memory", f"{memory:.1f} GiB, {found['planned_memory_mb'] / 1073.74:.1f} planned", memory)
    figure(f"dmd, {name}: first call", f"{found['first_seconds']:.0f} s", found["first_seconds"])
    for place, kernel in enumerate(found.get("profile", ()), 1):
        said = f"{kernel['share']:.1%}, {kernel['calls']} calls: {kernel['operation'][:90].replace('|', '/')}"
        figure(f"dmd, {name}: kernel {place} of a step", said, kernel["share"])


def dmd(batch: int, option: str) -> None:
    """A step at full size, with pairs, bf16 and guidance 3. That of batch 16 as it is by default is timed twice, and profiled."""
    settings = (f"teacher={FULL}", f"batch_size={batch}", "precision=bf16", "guidance_scale=3", "log_every=50", *OPTIONS.get(option, ()))
    main = batch == 16 and not option
    bench(f"batch {batch}" + (f", {option}" if option else ""), *settings, *(["--profile"] if main else []), repeats=1 + main)


def recipe() -> None:
    """The published recipe as it stands, four images a part: LPIPS on decoded latents, random weights made by bench."""
    bench("recipe sd15-dmd, 4 images", "--recipe", "sd15-dmd", "--random-weights", "batch_size=144")


def network() -> None:
    """The raw UNet at batch 16, forward and forward+backward."""
    base, batch = unet().train(), 16
    amount, peak = known(UNET), known(PEAK)
    for name, dtype, form in (
        ("float32 weights under autocast", torch.float32, torch.contiguous_format),
        ("bf16 weights", torch.bfloat16, torch.contiguous_format),
        ("bf16 weights, channels_last", torch.bfloat16, torch.channels_last),
    ):
        net = base.to(dtype=dtype, memory_format=form)
        x = torch.randn(batch, 4, 64, 64, device=DEVICE, dtype=dtype).to(memory_format=form)
        c = torch.randn(batch, 77, net.config.cross_attention_dim, device=DEVICE, dtype=dtype)
        t = torch.full((batch,), 500.0, device=DEVICE)

        def forward(net: Any = net, x: Any = x, t: Any = t, c: Any = c, wide: bool = dtype == torch.float32) -> Any:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=wide):
                return net(x, t, encoder_hidden_states=c, return_dict=False)[0]

        def both(forward: Any = forward, net: Any = net) -> None:
            forward().float().square().mean().backward()
            net.zero_grad(set_to_none=True)

        with torch.no_grad():
            share = amount * batch / timed(forward, 3) / peak
        figure(f"UNet, forward, {name}", f"{share:.1%}", share)
        share = 3 * amount * batch / timed(both, 3) / peak
        figure(f"UNet, forward+backward, {name}", f"{share:.1%}", share)


def one_step(how: str) -> None:
    """One step of the few-step sampler, by the decoder, a tiny one, and none; `how`: none, or what `distill sample` compiles."""
    import diffusers

    from distill_cli import launch
    from distill_cli.diffusion.noise import Draws
    from distill_cli.models import load
    from distill_cli.models.codec import VAECodec
    from distill_cli.models.compiled import compile_model

    where = torch.device(DEVICE)
    model = load(str(FULL)).to(where).with_prompts([PROMPT])
    sampling = model.with_defaults("few-step", 1, 1.0)
    compile_model(how, model, where)
    small = replace(model, codec=VAECodec(diffusers.AutoencoderTiny().to(where)))
    compile_model(how, small, where)
    said = "" if how == "none" else f", compile {how}"
    precisions = ("no", "tf32", "bf16", "fp16") if how == "none" else ("bf16", "fp16")
    for precision in precisions if where.type == "cuda" else ("no", "bf16"):
        for each in (model, small):
            each.ready(where, launch.HALF.get(precision))
        for batch in (1, 8) if precision == "bf16" and how == "none" else (1,):
            labels = torch.zeros(batch, dtype=torch.long)
            for what, call in (("", model.sample), (", tiny decoder", small.sample), (", without decoder", model.generate)):

                def work(call: Any = call, labels: Any = labels, precision: str = precision) -> None:
                    with launch.autocast(where, precision):
                        call(Draws(0, range(len(labels))), labels, sampling)

                begun = time.time()
                work()
                if said and not what:
                    figure(f"one step, {precision}{said}: first call", f"{time.time() - begun:.0f} s", time.time() - begun)
                milliseconds = timed(work, warm=4) / batch * 1000
                each = ", a picture" if batch > 1 else ""
                figure(f"one step, {precision}, batch {batch}{what}{each}{said}", f"{milliseconds:.1f} ms", milliseconds)


def pipeline() -> None:
    """diffusers' own pipeline, and the decoder alone."""
    import diffusers

    for name, dtype, last in (("fp16", torch.float16, False), ("bf16 channels_last", torch.bfloat16, True)):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(FULL, torch_dtype=dtype).to(DEVICE)
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if last:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)

        def work(pipe: Any = pipe) -> None:
            pipe([PROMPT], num_inference_steps=1, guidance_scale=1)

        milliseconds = timed(work) * 1000
        figure(f"diffusers' pipeline, one step, {name}, batch 1", f"{milliseconds:.1f} ms", milliseconds)
        if last:
            z = torch.randn(1, 4, 64, 64, device=DEVICE, dtype=dtype)
            with torch.no_grad():
                milliseconds = timed(lambda pipe=pipe, z=z: pipe.vae.decode(z, return_dict=False)) * 1000
            figure("decoder, bf16, batch 1", f"{milliseconds:.1f} ms", milliseconds)
        del pipe
        gc.collect()


def compiled() -> None:
    """The UNet as a CUDA graph, batch 1."""
    plain = unet().to(torch.bfloat16, memory_format=torch.channels_last).eval()
    net, width = torch.compile(plain, mode="reduce-overhead"), plain.config.cross_attention_dim
    z = torch.randn(1, 4, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    c, t = torch.randn(1, 77, width, device=DEVICE, dtype=torch.bfloat16), torch.tensor([999], device=DEVICE)
    with torch.no_grad():
        start = time.time()
        net(z, t, encoder_hidden_states=c, return_dict=False)
        figure("UNet compiled: seconds to compile", f"{time.time() - start:.0f} s", time.time() - start)
        milliseconds = timed(lambda: net(z, t, encoder_hidden_states=c, return_dict=False), 10, 5) * 1000
    figure("UNet compiled (reduce-overhead), bf16, batch 1", f"{milliseconds:.1f} ms", milliseconds)


def pairs(option: str) -> None:
    """`distill bench pairs`: latents of 10 guided steps of DDIM, 8 at a time, plain or by an option."""
    settings = [f"teacher={FULL}", "precision=bf16", "guidance_scale=3", "solver=ddim", "steps=10", "batch_size=8"]
    found, name = benched("pairs", *settings, *OPTIONS.get(option, ())), f"pairs{option and ', ' + option}"
    figure(f"{name}, bf16, guidance 3, 10 steps: a second", found["images_per_second"], found["images_per_second"])
    figure(f"{name}: share of the peak", f"{found['share_of_peak']:.1%}", found["share_of_peak"])
    figure(f"{name}: over its raw calls", f"{found['ratio']:.3f}", found["ratio"])
    figure(f"{name}: first call", f"{found['first_seconds']:.0f} s", found["first_seconds"])


SECTIONS = {"network": network, "pipeline": pipeline, "compile": compiled, "recipe": recipe}


def run(section: str) -> None:
    """A timed section: dmd-BATCH[-OPTION], one-step[-HOW], pairs[-OPTION], or one of SECTIONS."""
    kind, _, rest = section.partition("-")
    if kind == "dmd":
        batch, _, option = rest.partition("-")
        dmd(int(batch), option)
    elif kind == "pairs":
        pairs(rest)
    elif kind == "one":
        one_step(rest.partition("-")[2] or "none")
    else:
        SECTIONS[section]()

"""What Stable Diffusion 1.5's pairs and training take on 1 to 512 GPUs: the plans of `--dry-run`, divided.

python -m docs.scale
"""

from __future__ import annotations

from distill_cli.config import PairsConfig
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import open as open_dmd
from distill_cli.models.cost import RATE, decoding, evaluation, sketch
from distill_cli.recipes import resolve
from distill_cli.training.job import Job
from distill_cli.training.plan import flop as step_flop

GPUS = (1, 8, 72, 512)
BYTES = 2


def hours(flop: float, gpus: int) -> str:
    value = flop / RATE / 3600 / gpus
    return f"{value / 24:,.1f} days" if value > 72 else f"{value:,.1f} h" if value >= 1 else f"{60 * value:,.0f} min"


def main() -> None:
    model = sketch("sd15")
    pairs, dmd = resolve(PairsConfig, "sd15-pairs"), resolve(DMDConfig, "sd15-dmd")
    calls = model.with_defaults(pairs.solver, pairs.steps, pairs.guidance_scale).evaluations
    latents, text = 4 * 64 * 64 * BYTES, model.conditioner.embedding * BYTES
    size = sum(p.numel() for p in model.denoiser.parameters())
    print(f"An evaluation: {evaluation(model) / 1e12:.3f} TFLOP; a decoded picture: {decoding(model) / 1e12:.2f} TFLOP.\n")
    print("| | network evaluations | latents | text embeddings | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in GPUS) + " |")
    print("|---|" + "---|" * (3 + len(GPUS)))
    for count, name in ((500_000, "500k pairs"), (12_000_000, "12M pairs")):
        flop = count * calls * evaluation(model)
        cells = [f"{count * calls / 1e6:,.0f} million", f"{count * latents / 1e9:,.0f} GB", f"{count * text / 1e9:,.0f} GB"]
        print(f"| {name} | " + " | ".join(cells + [hours(flop, n) for n in GPUS]) + " |")
    step = open_dmd(dmd, Job("dmd", dry_run=True)).calls()
    flop = dmd.steps * step_flop(model, step.evaluations(), step.decoded)
    print(f"| `sd15-dmd`, {dmd.steps:,} steps of {dmd.batch_size} | | | | " + " | ".join(hours(flop, n) for n in GPUS) + " |")
    read = dmd.batch_size * (latents + 2 * text)
    print(
        f"\nA training step reads {read / 1e6:,.0f} MB of latents and embeddings, from all processes together, and exchanges gradients of"
    )
    print(f"2 x {4 * size / 1e9:.2f} GB a GPU. Weights, gradients and moments take 2 x {16 * size / 1e9:.1f} GB,")
    print(f"the teacher, which {dmd.precision} keeps in half precision, {2 * size / 1e9:.1f} GB.")


if __name__ == "__main__":
    main()

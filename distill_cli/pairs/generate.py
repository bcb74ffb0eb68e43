"""Make noise-image pairs with a teacher, shard by shard; pair i depends on (seed, i) alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from distill_cli import launch, processes, shards
from distill_cli.config import PairsConfig
from distill_cli.data.prompts import in_turn
from distill_cli.diffusion.noise import Draws
from distill_cli.files import remove_temporaries
from distill_cli.models import compiled
from distill_cli.models.cost import amount, evaluation, time_of
from distill_cli.models.model import Model
from distill_cli.models.steering import uncounted
from distill_cli.pairs.store import MANIFEST, OURS, Manifest, checks, keep_prompts, scales_of, shard_path, write_shard
from distill_cli.runs import settle
from distill_cli.verified import Verified

COUNTED = 100_000
"""Most prompts in which a plan counts duplicates."""


def manifest_of(config: PairsConfig, teacher: Model) -> Manifest:
    """The manifest of a job, from its config and its teacher."""
    usual = teacher.taught_by(config.guidance_scale, config.guidance_range)
    sampling = teacher.with_defaults(config.solver, config.steps, usual.guidance_scale, config.guidance_calls)
    if config.guidance_range and not teacher.backbone.dial:
        teacher.backbone.told()  # which refuses, before the work is done
    conditioner = teacher.conditioner
    conditioner.labels(1, config.classes)
    return Manifest(
        teacher=teacher.lineage.name,
        teacher_hash=teacher.weights_hash(),
        precision=config.precision,
        seed=config.seed,
        num=config.num,
        classes=conditioner.drawn(config.classes),
        negative_prompt=conditioner.negative,
        shape=teacher.shape,
        dtype=config.dtype,
        shard_size=config.shard_size,
        batch_size=config.batch_size,
        guidance_range=config.guidance_range,
        guides=teacher.guidance(),
        compile=config.compile,
        channels_last=config.channels_last,
        **conditioner.digests(),
        **sampling.model_dump(),
    )


def plan(manifest: Manifest, teacher: Model, precision: str = "no") -> dict[str, str]:
    """The cost of making the pairs, for --dry-run."""
    sampling = manifest.sampling.model_copy(update={"guidance_scale": 2.0} if manifest.guidance_range else {})
    calls = sampling.evaluations
    item = shards.DTYPES[manifest.dtype].itemsize
    size = manifest.num * (torch.Size(manifest.shape).numel() * item + 4)
    text = {}
    if each := teacher.conditioner.embedding * item:
        prompts = teacher.conditioner.prompts
        known = prompts and len(prompts) <= COUNTED
        count = len(set(in_turn(prompts, manifest.num))) if known else min(manifest.num, len(prompts) or manifest.num)
        text = {"text embeddings": f"{count * each / 1e6:,.1f} MB of {count:,} prompts{'' if known else ', where all are different'}"}
    flop = evaluation(teacher)
    return {
        "pairs": f"{manifest.num} in {manifest.shards} shards",
        "network evaluations": f"{manifest.num * calls:,} ({calls} an image), each of {amount(flop)}",
        "arithmetic": time_of(manifest.num * calls * flop),
        **compiled.plan(manifest.compile, manifest.batch_size, sampling),
        "disk": f"{size / 1e6:.1f} MB",
        **text,
        **uncounted(teacher),
        "memory": f"about {teacher.held(launch.HALF.get(precision)) / 1e6:.0f} MB of weights",
    }


def generate(config: PairsConfig, teacher: Model, folder: Path, part: tuple[int, int] = (0, 1)) -> dict[str, int]:
    """Make this process's share of the missing shards in part (i, n) of the job; raises DistillError for a damaged shard.

    Returns the numbers of shards: `made` and `kept` by this process, `missing` from the whole job, and `left` of these to other
    processes of this part. One process makes a whole shard, in batches that never cross its border, so its bytes do not depend on
    the number of processes. ^C, SIGTERM and SIGUSR1 stop between batches; finished shards stay.
    """
    manifest = manifest_of(config, teacher)
    settle(folder / MANIFEST, manifest.settings(), "pairs", OURS)
    remove_temporaries(folder)
    where = launch.device(config.device)
    compiled.prepare(config, teacher, where, decodes=False)
    if teacher.conditioner.prompts:
        keep_prompts(folder, teacher.conditioner.prompts)
    teacher = replace(teacher, conditioner=teacher.conditioner.stored(folder, config.dtype, manifest.num))
    mine = processes.mine(manifest.shards, part)
    missing = [shard for shard in mine if not shard_path(folder, shard).exists()]
    for error in Verified(folder, who=mine.start).verify(checks(folder, manifest, sorted(set(mine) - set(missing)))):
        raise error
    if processes.rank() == 0:  # which speaks for all of this part
        absent = [s for s in range(part[0], manifest.shards, part[1]) if not shard_path(folder, s).exists()]
        teacher.conditioner.say_cut(pair for shard in absent for pair in manifest.range(shard))
    progress = launch.Progress(sum(len(manifest.range(s)) for s in missing), "pairs", "pairs")
    with launch.stoppable() as stop:
        for shard in missing:
            images, labels = [], []
            whole = manifest.range(shard)
            for first in range(whole.start, whole.stop, config.batch_size):
                if stop.requested:
                    raise stop.interrupted(stop.requested, f"stopped before pair {first}", "the same command makes what is missing")
                indices = range(first, min(whole.stop, first + config.batch_size))
                label = teacher.conditioner.labels(len(indices), list(manifest.classes) or None, start=first)
                told = scales_of(manifest, indices) if manifest.guidance_range else None
                with launch.autocast(where, config.precision):
                    images.append(teacher.generate(Draws(config.seed, indices), label, manifest.sampling, told).cpu())
                labels.append(label)
                progress.add(len(indices))
            write_shard(folder, manifest, shard, torch.cat(images), torch.cat(labels))
    progress.close()
    absent = [shard for shard in range(manifest.shards) if not shard_path(folder, shard).exists()]
    left = sum(shard % part[1] == part[0] for shard in absent)
    return {"made": len(missing), "kept": len(mine) - len(missing), "missing": len(absent), "left": left}

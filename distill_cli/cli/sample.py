"""distill sample"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from distill_cli.cli import common
from distill_cli.cli.options import HelpAll
from distill_cli.errors import UsageError
from distill_cli.processes import parse_part

if TYPE_CHECKING:
    from distill_cli.config import SampleConfig
    from distill_cli.models.model import Model


def sample(
    context: typer.Context,
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    num_processes: common.Processes = None,
    shards: common.Shards = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    help_all: HelpAll = False,
) -> None:
    """Make images with any model, teacher or student. A restart makes only what is missing."""
    config: SampleConfig = common.asked(context, recipe, overrides, "samples")
    part = parse_part(shards)
    if config.search_times and part != (0, 1):
        raise UsageError("--search-times makes no samples, so --shards has no use here")
    if dry_run:
        common.plan_without(config.model, config)
    else:
        common.start_processes(num_processes, config.prompts)
    from distill_cli.models import compiled
    from distill_cli.sample import batch

    loaded, config, download = common.open_model("sample", config.model, config, dry_run)
    config = batch.settled(config, loaded)
    assert config.out is not None
    if config.times is not None:
        loaded = loaded.with_times(config.times, config.steps)
        first, most = loaded.sampler.times[0], loaded.denoiser.schedule.t_max
        if first < most / 2:
            said = f"begins with pure noise of sigma {first:.3g}, where pictures are not all noise; use {most:g}"
            common.say(f"--times {config.times}: {said}")
    if dry_run and config.search_times:
        common.dry_run(config, {"images": f"{config.num} for each of about {9 * (config.search_times - 1)} choices of times"})
    if dry_run:
        sampling = loaded.with_defaults(config.solver, config.steps, config.guidance_scale, config.guidance_calls)
        calls = sampling.evaluations
        plan = {**download, "images": config.num, "network evaluations": f"{config.num * calls:,} ({calls} an image)"}
        common.dry_run(config, plan | compiled.plan(config.compile, config.batch_size, sampling))
    if config.search_times:
        _search(config, loaded, json)
        return
    data = batch.sample(config, loaded, config.out, part)
    speed = f", {data['images_per_second']} images/s" if data["made"] else ""
    text = f"samples: {config.num} in {config.out} ({data['made']} made, {data['kept']} were there){speed}"
    if config.grid and not data["missing"]:
        text += f"\npicture: {config.out / 'grid.png'}"
    common.shared_result(data, text, json, "images")


def _search(config: SampleConfig, model: Model, as_json: bool) -> None:
    """Find a student's best times and write them into its folder."""
    from distill_cli.evaluate.search import search_times
    from distill_cli.models.formats import save_sampler
    from distill_cli.models.sources.registry import folder_of

    folder = folder_of(Path(config.model), config.steps)
    if folder is None:
        raise UsageError(f"--model {config.model}: --search-times writes into a student's folder", "give a folder or a run")
    assert config.search_times is not None
    best, indices, tried = search_times(config, model, config.search_times)
    save_sampler(best, folder)
    times = ", ".join(f"{time:.4g}" for time in best.sampler.times)
    text = f"{folder}: sampled in {config.search_times} steps at index:{','.join(map(str, indices))} (sigma {times}) from now on"
    common.result({"folder": str(folder), "indices": indices, "times": list(best.sampler.times), "tried": tried}, text, as_json)

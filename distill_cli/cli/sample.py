"""distill sample"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from distill_cli.cli import common

if TYPE_CHECKING:
    from distill_cli.config import SampleConfig
    from distill_cli.models.model import Model


def sample(
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    model: Annotated[str | None, typer.Option(help="A name of `distill models ls`, a folder, a run, or a hub id.")] = None,
    num: Annotated[int | None, typer.Option(help="Images to make.")] = None,
    out: common.Out = None,
    classes: common.Classes = None,
    prompts: common.Prompts = None,
    negative_prompt: common.Negative = None,
    images_per_prompt: Annotated[int | None, typer.Option(help="Pictures of each prompt.")] = None,
    solver: common.Solver = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default the model's own.")] = None,
    times: Annotated[str | None, typer.Option(help="A student's: index:0,22 (points of its grid), sigma:80,1.4, or even.")] = None,
    search_times: Annotated[
        int | None, typer.Option(help="Find the best times of a student for N steps, and keep them.", metavar="N")
    ] = None,
    classifier: Annotated[str | None, typer.Option(help="--search-times: in whose features it measures.")] = None,
    guidance_scale: common.Guidance = None,
    batch_size: common.BatchSize = None,
    format: Annotated[str | None, typer.Option(help="png or npz.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also a picture of the first 100.")] = False,
    precision: common.Precision = None,
    seed: common.Seed = None,
    device: common.Device = None,
    num_processes: common.Processes = None,
    shards: common.Shards = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
) -> None:
    """Make images with any model, teacher or student. A restart makes only what is missing."""
    from distill_cli.config import SampleConfig
    from distill_cli.errors import UsageError
    from distill_cli.recipes import resolve

    flags = dict(
        model=model, num=num, out=out, classes=classes, prompts=prompts, negative_prompt=negative_prompt,
        images_per_prompt=images_per_prompt, solver=solver, steps=steps, times=times, search_times=search_times,
        classifier=classifier, guidance_scale=guidance_scale, batch_size=batch_size, format=format, grid=grid or None, precision=precision,
        seed=seed, device=device,
    )  # fmt: skip
    config = common.with_out(resolve(SampleConfig, recipe, overrides or [], flags), recipe, "samples")
    from distill_cli.processes import parse_part

    part = parse_part(shards)
    if not dry_run:
        common.start_processes(num_processes, config.prompts)
    from distill_cli.sample import batch

    if config.search_times and part != (0, 1):
        raise UsageError("--search-times makes no samples, so --shards has no use here")
    if common.planned_without(config.model, config, dry_run):
        return
    from distill_cli.models.cost import sketched

    sketch, download = sketched(config.model, dry_run)
    loaded, config = common.open_model("sample", config.model, config, sketch)
    assert config.out is not None
    if config.times is not None:
        loaded = loaded.with_times(config.times, config.steps)
        first, most = loaded.sampler.times[0], loaded.denoiser.schedule.t_max
        if first < most / 2:
            common.say(
                f"--times {config.times}: begins with pure noise of sigma {first:.3g}, where pictures are not all noise; use {most:g}"
            )
    if dry_run and config.search_times:
        common.dry_run(config, {"images": f"{config.num} for each of about {9 * (config.search_times - 1)} choices of times"})
        return
    if dry_run:
        calls = loaded.with_defaults(config.solver, config.steps, config.guidance_scale, config.guidance_calls).evaluations
        common.dry_run(config, download | {"images": config.num, "network evaluations": f"{config.num * calls:,} ({calls} an image)"})
        return
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
    from pathlib import Path

    from distill_cli.errors import UsageError
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

"""distill bench"""

from __future__ import annotations

from typing import Annotated

import typer

from distill_cli.cli import common
from distill_cli.commands import config_of
from distill_cli.errors import UsageError, nearest


def bench(
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="A command that trains a denoiser, pairs, or sample.")],
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often both sides are timed, in turn; medians are printed.")] = 20,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Make a hub model that is not here of random weights.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also print the ten operations that take most of the time.")] = False,
    json: common.Json = False,
) -> None:
    """Time a command against the bare network calls and optimizer steps, in one run.

    Pairs, pictures and prompts that are not there are made of random numbers.
    """
    import tempfile
    from pathlib import Path

    from distill_cli.bench.cases import CASES
    from distill_cli.bench.measure import measured
    from distill_cli.recipes import resolve

    if command not in CASES:
        raise UsageError(f"bench {command}: nothing of that name", nearest(command, CASES, "there are"))
    config = resolve(config_of(command), recipe, overrides or [], {})
    with tempfile.TemporaryDirectory() as folder:
        case = CASES[command](config, Path(folder), random_weights)
        data = measured(command, case, repeats, profile)
    lines = [
        f"{command}: {data['ratio']:.3f} of the bare calls' time",
        f"{data['ours_seconds']:.4f} s over {data['raw_seconds']:.4f} s ({data['raw_calls']}), medians of {repeats}",
        f"{data['images_per_second']} images/s; {data['share_of_peak']:.1%} of {data['peak_tflops']:.4g} TFLOP/s, the peak of a product "
        f"of matrices in {data['peak_type']} here",
        f"{data['peak_memory_mb']} MB at most; the plan counts {data['planned_memory_mb']} MB",
        *(f"{each['share']:6.1%} {each['calls']:6} {each['operation']}" for each in data.get("profile", [])),
        f"{data['machine']}; {', '.join(f'{name} {version}' for name, version in data['versions'].items())}",
    ]
    common.result(data, "\n".join(lines), json)

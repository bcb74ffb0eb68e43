"""distill models"""

from __future__ import annotations

from typing import Annotated

import typer

from distill_cli.cli import common

app = typer.Typer(help="Models: ls, show.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def ls(json: common.Json = False) -> None:
    """List the models that are known by name."""
    from distill_cli.models.sources.registry import REGISTRY

    rows = {name: {"summary": entry.summary, "licence": entry.licence} for name, entry in REGISTRY.items()}
    common.result(rows, "\n".join(f"{name:22} {row['summary']} [{row['licence']}]" for name, row in rows.items()), json)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A name, a folder, a run, or a hub id.", callback=common.expand)],
    json: common.Json = False,
) -> None:
    """Show what a model is, how it is sampled, and where it came from."""
    from distill_cli.models import load
    from distill_cli.models.formats import comfyui, format_of
    from distill_cli.models.lora import Adapter
    from distill_cli.models.sources import hub, published
    from distill_cli.models.sources.names import base_of
    from distill_cli.models.sources.registry import REGISTRY

    base = base_of(name)
    download = published.to_download(base) or (hub.to_download(base) if hub.short_name(base) else "")
    if download:  # showing a model is no reason to download gigabytes
        entry = REGISTRY.get(hub.short_name(base) or base)
        said = {"summary": entry.summary, "licence": entry.licence} if entry is not None else {}
        known = {"name": name, **said, "download": download}
        common.result(known, "\n".join(f"{key:17} {value}" for key, value in known.items()), json)
        return
    model = load(name)
    denoiser = model.denoiser
    there = format_of(model).in_diffusers(model)
    rows = {
        "name": model.lineage.name,
        "kind": model.lineage.kind,
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        **({"lora": f"rank {model.backbone.rank}, on {model.backbone.source}"} if isinstance(model.backbone, Adapter) else {}),
        "shape": list(model.shape),
        "makes": model.codec.kind.size(model.picture),
        **({"pixels": model.pixels if model.shape[1] == model.shape[2] else model.picture} if model.codec.kind.drawn else {}),
        **model.conditioner.shown(),
        "schedule": type(denoiser.schedule).__name__,
        "parameterisation": denoiser.parameterisation,
        "time_input": denoiser.time_input,
        "sampling": model.sampling.model_dump(),
        "knows": model.sampler.knows,
        "answers": model.sampler.answers,
        "guidance": f"{model.sampler.guidance}, scale {model.sampler.dial}{f' ({there.scale})' if there.scale else ''}",
        "times": list(model.sampler.times),
        "grid": denoiser.schedule.grid or None,
        "in_diffusers": there.said,
        "in_comfyui": comfyui.settings(model) or None,
        "lineage": model.lineage.model_dump(exclude={"name", "kind"}),
        "weights_hash": model.weights_hash(),
    }
    lines = []
    for key, value in rows.items():
        plain = ", ".join(f"{k} {v}" for k, v in value.items() if v != "") if isinstance(value, dict) else value
        lines.append(f"{key:17} {f'{plain:,}' if key == 'parameters' else plain}")
    common.result(rows, "\n".join(lines), json)

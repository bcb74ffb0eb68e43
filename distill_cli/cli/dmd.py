"""distill dmd"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_cli.cli import common

if TYPE_CHECKING:
    from distill_cli.config import DMDConfig
    from distill_cli.models.model import Model
    from distill_cli.pairs.store import PairStore


def dmd(
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    teacher: Annotated[str | None, typer.Option(help="A name of `distill models ls`, a folder, or a hub id.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="A folder of `distill pairs`, for the regression loss.", callback=common.expand)
    ] = None,
    prompts: common.Prompts = None,
    negative_prompt: common.Negative = None,
    out: common.Out = None,
    steps: common.Steps = None,
    batch_size: common.BatchSize = None,
    lr: common.Rate = None,
    fake_lr: Annotated[float | None, typer.Option(help="Learning rate of the fake score; default --lr.")] = None,
    fake_steps: Annotated[int | None, typer.Option(help="Fake-score steps a student step.")] = None,
    regression_loss: Annotated[str | None, typer.Option(help="l2, huber or lpips.")] = None,
    regression_weight: Annotated[float | None, typer.Option(help="Default 0.25 with pairs.")] = None,
    guidance_scale: common.Guidance = None,
    precision: common.Precision = None,
    seed: common.Seed = None,
    device: common.Device = None,
    resume: common.Resume = None,
    num_processes: common.Processes = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
) -> None:
    """Distil a one-step student by distribution matching."""
    from distill_cli.config import DMDConfig

    flags = dict(
        teacher=teacher, pairs=pairs, prompts=prompts, negative_prompt=negative_prompt, out=out, steps=steps, batch_size=batch_size, lr=lr,
        fake_lr=fake_lr, fake_steps=fake_steps, regression_loss=regression_loss, regression_weight=regression_weight,
        guidance_scale=guidance_scale, precision=precision, seed=seed, device=device, resume=resume,
    )  # fmt: skip
    config = common.open_run(DMDConfig, "dmd", recipe, overrides, dry_run, flags)
    if not dry_run:
        common.start_processes(num_processes, config.prompts)
    if common.planned_without(config.teacher, config, dry_run):
        return
    from distill_cli.methods.dmd.objective import DMD
    from distill_cli.models import load
    from distill_cli.pairs.store import MANIFEST, PairStore
    from distill_cli.processes import rank
    from distill_cli.training.engine import Engine

    sketch, download = common.sketched(config.teacher, dry_run)
    model = sketch or load(config.teacher)
    there = config.pairs is not None and (not dry_run or (config.pairs / MANIFEST).is_file())
    store = PairStore(config.pairs, config.out) if config.pairs is not None and there else None
    given = model.conditioner.chosen(config.prompts, model.lineage.data) if config.prompts is not None or config.pairs is None else ()
    common.say_read("dmd", model, store, given)
    if dry_run:
        common.dry_run(config, {**download, **_plan(config, model, store)})
        return
    if store is not None:
        store.verify()
    else:
        common.say("no --pairs: training by distribution matching alone, without the regression that keeps all modes")
    objective = DMD(config, model, store, given)
    if config.prompts is not None and resume is None and rank() == 0:
        objective.teacher.conditioner.say_cut(range(len(objective.teacher.conditioner.prompts)))
    engine = Engine(config, objective)
    common.start_run(engine, "dmd", resume, given)
    if store is not None:
        store.verified.save(elsewhere=True)  # of a read-only store, in the run's folder
    student = engine.train()
    if student is None:  # process 0 alone has it
        return
    folder = engine.run.folder
    picture = folder / "comparison.png"
    engine.release()
    rows = {"teacher": (objective.teacher, objective.sampling), "student": (student, student.sampling)}
    common.compare(rows, config, picture, config.classes)
    data = {"run": str(folder), "student": str(folder / "student"), "picture": str(picture), "steps": config.steps}
    common.result(data, f"student: {folder / 'student'}\npicture: {picture}", json)


def _plan(config: DMDConfig, model: Model, store: PairStore | None) -> dict[str, Any]:
    """The plan of a run: what any training takes, and the arithmetic."""
    from distill_cli.methods.dmd.objective import guidance_of
    from distill_cli.models.cost import distillation, time_of

    count = sum(p.numel() for p in model.denoiser.parameters())
    names = ["teacher", "student", *(["fake"] if config.matching_weight and config.fake_score else [])]
    parameters = dict.fromkeys(names, count)
    parameters |= {part: sum(p.numel() for p in network.parameters()) for part, network in model.parts().items() if part == "vae"}
    manifest = store.manifest if store is not None else None
    guided = (guidance_of(config, manifest) or model.sampling.guidance_scale) != 1
    flop = distillation(config, model, guided, config.pairs is not None and config.regression_weight != 0)
    text = {}
    if each := model.conditioner.embedding * 2:
        text = {"text embeddings": f"{each / 1e3:.0f} kB a prompt in fp16, of all prompts, before the first step"}
    return {**text, **common.training_plan(config, parameters, (len(names) - 1) * count), "arithmetic": time_of(flop)}

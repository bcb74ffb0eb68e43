"""distill cm"""

from __future__ import annotations

from typing import Annotated

import typer

from distill_cli.cli import common


def cm(
    overrides: common.Overrides = None,
    recipe: common.Recipe = None,
    method: Annotated[str | None, typer.Option(help="cd, ct, ict or ect.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A name of `distill models ls`, a folder or a hub id; optional for ct, ict.")] = None,
    data: Annotated[str | None, typer.Option(help="Real images: a built-in set or a folder; default the teacher's set.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels; a folder needs it.")] = None,
    out: common.Out = None,
    steps: common.Steps = None,
    batch_size: common.BatchSize = None,
    lr: common.Rate = None,
    metric: Annotated[str | None, typer.Option(help="huber, l1, l2 or lpips.")] = None,
    guidance_scale: common.Guidance = None,
    precision: common.Precision = None,
    seed: common.Seed = None,
    device: common.Device = None,
    resume: common.Resume = None,
    num_processes: common.Processes = None,
    dry_run: common.DryRun = False,
    json: common.Json = False,
) -> None:
    """Distil or train a consistency model, a student of one or a few steps."""
    from distill_cli.config import CMConfig

    flags = dict(
        method=method, teacher=teacher, data=data, resolution=resolution, out=out, steps=steps, batch_size=batch_size, lr=lr,
        metric=metric, guidance_scale=guidance_scale, precision=precision, seed=seed, device=device, resume=resume,
    )  # fmt: skip
    config = common.open_run(CMConfig, "cm", recipe, overrides, dry_run, flags)
    if not dry_run:
        common.start_processes(num_processes)
    if config.teacher and common.planned_without(config.teacher, config, dry_run):
        return
    from distill_cli.diffusion.schedule import EDMSchedule
    from distill_cli.methods.cm.objective import Consistency, check, images_of, new, without_null
    from distill_cli.models import load
    from distill_cli.models.times import parse, spelled
    from distill_cli.training.engine import Engine

    sketch = common.sketched(config.teacher, dry_run)[0] if config.teacher else None
    model = sketch or (load(config.teacher) if config.teacher else None)
    # runs saved before students had their own grid counted times on 40 points
    if resume is not None and config.times is not None and not config.times.startswith("sigma:"):
        config = config.model_copy(update={"times": spelled(parse(config.times, EDMSchedule(), 2))})
    config, said = without_null(config, model, resume is None and "label_dropout" in config.model_fields_set)
    if said:
        common.say(said)
    config = config.model_copy(update={"data": images_of(config, model)})
    images = common.open_data("cm", config, resume, dry_run, model)
    if dry_run:
        start = new(config, images) if model is None else model
        check(config, start, images)
        count = sum(p.numel() for p in start.denoiser.parameters())
        parts = {"teacher": config.method == "cd", "student": True, "target": config.method in ("cd", "ct")}
        common.dry_run(config, common.training_plan(config, {name: count for name, there in parts.items() if there}, count))
        return
    objective = Consistency(config, model, images)
    known = objective.start.conditioner.classes
    if images.classes and not known:
        common.say(f"the teacher knows no classes: those of {config.data} are left aside")
    elif list(images.classes) != list(known):
        common.say(f"the classes {', '.join(images.classes[:3])}, ... of {config.data} are taken for the teacher's in their order")
    engine = Engine(config.model_copy(update={"times": spelled(objective.own_times)}), objective)
    common.start_run(engine, "cm", resume)
    student = engine.train()
    if student is None:  # process 0 alone has it
        return
    folder = engine.run.folder
    engine.release()
    rows = {}
    if model is not None:
        rows["teacher"] = (model.to(engine.accelerator.device), objective.sampling if config.method == "cd" else model.sampling)
    rows |= {f"student, {n} step{'s' * (n > 1)}": (student, student.sampling.model_copy(update={"steps": n})) for n in (1, 2)}
    picture = folder / "comparison.png"
    common.compare(rows, config, picture)
    result = {"run": str(folder), "student": str(folder / "student"), "picture": str(picture), "steps": config.steps}
    common.result(result, f"student: {folder / 'student'}\npicture: {picture}", json)

"""What each method opens, until its own opener does (methods/X/objective.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_cli.cli import common

if TYPE_CHECKING:
    from distill_cli.config import TrainingConfig
    from distill_cli.methods.classifier.config import ClassifierConfig
    from distill_cli.methods.cm.config import CMConfig
    from distill_cli.methods.dmd.config import DMDConfig
    from distill_cli.methods.train.config import TrainConfig
    from distill_cli.methods.vae.config import VAEConfig
    from distill_cli.models.model import Model, Sampling
    from distill_cli.pairs.store import PairStore

    Rows = dict[str, tuple[Model, Sampling]]


@dataclass
class Opened:
    """An objective, or the plan of a dry run; and how its run begins and ends."""

    config: TrainingConfig
    objective: Any = None
    plan: dict[str, Any] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    begin: Callable[[], None] = lambda: None
    rows: Callable[[Model], Rows] | None = None
    """What the comparison shows beside one another."""


def train(config: TrainConfig, resume: Path | None, dry_run: bool) -> Opened:
    from distill_cli.methods.train.denoising import Denoising
    from distill_cli.methods.train.text_to_image import TextToImage

    images = common.open_data("train", config, resume, dry_run)
    return _own(config, Denoising(config, images) if config.vae is None else TextToImage(config, images))


def vae(config: VAEConfig, resume: Path | None, dry_run: bool) -> Opened:
    from distill_cli.methods.vae.objective import Autoencoding

    return _own(config, Autoencoding(config, common.open_data("vae", config, resume, dry_run)))


def classifier(config: ClassifierConfig, resume: Path | None, dry_run: bool) -> Opened:
    from distill_cli.methods.classifier.objective import Classification

    return _own(config, Classification(config, common.open_data("classifier", config, resume, dry_run)))


def _own(config: TrainingConfig, objective: Any) -> Opened:
    """An objective with one network, a new one."""
    ((name, network),) = objective.networks.items()
    count = sum(p.numel() for p in network.parameters())
    return Opened(config, objective, common.training_plan(config, {name: count}, count))


def dmd(config: DMDConfig, resume: Path | None, dry_run: bool) -> Opened:
    from distill_cli.methods.dmd.objective import DMD
    from distill_cli.models import load
    from distill_cli.pairs.store import MANIFEST, PairStore
    from distill_cli.processes import rank

    sketch, download = common.sketched(config.teacher, dry_run)
    model = sketch or load(config.teacher)
    there = config.pairs is not None and (not dry_run or (config.pairs / MANIFEST).is_file())
    store = PairStore(config.pairs, config.out) if config.pairs is not None and there else None
    given = model.conditioner.chosen(config.prompts, model.lineage.data) if config.prompts is not None or config.pairs is None else ()
    common.say_read("dmd", model, store, given)
    if dry_run:
        return Opened(config, plan={**download, **_plan(config, model, store)})
    if store is not None:
        store.verify()
    else:
        common.say("no --pairs: training by distribution matching alone, without the regression that keeps all modes")
    objective = DMD(config, model, store, given)
    if config.prompts is not None and resume is None and rank() == 0:
        objective.teacher.conditioner.say_cut(range(len(objective.teacher.conditioner.prompts)))

    def begin() -> None:
        if store is not None:
            store.verified.save(elsewhere=True)  # of a read-only store, in the run's folder

    def rows(student: Model) -> Rows:
        return {"teacher": (objective.teacher, objective.sampling), "student": (student, student.sampling)}

    return Opened(config, objective, prompts=given, begin=begin, rows=rows)


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


def cm(config: CMConfig, resume: Path | None, dry_run: bool) -> Opened:
    from distill_cli.diffusion.schedule import EDMSchedule
    from distill_cli.launch import device
    from distill_cli.methods.cm.config import NewConfig
    from distill_cli.methods.cm.objective import Consistency, check, images_of, new, without_null
    from distill_cli.models import load
    from distill_cli.models.times import parse, spelled

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
        if model is None:
            assert isinstance(config, NewConfig)
            start = new(config, images)
        else:
            start = model
        check(config, start, images)
        count = sum(p.numel() for p in start.denoiser.parameters())
        parts = {"teacher": config.method == "cd", "student": True, "target": config.method in ("cd", "ct")}
        return Opened(config, plan=common.training_plan(config, {name: count for name, there in parts.items() if there}, count))
    objective = Consistency(config, model, images)
    known = objective.start.conditioner.classes
    if images.classes and not known:
        common.say(f"the teacher knows no classes: those of {config.data} are left aside")
    elif list(images.classes) != list(known):
        common.say(f"the classes {', '.join(images.classes[:3])}, ... of {config.data} are taken for the teacher's in their order")

    def rows(student: Model) -> Rows:
        out = {}
        if model is not None:
            out["teacher"] = (model.to(device(config.device)), objective.sampling if config.method == "cd" else model.sampling)
        steps = (1, 2)
        return out | {f"student, {n} step{'s' * (n > 1)}": (student, student.sampling.model_copy(update={"steps": n})) for n in steps}

    return Opened(config.model_copy(update={"times": spelled(objective.own_times)}), objective, rows=rows)

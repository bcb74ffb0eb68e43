"""A training command: what its method reads when it is opened, and the run that it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_cli import launch, locks
from distill_cli.config import BUILTIN_SETS, PROMPT_SETS
from distill_cli.data import Images, listing, open_images
from distill_cli.data.images import Folder
from distill_cli.data.reading import is_pipe
from distill_cli.errors import DistillError
from distill_cli.files import write_atomic
from distill_cli.models import load
from distill_cli.models.cost import sketched
from distill_cli.models.model import Model
from distill_cli.models.sources import names
from distill_cli.models.sources.registry import REGISTRY
from distill_cli.pairs.store import MANIFEST, PROMPTS, PairStore, keep_prompts
from distill_cli.processes import rank, say, say_read
from distill_cli.recipes import dump
from distill_cli.runs import Run
from distill_cli.training import identity
from distill_cli.training.engine import Engine


@dataclass
class Job:
    """A training command. `resume` is the folder of the run that it continues. A dry run downloads nothing."""

    command: str
    resume: Path | None = None
    dry_run: bool = False
    prompts: Sequence[str] = ()
    """The prompts that were read, for a teacher with text."""
    plan: dict[str, Any] = field(default_factory=dict)
    """Lines of the plan that come first: downloads."""

    def teacher(self, name: str, device: str) -> Model:
        """The teacher, on the training device. In a dry run it is on the meta device; a hub model that is not here is a sketch."""
        model, download = sketched(name, self.dry_run)
        self.plan |= download
        if model is None:
            model = load(name)
            model.denoiser.to("meta" if self.dry_run else launch.device(device))
        return model

    def say_read(self, *things: Any) -> None:
        """Print what was read, as the command's first line."""
        say_read(self.command, *things)

    def pairs(self, folder: Path | None, out: Path | None) -> PairStore | None:
        """The pairs in `folder`, for a run in `out`; None without a folder, or in a dry run before they are made, which the plan says."""
        if folder is None:
            return None
        if self.dry_run and not (folder / MANIFEST).is_file():
            self.plan["pairs"] = f"{folder} has none yet: not compared with the teacher"
            return None
        return PairStore(folder, out)

    def images(self, config: Any, *read: Any) -> Images:
        """The set that a config names, its pictures in the order in which the run began; says that it and `read` were read."""
        images = open_images(str(config.data), config.resolution, config.flip)
        self.say_read(*read, images)
        if isinstance(images, Folder) and not self.dry_run:
            for line in listing.prepare(images, self.resume):
                say(line)
        return images

    def begin(self, engine: Engine) -> None:
        """Make the run's folder, or open it and go on; its recipe runs again from any working directory, with prompts that a pipe gave."""
        config = engine.config
        assert config.out is not None
        keys = (
            "teacher",
            "student",
            "data",
            "pairs",
            "init_pairs",
            "lpips_weights",
            "vae",
            "prompts",
            "decoder",
            "classifier_guidance",
            "clip_guidance",
            "model",
        )
        given: dict[str, Any] = {key: getattr(config, key, None) for key in keys}
        files = {key: value for key, value in given.items() if value not in (None, *REGISTRY, *BUILTIN_SETS, *PROMPT_SETS)}
        absolute = {key: type(value)(Path(value).resolve()) for key, value in files.items() if Path(value).exists()}
        if given["teacher"] and names.split(given["teacher"])[1]:
            absolute["teacher"] = names.absolute(given["teacher"], REGISTRY)
        if piped := is_pipe(getattr(config, "prompts", None) or ""):
            absolute["prompts"] = str((config.out / PROMPTS).resolve())
        text = dump(config.model_copy(update={**absolute, "out": None}))
        run, trouble = Run(config.out), None
        if rank() == 0:
            try:
                locks.hold(config.out)
                run = Run.resume(self.resume) if self.resume is not None else Run.create(config.out, text, self.command)
                if piped:
                    keep_prompts(config.out, self.prompts)
            except DistillError as error:
                trouble = error
        identity.first_error(trouble, engine.talk)  # else the other processes would wait for it
        engine.open(run)
        if engine.pictures.plan is not None:
            say(f"health: {engine.pictures.plan}")
        images = engine.objective.images
        if rank() == 0 and isinstance(images, Folder):
            listing.keep(images, run.folder)
        if rank() == 0 and self.resume is not None:
            write_atomic(run.recipe, text)

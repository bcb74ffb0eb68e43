"""One training command: what its method reads while it opens, and the run that it begins."""

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
from distill_cli.models.sources.registry import REGISTRY
from distill_cli.pairs.store import PROMPTS, keep_prompts
from distill_cli.processes import rank, say, say_read
from distill_cli.recipes import dump
from distill_cli.runs import Run
from distill_cli.training import identity
from distill_cli.training.engine import Engine


@dataclass
class Job:
    """A command that trains; `resume` is the folder of the run that it continues. A dry run reads no weights that it has to download."""

    command: str
    resume: Path | None = None
    dry_run: bool = False
    prompts: Sequence[str] = ()
    """Those that were read, of a teacher with text."""
    plan: dict[str, Any] = field(default_factory=dict)
    """What the plan says before all else: what would be downloaded."""

    def teacher(self, name: str, device: str) -> Model:
        """The model where copies of it are trained; in a dry run without weights, and its architecture alone where it is not here yet."""
        model, download = sketched(name, self.dry_run)
        self.plan |= download
        if model is None:
            model = load(name)
            model.denoiser.to("meta" if self.dry_run else launch.device(device))
        return model

    def say_read(self, *things: Any) -> None:
        """Say in the command's first line what was read."""
        say_read(self.command, *things)

    def images(self, config: Any, *read: Any) -> Images:
        """The set that a config names: checked, and its pictures where they stood when a resumed run began.

        Says what was read: `read` and the images.
        """
        images = open_images(str(config.data), config.resolution, config.flip)
        self.say_read(*read, images)
        if isinstance(images, Folder) and not self.dry_run:
            for line in listing.prepare(images, self.resume):
                say(line)
        return images

    def begin(self, engine: Engine) -> None:
        """Make the run's folder, or open it and go on; its recipe runs again as it stands, from any working directory.

        Prompts that came through a pipe are kept in it.
        """
        config = engine.config
        assert config.out is not None
        given = {
            key: Path(value)
            for key in ("teacher", "data", "pairs", "lpips_weights", "vae", "prompts", "decoder")
            if (value := getattr(config, key, None)) is not None and value not in (*REGISTRY, *BUILTIN_SETS, *PROMPT_SETS)
        }
        paths = ("pairs", "lpips_weights", "vae")
        absolute = {key: path.resolve() if key in paths else str(path.resolve()) for key, path in given.items() if path.exists()}
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
        identity.first_error(trouble, engine.talk)  # the others would wait for it
        engine.open(run)
        images = engine.objective.images
        if rank() == 0 and isinstance(images, Folder):
            listing.keep(images, run.folder)
        if rank() == 0 and self.resume is not None:
            write_atomic(run.recipe, text)

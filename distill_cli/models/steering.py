"""The guides that a job's options name, put on its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill_cli.config import GuidesConfig
from distill_cli.errors import UsageError
from distill_cli.models import clip_guide, noisy_classifier, noisy_clip
from distill_cli.models.guides import ModelGuide
from distill_cli.models.model import Model
from distill_cli.models.sources import hub
from distill_cli.processes import say
from distill_cli.recipes import flag_of

GUIDES: tuple[Callable[[Any, Model], ModelGuide | None], ...] = (noisy_classifier.guide, clip_guide.guide, noisy_clip.guide)
"""Each makes a guide of a model if the options name it. It raises UsageError for one that does not fit the model."""


def led_by(teacher: Model) -> dict[str, Any]:
    """What guides a run's teacher, for its identity: a guide that is not there is said too, so that a resume misses none."""
    return dict.fromkeys(("classifier_guidance", "clip_guidance")) | teacher.guidance()


def uncounted(model: Model) -> dict[str, str]:
    """What a plan says of guides: their networks are counted, their calls and gradients are not."""
    names = ", ".join(guide.name for guide in model.guides)
    return {"guided": f"by {names}; the plan leaves out its calls, its gradient and their memory"} if names else {}


def led(model: Model, config: Any, teaching: bool = False, dry_run: bool = False) -> Model:
    """The model with the guides that `config` names, which is said; itself without any. `teaching`: as the teacher of a student.

    A dry run downloads nothing: a guide that is not here is left out, which is said.

    Raises UsageError for a student, and for a teacher whose student could not be told what a guide is asked for.
    """
    asks: bool = isinstance(config, GuidesConfig)  # not of a method that only begins with the teacher
    if not asks:
        return model
    if dry_run and config.clip_guidance and (download := hub.to_download(config.clip_guidance)):
        say(f"--clip-guidance: {download} would be downloaded; the plan is without it")
        config = config.model_copy(update={"clip_guidance": None})
    guides = [guide for make in GUIDES if (guide := make(config, model)) is not None]
    for guide in guides:
        flag = flag_of(next(iter(guide.identity())))
        if not model.sampler.teaches:
            raise UsageError(f"{flag}: {model.lineage.name} is a student, its guidance is built in", "guide its teacher, and distil that")
        if teaching and guide.classes and model.conditioner.takes == "nothing" and len(getattr(config, "classes", None) or ()) != 1:
            raise UsageError(
                f"{flag}: {model.lineage.name} has no classes to tell a student", "one of them, where the method has it: --classes 3"
            )
        if teaching and not guide.classes and model.text is None:
            raise UsageError(f"{flag}: {config.teacher} has no text to tell a student", "make samples with it")
    if not guides:
        return model
    base = "its estimate"
    if getattr(config, "guidance_range", None):
        base = "the estimate of each sample's own guidance scale"
    elif config.guidance_scale is not None:
        base = f"the estimate of guidance_scale {config.guidance_scale:g}"
    elif model.conditioner.has_null:
        base = f"the unconditional estimate{' (of pairs: as they were made)' * bool(getattr(config, 'pairs', None))}"
    end = "" if model.denoiser.schedule.signal else "; left out at the largest time, where there is no signal"
    say(f"guidance {', '.join(f'by {guide.name} at scale {guide.scale:g}' for guide in guides)} leads {base} of {model.lineage.name}{end}")
    return model.with_guides(*guides)

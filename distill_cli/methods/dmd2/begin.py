"""What `distill dmd2` begins with: teacher, a student, real images, prompts, pairs, and the student's own times."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.schedule import NoiseSchedule
from distill_cli.errors import DistillError, UsageError
from distill_cli.methods.dmd2.config import DMD2Config
from distill_cli.models.lora import PAIR, Adapter
from distill_cli.models.model import Model
from distill_cli.models.times import parse
from distill_cli.training.job import Job


def times_of(config: DMD2Config, schedule: NoiseSchedule, student: Model | None) -> Tensor:
    """(N,) float64: the student's own times, decreasing. Raises UsageError for times that schedule or given student do not have."""
    known = () if student is None or student.sampler.edits else student.sampler.times
    count = len(known) if known and config.student_steps is None and config.times is None else config.count
    if config.times is not None:
        own = config.times
    elif known and len(known) == count:
        own = list(known)
    elif schedule.grid:
        own = parse("even", schedule, count)
    else:
        own = schedule.point(torch.arange(count), count).tolist()
        own = [round(time) for time in own] if schedule.bins is not None else own
    if own[-1] <= schedule.floor or any(a <= b for a, b in zip(own, own[1:], strict=False)):
        raise UsageError(f"student_steps {count}: {config.teacher} has not so many times", "a few steps, or times=A,B,...")
    whole = schedule.bins is not None
    for time in own:
        if not schedule.floor < time <= schedule.t_max or (whole and time % 1):
            has = f"{'whole times' if whole else 'times'} above {schedule.floor:g}, up to {schedule.t_max:g}"
            raise UsageError(f"times {time:g}: {config.teacher} has {has}", "leave times out for even ones")
        if known and not any(abs(time - other) <= 1e-6 * schedule.t_max for other in known):
            shown = ", ".join(f"{other:g}" for other in known)
            raise UsageError(f"times {time:g}: student {config.student} was trained at {shown}", "those, or leave student out")
    return torch.tensor(own, dtype=torch.float64)


def student_of(config: DMD2Config, job: Job) -> Model | None:
    """The student to begin with, None without one. An error names the key, which a recipe may have given."""
    try:
        return job.teacher(config.student, config.device) if config.student else None
    except DistillError as error:
        raise type(error)(f"student: {error.message}", error.hint) from error


def take_over(config: DMD2Config, student: Model, teacher_hash: str, own: NetworkDenoiser) -> None:
    """Give the new student the weights of a trained one. Raises UsageError for a student of another teacher, network or LoRA."""
    what, theirs, ours = f"student {config.student}", student.backbone, own.network
    if student.lineage.teacher_hash != teacher_hash and teacher_hash:
        raise UsageError(f"{what}: not a student of {config.teacher}", "give the teacher that it was distilled from")
    if isinstance(ours, Adapter):
        if not isinstance(theirs, Adapter) or (theirs.rank, set(theirs.targets)) != (ours.rank, set(ours.targets)):
            kind = f"a LoRA of rank {theirs.rank}" if isinstance(theirs, Adapter) else "no LoRA"
            raise UsageError(f"{what}: {kind}, lora={config.lora} begins with one of its rank and its layers", "leave lora or student out")
        scale = ours.alpha / ours.rank
        state = {name: value / scale if f".{PAIR[1]}." in name else value for name, value in theirs.tensors().items()}
        ours.adapter.load_state_dict(state)
        return
    state, wanted = student.whole().backbone.state_dict(), ours.state_dict()
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in wanted.items()}:
        raise UsageError(f"{what}: another network than {config.teacher}'s", "it may be told its guidance scale; begin with another")
    ours.load_state_dict(state)

"""The settings by which ComfyUI samples a student at the student's own times.

ComfyUI's scheduler "simple" of N steps takes the entries 0, len / N, 2 len / N ... (rounded down) of its table of noise levels, from the
noisiest on (comfy/samplers.py). That table has all times of Stable Diffusion; with the node ModelSamplingDiscrete set to lcm every 20th of
them (comfy_extras/nodes_model_advanced.py); for flow matching the shifted 1/1000, 2/1000 ... 1 (comfy/model_sampling.py). In flow matching
"normal" takes the times of diffusers' FlowMatchEulerDiscreteScheduler. Elsewhere the other schedulers take times that are not whole, or
end at 0. Any other times are a list of noise levels, for the node ManualSigmas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill_cli.diffusion.schedule import FlowSchedule, NoiseSchedule, TableSchedule
from distill_cli.models.model import Model
from distill_cli.models.schedulers import STABLE_DIFFUSION

SAMPLERS = {"few-step": "lcm", "ddim": "euler", "euler": "euler"}
"""Our solvers -> ComfyUI's samplers. Its Euler steps are over sigma / alpha, and so DDIM's."""
KINDS = {"eps": "eps", "v": "v_prediction"}
"""What a network predicts, as the node ModelSamplingDiscrete calls it."""
SHIFTS = (1.0, 3.0, 6.0)
"""Shifts of flow matching that are tried: a student's folder has its times, and not the shift that they came from; 3 is SD 3's."""
LAST = 4.8973451890853435e-08
"""alpha^2 at the last time of a table that ends without signal: ComfyUI's, which has to divide by it."""


def simple(entries: Tensor, steps: int) -> Tensor:
    """(steps,) times that the scheduler "simple" takes of a rising table."""
    return entries[[-1 - int(k * (len(entries) / steps)) for k in range(steps)]]


def settings(model: Model) -> str:
    """The settings for a student, or why there are none; '' for a teacher, which any sampler and scheduler sample."""
    sampler, schedule = model.sampler, model.denoiser.schedule
    if not sampler.times:
        return ""
    if sampler.guidance == "told":
        return "no: it tells the network no guidance scale"
    times = sampler.times_for(schedule, sampler.solver, sampler.steps)
    known = choices(model, len(times)) if model.text is not None and model.codec.parts() and sampler.solver in SAMPLERS else []
    if not known:
        return "no: it reads no such network, or not at such noise levels"
    if times[0] != schedule.t_max:
        return "no: it starts below the largest noise level, where ComfyUI makes its noise smaller"
    found = next((choice for choice in known if torch.allclose(choice.times, times, rtol=0, atol=1e-6)), None)
    steps = f"{len(times)} step{'s' * (len(times) > 1)}"
    levels = ", ".join(f"{level:.7g}" for level in [*levels_of(schedule, times).tolist(), 0])
    grid = f"scheduler {found.scheduler}, {steps}, denoise 1" if found else f"ManualSigmas {levels} (no scheduler has these times)"
    node = (found or known[0]).node
    through = f"; the model through {node}" if node else ""
    return f"{'KSampler' if found else 'SamplerCustom'}: sampler {SAMPLERS[sampler.solver]}, {grid}, CFG 1{through}"


class Choice(NamedTuple):
    """A scheduler of ComfyUI, and the (steps,) times that it takes."""

    node: str
    """The node through which the model goes, with its settings; '' for none."""
    scheduler: str
    times: Tensor


def choices(model: Model, steps: int) -> list[Choice]:
    """ComfyUI's schedulers for a model. The first one's node is needed in any case; [] if ComfyUI has no such noise levels."""
    schedule, kind = model.denoiser.schedule, KINDS.get(model.denoiser.parameterisation)
    if isinstance(schedule, FlowSchedule):
        node = model.backbone.comfyui
        if not node:
            return [] if node is None else [Choice("", "", torch.full((steps,), torch.nan, dtype=torch.float64))]
        return [choice for shift in SHIFTS for choice in shifted(node, FlowSchedule(shift, schedule.points), steps)]
    if not isinstance(schedule, TableSchedule) or kind is None:
        return []
    every = torch.arange(1000).double()
    for rescaled in (False, True):
        table = TableSchedule.from_config({**STABLE_DIFFUSION, "rescale_betas_zero_snr": rescaled}).alphas_cumprod
        if len(table) == len(schedule.alphas_cumprod) and torch.allclose(table, schedule.alphas_cumprod, rtol=1e-4):
            if kind != "eps":
                return [Choice(f"ModelSamplingDiscrete ({kind}{', zsnr' * rescaled})", "simple", simple(every, steps))]
            lcm = simple(every[19::20], steps)
            return [Choice("", "simple", simple(every, steps)), Choice("ModelSamplingDiscrete (lcm)", "simple", lcm)]
    return []


def shifted(name: str, schedule: FlowSchedule, steps: int) -> list[Choice]:
    """ComfyUI's schedulers for flow matching at a shift, by the node of this name."""
    node, entries = f"{name} (shift {schedule.shift:g})", schedule.shifted(torch.arange(1, 1001).double() / 1000)
    return [Choice(node, "simple", simple(entries, steps)), Choice(node, "normal", schedule.times(steps))]


def levels_of(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """What ComfyUI calls sigma at these times: the time itself in flow matching, else sigma / alpha."""
    if isinstance(schedule, FlowSchedule):
        return times
    squared = (schedule.alpha(times) ** 2).clamp(min=LAST)
    return ((1 - squared) / squared).sqrt()

"""The README.md of a model's folder."""

from __future__ import annotations

from dataclasses import dataclass

from distill_cli.models.model import Model


@dataclass(frozen=True)
class InDiffusers:
    """How plain diffusers samples a folder."""

    snippet: str = ""
    """Python that makes a picture from FOLDER; '' if no pipeline can."""
    differs: str = ""
    """Why the picture differs from `distill sample`'s for the same noise; '' if it does not."""

    @property
    def said(self) -> str:
        """The comparison in one line."""
        return f"not as distill samples it: {self.differs}" if self.differs else "as distill samples it"


def card(model: Model, there: InDiffusers) -> str:
    """The README.md of a model's folder: what it is, how it is sampled here and in diffusers, the recipe that made it."""
    lineage, sampler, conditioner, schedule = model.lineage, model.sampler, model.conditioner, model.denoiser.schedule
    times = ", ".join(f"{time:.4g}" for time in sampler.times)
    rows = {
        "kind": f"{lineage.kind}{f', by {lineage.method}' if lineage.method else ''}",
        "teacher": f"{lineage.teacher} (weights {lineage.teacher_hash[:12]})" if lineage.teacher else "",
        "licence": lineage.licence,
        "data": lineage.data,
        "images": f"{model.codec.kind.size(model.picture)}, of {conditioner.summary}",
        "sampling": f"{sampler.solver}, {sampler.steps} step{'s' * (sampler.steps > 1)}, guidance scale {sampler.dial}",
        "times": f"{'sigma' if schedule.grid else 't'} {times}" if times else "",
        "grid": f"{schedule.grid} points, on which --times counts" if times and schedule.grid else "",
        "in diffusers": there.said,
    }
    if conditioner.learned is not None:
        rows["learned"] = f"the classes {', '.join(map(str, conditioner.learned))} alone"
    table = "\n".join(f"| {key} | {value.replace('|', '&#124;')} |" for key, value in rows.items() if value)
    how = f"Sample with `distill sample --model FOLDER{' --prompts FILE' * (conditioner.takes == 'prompts')}`"
    how += f", or in diffusers:\n\n```python\n{there.snippet}```" if there.snippet else "."
    shown = model.recipe.replace("```", "'''")  # foreign text cannot end the block
    recipe = f"\n\nThe recipe that made it:\n\n```yaml\n{shown}```" if model.recipe else ""
    return f"# {lineage.name}\n\n| | |\n|---|---|\n{table}\n\nMade by distill. {how}{recipe}\n"

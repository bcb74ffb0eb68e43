"""What a denoiser is told beside x_t and t: named tensors, under the names that diffusers' networks give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from distill_cli.diffusion.transfer import sent


@dataclass(frozen=True, eq=False)
class Condition:
    """Named parts, each (B, ...): class_labels, encoder_hidden_states, pooled_projections, timestep_cond, ...

    Without parts it is no condition. All parts have the same B; `null` conditions have B = 1.
    """

    parts: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))

    def __bool__(self) -> bool:
        return bool(self.parts)

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """The condition with every part changed."""
        return Condition({name: change(part) for name, part in self.parts.items()})

    def __getitem__(self, rows: Any) -> Condition:
        """The condition of some of the samples: a slice, or positions."""
        return self.map(lambda part: part[rows])

    @property
    def seen(self) -> Condition:
        """The condition as networks take it: without what only guides read."""
        if not any(name.startswith(GUIDE) for name in self.parts):
            return self
        return Condition({name: part for name, part in self.parts.items() if not name.startswith(GUIDE)})

    def plus(self, name: str, part: Tensor) -> Condition:
        """The condition with one more part (B, ...)."""
        return Condition({**self.parts, name: part})

    def parted(self, name: str) -> tuple[Tensor, Condition]:
        """One part, and the condition without it."""
        return self.parts[name], Condition({key: part for key, part in self.parts.items() if key != name})

    def to(self, device: str | torch.device) -> Condition:
        return self.map(lambda part: sent(part, device))

    def like(self, other: Condition) -> Condition:
        """This condition of one sample for all samples of `other`, on its device and in its dtypes. Raises ValueError for other parts.

        What only guides read becomes zeros, by which a guide does nothing.
        """
        if set(self.parts) != set(other.seen.parts):
            raise ValueError(f"a condition of {', '.join(self.parts) or 'nothing'} in the place of {', '.join(other.parts) or 'nothing'}")
        own = {name: sent(self.parts[name], part.device, part.dtype).expand_as(part) for name, part in other.seen.parts.items()}
        return Condition({name: own[name] if name in own else torch.zeros_like(part) for name, part in other.parts.items()})

    def where(self, mask: Tensor, null: Condition) -> Condition:
        """`null`, of one sample, for the samples at which `mask` (B,) is true."""
        other = null.like(self)

        def chosen(name: str, part: Tensor) -> Tensor:
            return torch.where(sent(mask, part.device).reshape(-1, *[1] * (part.ndim - 1)), other.parts[name], part)

        return Condition({name: chosen(name, part) for name, part in self.parts.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Conditions of the same parts, one after another."""
        first = conditions[0]
        if any(set(other.parts) != set(first.parts) for other in conditions):
            raise ValueError("conditions of different parts")
        return Condition({name: torch.cat([condition.parts[name] for condition in conditions]) for name in first.parts})


GUIDANCE_SCALE = "guidance_scale"
"""The part (B,) that tells a network the guidance scale s, of uncond + s (cond - uncond)."""
GUIDE = "guide "
"""The names of parts (B, ...) that a guide alone reads begin with this; networks do not see them. Zeros are no guidance."""
NOTHING = Condition()
"""No condition."""


def dropped(condition: Condition, null: Condition | None, uniform: Tensor, share: float) -> Condition:
    """The condition with `null` in the place of the samples whose `uniform` (B,) is below `share`; as it is where no null is known.

    So the null condition is learned, which guidance needs (Ho & Salimans 2207.12598).
    """
    return condition if null is None else condition.where(uniform < share, null)

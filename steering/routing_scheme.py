"""How a mixture of experts selects them, and which edits of that make sense."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

PRE, ZERO, RENORM, FORCE = 1, 2, 4, 8  # bits of a code
OFF = {"pre": PRE, "zero": ZERO, "zero_renorm": ZERO | RENORM}
MODES = (*OFF, "force")


class RoutingError(ValueError):
    """Experts that a layer does not have, or so many off or on that it could not route."""


@dataclass(frozen=True)
class Routing:
    """What one layer's router does."""

    mode: Literal["pre", "zero", "zero_renorm", "force"]
    off: tuple[int, ...]
    on: tuple[int, ...]


@dataclass(frozen=True)
class Scheme:
    """How a layer's router selects: all that is needed to select again."""

    num_experts: int
    top_k: int
    scoring: str  # "softmax", "sigmoid", "sqrtsoftplus"; "" where the model brings a function of its own
    renormalize: bool
    num_groups: int  # 1: not grouped
    top_groups: int
    bias: Tensor | None  # (num_experts,) added to the scores that select, never to weights

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.scoring else ("zero", "zero_renorm")

    def check(self, edit: Routing) -> None:
        """Raises: RoutingError."""
        if edit.mode not in self.modes and (edit.off or edit.on):
            raise RoutingError(f"mode {edit.mode!r} is not available here; available: {', '.join(self.modes)}")
        if edit.on and not self.scoring:
            raise RoutingError("this model's routing function gives no scores by which experts could be forced")
        if edit.off and edit.mode == "force":
            raise RoutingError("mode 'force' switches experts on; name one of pre, zero, zero_renorm to switch off")
        if bad := [expert for expert in (*edit.off, *edit.on) if not 0 <= expert < self.num_experts]:
            raise RoutingError(f"there is no expert {bad[0]}; this layer has {self.num_experts}")
        if both := set(edit.off) & set(edit.on):
            raise RoutingError(f"expert {min(both)} is both off and on")
        self.check_sum(edit.off if edit.mode == "pre" else (), len(set(edit.on)))

    def check_sum(self, not_selectable: Collection[int], num_forced: int) -> None:
        """Of all the edits of a layer together. Raises: RoutingError."""
        if num_forced > self.top_k:
            raise RoutingError(f"{num_forced} experts are on, and a token is given {self.top_k}")
        size = self.num_experts // self.num_groups
        left = sorted(size - sum(e // size == group for e in set(not_selectable)) for group in range(self.num_groups))
        if sum(left[: self.top_groups]) < self.top_k:
            raise RoutingError(f"fewer than {self.top_k} experts would be left to select from")

"""Edits inside attention: what heads look at, and learned keys and values beside the prompt's or before it.

As methods of the kind `edits` compile to ops, these come to a few sorts of attention edits, which the workers'
attention layers obey. z_h is head h's output before the output projection; positions are absolute.

RowOverride    z_h <- sum_j w_j v_j                       a head's attention row is given
ScoreBias      score_h[., j] += b_j                       before the softmax
SideTokens     z_h += g_h softmax(s q_h (W_k E)^T) W_v E  gated attention to learned tokens
PrefixRows     k_p, v_p <- learned keys and values        at the request's first positions, which hold no text
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from whipstaff.steering.edits import settings_of
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fed import Fed
from whipstaff.steering.inserts import Inserted, InsertParams
from whipstaff.steering.kinds.kind import OF_ACTIVATIONS, Entry, EntryKind, UncheckedEntry, describe_module_edit
from whipstaff.steering.method import HookPoint, Method, P, Tensors
from whipstaff.steering.needs import Needs
from whipstaff.steering.plan import ModuleEdit, SteeringPlan
from whipstaff.steering.planner import Planner
from whipstaff.steering.served import AttentionAbilities, Served
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Interval


@dataclass(frozen=True)
class RowOverride:
    """Head `head` of layer `layer` gives sum_j weights[j] * v[keys[j]]; keys are positions up to the token's own."""

    layer: int
    head: int
    keys: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)


@dataclass(frozen=True)
class ScoreBias:
    """Every (start, end, amount) adds to the scores of keys at positions [start, end)."""

    layer: int
    heads: tuple[int, ...]
    spans: tuple[tuple[int, int, float], ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)


@dataclass(frozen=True, eq=False)
class SideTokens:
    """Per layer (N, hidden) learned tokens, and gates: one, or one per head."""

    tokens: Mapping[int, Tensor]
    gates: Mapping[int, Tensor]
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class PrefixRows:
    """Per layer (P, kv_heads, D) keys, as they stand in the cache, and values, of the whole model."""

    rows: Mapping[int, tuple[Tensor, Tensor]]


AttentionEdit = RowOverride | ScoreBias | SideTokens | PrefixRows


class AttentionKind(EntryKind):
    name = "attention"
    meaningless = OF_ACTIVATIONS
    _off = "start the server with --steering-sites attention"

    def needs(self, vector: Vector) -> Needs:
        return Needs(attention=True)

    def why_not(self, served: Served) -> str | None:
        return None if served.attention is not None else self._off

    def lacking(self, vector: Vector, layers: Sequence[int] | None, served: Served) -> str | None:
        return None if served.attention is not None else f"edits inside attention are off; {self._off}"

    def admit(self, unchecked: UncheckedEntry, planner: Planner, others: Sequence[Entry], served: Served) -> Entry:
        vector = unchecked.vector
        planned = planner.add_module_edit(unchecked.params, unchecked.own, vector)
        assert served.attention is not None
        self._check(vector, planned.edit, served.attention)
        num = self._method(vector).num_placeholders(vector.tensors)
        inserted = _placeholders(num, unchecked, others, served) if num else None
        return Entry(unchecked.params, vector, module_edit=len(planner.module_edits) - 1, inserted=inserted)

    def _check(self, vector: Vector, edit: ModuleEdit, abilities: AttentionAbilities) -> None:
        """The layers that are asked for must obey. Raises: SteeringError."""
        method = self._method(vector)
        able = {"layers": abilities.layers, "bias": abilities.bias, "side": abilities.side}[method.ability]
        for layer, path in method.asked_layers(settings_of(vector, edit), vector.tensors).items():
            if layer not in able:
                reason = abilities.lacking.get(layer, f"layers that can be edited so: {[*able]}")
                raise SteeringError(f"the attention of layer {layer} cannot be edited so: {reason}", path)

    def check_prompt(self, entry: Entry, plan: SteeringPlan, prompt_len: int, served: Served) -> None:
        assert entry.module_edit is not None
        planned, method = plan.module_edits[entry.module_edit], self._method(entry.vector)
        if served.attention is not None:
            params, intervals = settings_of(entry.vector, planned.edit), planned.where.intervals(prompt_len)
            method.check_prompt(params, intervals, prompt_len, served.attention)

    def redirected(self, entry: Entry, plan: SteeringPlan) -> Mapping[int, str]:
        assert entry.module_edit is not None
        vector, method = entry.vector, self._method(entry.vector)
        settings = settings_of(vector, plan.module_edits[entry.module_edit].edit)
        return method.asked_layers(settings, vector.tensors) if method.redirects else {}

    def describe(self, entry: Entry, plan: SteeringPlan, fed: Sequence[Fed], served: Served) -> dict[str, Any]:
        return describe_module_edit(entry, plan, fed)

    def edits(self, vector: Vector, edit: ModuleEdit, prompt_len: int) -> Iterator[AttentionEdit]:
        """What an edit comes to for prompts of one length."""
        return self._method(vector).attention_edits(settings_of(vector, edit), vector.tensors, prompt_len)

    def is_relative(self, vector: Vector) -> bool:
        """Whether that depends on the prompt's length."""
        return self._method(vector).is_relative

    @staticmethod
    def _method(vector: Vector) -> "AttentionMethod[Any]":
        assert isinstance(vector.method, AttentionMethod)
        return vector.method


ATTENTION = AttentionKind()


class AttentionMethod(Method[P]):
    """A method that changes attention."""

    kind = ATTENTION
    ability: ClassVar[Literal["layers", "bias", "side"]] = "layers"
    """What its layers must obey; see `AttentionAbilities`."""
    redirects: ClassVar[bool] = False  # whether heads look elsewhere than the model's own scores say
    is_relative: ClassVar[bool] = False  # whether what it comes to depends on the prompt's length

    @abstractmethod
    def attention_edits(
        self, params: P, tensors: Mapping[HookPoint, Tensors], prompt_len: int
    ) -> Iterator[AttentionEdit]:
        """What it comes to for prompts of one length."""

    def asked_layers(self, params: P, tensors: Mapping[HookPoint, Tensors]) -> Mapping[int, str]:
        """The layers that it changes, each with the field that names it."""
        return {point.layer: "vector" for point in tensors}

    def num_placeholders(self, tensors: Mapping[HookPoint, Tensors]) -> int:
        """How many tokens without text the prompt must begin with."""
        return 0

    def check_prompt(
        self, params: P, intervals: Sequence[Interval], prompt_len: int, abilities: AttentionAbilities
    ) -> None:
        """Checks against the tokens [start, end) that are edited. Raises: SteeringError naming the field."""
        return None


def _placeholders(num: int, unchecked: UncheckedEntry, others: Sequence[Entry], served: Served) -> Inserted:
    """Room in front of the prompt. Raises: SteeringError."""
    if unchecked.params.where is not None:
        raise SteeringError("a prefix stands before the prompt, and all that follows sees it", "where")
    if any(entry.module_edit is not None and entry.inserted is not None for entry in others):
        raise SteeringError("a request has one prefix at most", "vector")
    if not served.takes_soft_prompts:
        raise SteeringError("this model's prompts cannot be given placeholders", "vector")
    return Inserted(InsertParams(), num)

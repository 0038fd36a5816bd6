"""Edits under conditions and schedules, greedy, in plain transformers: no cache, states kept by a loop.

Nothing of ours is imported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Probe:
    name: str
    layer: int
    direction: Tensor  # (width,)
    bias: float = 0.0
    is_cosine: bool = False

    def read(self, rows: Tensor) -> list[float]:
        """Of rows (T, width) float64."""
        direction = self.direction.double()
        found = rows @ direction
        if self.is_cosine:
            found = found / (rows.norm(dim=1) * direction.norm())
        readings: list[float] = (found + self.bias).tolist()
        return readings


@dataclass(frozen=True)
class When:
    probe: Probe
    threshold: float
    is_above: bool = True
    release: float | None = None
    is_once: bool = True
    is_read_late: bool = False  # from the last prompt token on


@dataclass(frozen=True)
class Entry:
    """x <- x + gain_of_token * (edit(x) - x) after every layer of `adds`; edit(x) = x + scale * (gain * x + add)."""

    adds: Mapping[int, Tensor]
    scale: float
    touches: Callable[[int, int], bool]  # (position, prompt length) -> bool
    gains: Mapping[int, Tensor] = field(default_factory=dict)
    when: When | None = None
    schedule: Mapping[str, Any] | None = None
    normalize: bool = False
    renorm: bool = False


@dataclass
class Trace:
    """What happened to one sequence."""

    tokens: list[int]
    readings: dict[str, list[float]]  # by probe, at every position fed
    entropies: dict[int, float]  # nats, by the position of the token that was drawn
    opened: list[set[int]]  # for every entry, the positions at which its condition held
    margin: float  # how close the closest decision was, that of a condition or of the largest logit


def greedy(
    model: Any, prompt: list[int], num_tokens: int, entries: Sequence[Entry], others: Mapping[nn.Module, float]
) -> Trace:
    """`num_tokens` greedy tokens; `others` are models whose logits are added with a weight."""
    trace = Trace([], {}, {}, [], math.inf)
    for _ in range(num_tokens):
        ids = prompt + trace.tokens
        trace.opened = [set() for _ in entries]
        row = _forward(model, ids, len(prompt), entries, trace)
        for other, weight in others.items():
            with torch.no_grad():
                row = row + weight * other(torch.tensor([ids]), use_cache=False).logits[0, -1].double()[: len(row)]
        best = row.topk(2).values
        trace.margin = min(trace.margin, float(best[0] - best[1]))
        probabilities = row.softmax(-1)
        trace.entropies[len(ids)] = float(-(probabilities * row.log_softmax(-1)).sum())
        trace.tokens.append(int(row.argmax()))
    return trace


def _forward(model: Any, ids: list[int], prompt_len: int, entries: Sequence[Entry], trace: Trace) -> Tensor:
    """(V,) float64 logits after the last token."""
    hooks = []
    for layer, block in enumerate(model.model.layers):

        def hook(module: nn.Module, args: Any, output: Any, layer: int = layer) -> Any:
            rows = (output if isinstance(output, Tensor) else output[0])[0].double()
            for probe in {entry.when.probe for entry in entries if entry.when}:
                if probe.layer == layer:
                    trace.readings[probe.name] = probe.read(rows)
            for number, entry in enumerate(entries):
                if layer in entry.adds:
                    rows = _edited(rows, layer, entry, prompt_len, trace, trace.opened[number])
            changed = rows[None].to(torch.float32)
            return changed if isinstance(output, Tensor) else (changed, *output[1:])

        hooks.append(block.register_forward_hook(hook))
    try:
        with torch.no_grad():
            found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            return found
    finally:
        for each in hooks:
            each.remove()


def _edited(rows: Tensor, layer: int, entry: Entry, prompt_len: int, trace: Trace, opened: set[int]) -> Tensor:
    add = entry.adds[layer].double()
    if entry.normalize:
        add = add / add.norm()
    states = _states(entry.when, prompt_len, len(rows), trace)
    rows = rows.clone()
    for position, state in enumerate(states):
        if not (state and entry.touches(position, prompt_len)):
            continue
        opened.add(position)
        before = rows[position].clone()
        stretch = entry.gains[layer].double() * before if layer in entry.gains else 0.0
        share = _gain(entry.schedule, position, prompt_len, trace.entropies)
        rows[position] = before + share * entry.scale * (stretch + add)
        if entry.renorm:
            rows[position] *= before.norm() / rows[position].norm()
    return rows


def _states(when: When | None, prompt_len: int, num: int, trace: Trace) -> list[bool]:
    """Whether the condition holds at each position."""
    if when is None:
        return [True] * num
    readings = trace.readings[when.probe.name]
    if when.is_once:
        reading = readings[prompt_len - 1]
        trace.margin = min(trace.margin, abs(reading - when.threshold))
        holds = reading > when.threshold if when.is_above else reading < when.threshold
        return [holds and position >= prompt_len - 1 for position in range(num)]
    states, holds = [], False
    release = when.threshold if when.release is None else when.release
    for position, reading in enumerate(readings[:num]):
        if when.is_read_late and position < prompt_len - 1:
            states.append(False)
            continue
        trace.margin = min(trace.margin, abs(reading - when.threshold), abs(reading - release))
        if holds:
            holds = reading > release if when.is_above else reading < release
        if not holds:
            holds = reading > when.threshold if when.is_above else reading < when.threshold
        states.append(holds)
    return states


def _gain(schedule: Mapping[str, Any] | None, position: int, prompt_len: int, entropies: Mapping[int, float]) -> float:
    """How much of the edit a position gets."""
    if schedule is None:
        return 1.0
    start, to, n = schedule.get("from", 1.0), schedule.get("to", 0.0), max(position - prompt_len, 0)
    match schedule["shape"]:
        case "constant":
            return float(start)
        case "linear":
            return float(start + (to - start) * min(n / schedule["tokens"], 1))
        case "cosine":
            return float(to + (start - to) * (1 + math.cos(math.pi * min(n / schedule["tokens"], 1))) / 2)
        case "exponential":
            return float(to + (start - to) * 0.5 ** (n / schedule["half_life"]))
        case "entropy":
            if position not in entropies:
                return float(start)
            share = (entropies[position] - schedule["low"]) / (schedule["high"] - schedule["low"])
            return float(start + (to - start) * min(max(share, 0.0), 1.0))
    raise ValueError(schedule["shape"])

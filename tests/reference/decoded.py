"""A request's decoding, one row after the other, by the plain computations of its methods. Nothing of ours is imported.

An entry is a request's; what it leaves out is what `DEFAULTS` says, as decoding/README.md does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reference import (
    adapter_free_ensemble,
    adaptive_temperature,
    co_llm,
    contrastive,
    contrastive_beta,
    dexperts,
    draw,
    dry,
    dynatemp,
    edt,
    epsilon_cutoff,
    eta_cutoff,
    kwd,
    mirostat,
    rule_adapter,
    seeded,
    top_a,
    top_n_sigma,
    typical_p,
    xtc,
)
from reference.plain import tempered

Row = Sequence[float]
DEFAULTS: dict[str, dict[str, Any]] = {
    "proxy_tuning": {"alpha": 1.0},
    "dexperts": {"expert": None, "antiexpert": None, "alpha": 2.0, "top_p": 0.9},
    "contrastive": {"alpha": 0.1, "beta": 1.0, "amateur_temperature": 1.0},
    "contrastive_beta": {"alpha": 0.1, "beta": 0.5},
    "adapter_free_ensemble": {"base_weight": 0.5},
    "co_llm": {"threshold": 0.5, "strategy": "defer", "warmup": "none", "warmup_tokens": 15},
    "kwd": {"k": 50},
    "rule_adapter": {},
    "dry": {"multiplier": 0.8, "base": 1.75, "allowed_length": 2, "penalty_last_n": -1},
    "adaptive_temperature": {"level": "token", "choose": "argmax"},
    "edt": {"t0": 0.6, "theta": 1.0, "n": 0.8},
    "dynatemp": {"range": 0.5, "exponent": 1.0},
    "top_n_sigma": {"n": 1.0},
    "typical_p": {"p": 0.95},
    "top_a": {"a": 0.2},
    "epsilon_cutoff": {"epsilon": 0.0003},
    "eta_cutoff": {"epsilon": 0.0003},
    "xtc": {"probability": 0.5, "threshold": 0.1},
    "mirostat": {"tau": 5.0, "eta": 0.1},
}
"""In the order in which methods run."""


@dataclass
class Seen:
    """What the models say after some tokens."""

    base: Row
    others: Mapping[str, Row]
    hidden: Row


@dataclass
class Decoding:
    """One request: its methods, and what they keep from token to token."""

    entries: Sequence[Mapping[str, Any]]
    num_prompt: int
    heads: Mapping[str, Mapping[str, Any]]  # kind -> part -> nested lists
    seed: int = 0
    temperature: float | None = None  # the request's own; None: nothing is drawn
    top_k: int = 0
    style: Mapping[int, float] = field(default_factory=dict)  # the rule adapter's, by token
    ends: Sequence[int] = ()
    user: int = 0  # where the last user message begins
    breakers: frozenset[int] = frozenset()
    mu: float | None = None  # mirostat's
    kept: float | None = None  # a sequence's temperature
    idle: str = ""  # a method that does nothing in its place

    def row(self, ids: Sequence[int], seen: Seen) -> list[float]:
        """What the token after `ids` is drawn from."""
        row, done = list(seen.base), False
        entries = [DEFAULTS[entry["method"]] | dict(entry) for entry in self.entries]
        for name in DEFAULTS:
            if name == "top_n_sigma" and self.temperature is not None:
                row = draw.truncate(row if done else tempered(row, self.temperature), self.top_k, 1.0, 0.0)
            for entry in entries:
                if entry["method"] == name:
                    change: Callable[[Row, Any, Sequence[int], Seen], list[float]] = getattr(self, f"_{name}")
                    row = row if name == self.idle else change(row, entry, ids, seen)
                    done = done or name in ("adaptive_temperature", "edt", "dynatemp")
        return row

    def note(self, row: Row, token: int) -> None:
        """Learn what was drawn."""
        for entry in self.entries:
            if entry["method"] == "mirostat" and self.mu is not None:
                own = DEFAULTS["mirostat"] | dict(entry)
                self.mu = mirostat.learnt(row, token, self.mu, own["tau"], own["eta"])

    def _number(self, ids: Sequence[int], method: str) -> float:
        return seeded.number(self.seed, len(ids) - 1, method)

    def _proxy_tuning(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        pairs = zip(seen.others[own["expert"]], seen.others[own["antiexpert"]], strict=True)
        return [x + own["alpha"] * (e - a) for x, (e, a) in zip(row, pairs, strict=True)]

    def _dexperts(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        expert, antiexpert = (seen.others[own[name]] if own[name] else None for name in ("expert", "antiexpert"))
        return dexperts.rewrite(row, expert, antiexpert, own["alpha"], own["top_p"])

    def _contrastive(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        numbers = own["alpha"], own["beta"], own["amateur_temperature"]
        return contrastive.rewrite(row, seen.others[own["amateur"]], *numbers)

    def _contrastive_beta(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        return contrastive_beta.rewrite(row, seen.others[own["amateur"]], own["alpha"], own["beta"])

    def _adapter_free_ensemble(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        experts = [seen.others[name] for name in own["weights"]]
        return adapter_free_ensemble.rewrite(row, experts, [*own["weights"].values()], own["base_weight"])

    def _co_llm(self, row: Row, own: Any, ids: Sequence[int], seen: Seen) -> list[float]:
        head, done = self.heads["defer_head"], max(0, len(ids) - self.num_prompt)
        limit = co_llm.threshold(done, own["threshold"], own["warmup"], own["warmup_tokens"])
        assistant = seen.others[own["assistant"]]
        return co_llm.rewrite(row, assistant, seen.hidden, head["weight"], head["bias"], limit, own["strategy"])

    def _kwd(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        weight = self.heads["token_classifier"]["weight"]
        judged = [sum(w * h for w, h in zip(one, seen.hidden, strict=True)) for one in weight]
        return kwd.rewrite(row, judged, own["k"])

    def _rule_adapter(self, row: Row, own: Any, ids: Sequence[int], seen: Seen) -> list[float]:
        done = max(0, len(ids) - self.num_prompt)
        added = rule_adapter.biases(ids[self.user :], done, self.style, self.ends, holds=True)
        return [x + added.get(v, 0.0) for v, x in enumerate(row)]

    def _dry(self, row: Row, own: Any, ids: Sequence[int], seen: Seen) -> list[float]:
        found = dry.repeats(ids, own["allowed_length"], own["penalty_last_n"], set(self.breakers), ())
        numbers = own["multiplier"], own["base"], own["allowed_length"]
        return [x - dry.penalty(found[v], *numbers) if v in found else x for v, x in enumerate(row)]

    def _adaptive_temperature(self, row: Row, own: Any, ids: Sequence[int], seen: Seen) -> list[float]:
        head = self.heads["temperature_head"]
        number = self._number(ids, "adaptive_temperature") if own["choose"] == "sample" else None
        found = head["temperatures"][
            adaptive_temperature.chosen(adaptive_temperature.chances(seen.hidden, head), number)
        ]
        if own["level"] == "sequence":
            found = self.kept = found if self.kept is None else self.kept
        return tempered(row, found)

    def _edt(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        return tempered(row, edt.temperature(row, own["t0"], own["theta"], own["n"]))

    def _dynatemp(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        assert self.temperature is not None
        return tempered(row, dynatemp.temperature(row, self.temperature, own["range"], own["exponent"]))

    def _top_n_sigma(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        return top_n_sigma.rewrite(row, own["n"])

    def _typical_p(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        return typical_p.rewrite(row, own["p"])

    def _top_a(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        return top_a.rewrite(row, own["a"])

    def _epsilon_cutoff(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        return epsilon_cutoff.rewrite(row, own["epsilon"])

    def _eta_cutoff(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        return eta_cutoff.rewrite(row, own["epsilon"])

    def _xtc(self, row: Row, own: Any, ids: Sequence[int], seen: Seen) -> list[float]:
        return xtc.rewrite(row, own["probability"], own["threshold"], self._number(ids, "xtc"))

    def _mirostat(self, row: Row, own: Any, ids: Any, seen: Seen) -> list[float]:
        self.mu = 2 * own["tau"] if self.mu is None else self.mu
        return mirostat.rewrite(row, self.mu)

"""A request's decoding: what its entries were compiled to, as it travels to the engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from whipstaff.decoding.mix import Mix


class Rewrite(NamedTuple):
    """One method that rewrites rows."""

    method: str
    setting: str  # JSON of the method's setting
    streams: tuple[str, ...] = ()  # auxiliary models, in the order of the method's stream fields
    heads: tuple[str, ...] = ()  # digests, in the order of the method's head fields
    early: tuple[int, ...] = ()  # early layers
    num_tried: int = 0  # tokens that are tried for each token of an answer


class SearchPlan(NamedTuple):
    """A method that searches, in the place of the draw."""

    method: str
    setting: str  # JSON of the method's setting
    num_sequences: int  # the most that live at once
    heads: tuple[str, ...] = ()  # digests, in the order of the method's head fields
    streams: tuple[str, ...] = ()  # auxiliary models, in the order of the method's stream fields
    max_time: float | None = None  # seconds since the request arrived after which it ends; None: no limit
    max_computed_tokens: int | None = None  # after the prompts, with those tried, after which it ends; None: no limit
    tells_drafts: bool = False  # whether what is not settled yet is told, too
    logprobs: int | None = None  # likeliest tokens to tell beside each of an answer; -1: all; None: none, nor its own
    hidden_of: int = 0  # the companion whose hidden states the method reads; 0: the sequences' own


class SamplerSettings(NamedTuple):
    """The request's own sampling parameters, where our stages do what vLLM's sampler would."""

    temperature: float = 1.0
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    is_temperature_last: bool = False

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Explain(NamedTuple):
    """What to say of every token."""

    top: int  # likeliest tokens of every distribution
    unsteered: int | None = None  # the companion whose logits are told, too; 0: the request's own; None: nobody's
    is_drawn: bool = False  # whether what a token is drawn from is told, after penalties and truncation


@dataclass(frozen=True)
class DecodingPlan:
    """Everything the engine does differently to a request's logits."""

    mix: Mix | None = None
    rewrites: tuple[Rewrite, ...] = ()  # in the order in which they run
    draw: SamplerSettings | None = None  # None: vLLM's sampler draws as ever
    seed: int | None = None  # of the numbers that methods draw themselves; None: the request's own, or any
    explain: Explain | None = None  # None: explain nothing
    scores_base: bool = False  # whether log-probabilities are those of the served model before anything else
    keeps_hidden: bool = False  # whether the hidden states of all positions are kept
    search: SearchPlan | None = None  # None: one sequence, whose tokens are drawn one after the other

    @property
    def models(self) -> list[str]:
        """The auxiliary models that must run, sorted."""
        named = {name for rewrite in self.rewrites for name in rewrite.streams}
        named.update(self.search.streams if self.search else ())
        return sorted(named.union(self.mix.models if self.mix else ()))

    @property
    def early_layers(self) -> tuple[int, ...]:
        """The early layers whose streams must be kept, in order."""
        return tuple(sorted({layer for rewrite in self.rewrites for layer in rewrite.early}))

    @property
    def num_tried(self) -> int:
        """Tokens that are tried for each token of a sequence, those aside that a search tries."""
        return sum(rewrite.num_tried for rewrite in self.rewrites)

    def to_wire(self) -> dict[str, Any]:
        return {
            "mix": self.mix.to_wire() if self.mix else None,
            "rewrites": [list(rewrite) for rewrite in self.rewrites],
            "draw": list(self.draw) if self.draw else None,
            "seed": self.seed,
            "explain": list(self.explain) if self.explain else None,
            "scores_base": self.scores_base,
            "keeps_hidden": self.keeps_hidden,
            "search": list(self.search) if self.search else None,
        }

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> "DecodingPlan":
        return DecodingPlan(
            Mix.from_wire(wire["mix"]) if wire["mix"] else None,
            tuple(
                Rewrite(method, setting, tuple(streams), tuple(heads), tuple(early), num_tried)
                for method, setting, streams, heads, early, num_tried in wire["rewrites"]
            ),
            SamplerSettings(*wire["draw"]) if wire["draw"] else None,
            wire["seed"],
            Explain(*wire["explain"]) if wire["explain"] else None,
            wire["scores_base"],
            wire["keeps_hidden"],
            _search(*wire["search"]) if wire["search"] else None,
        )


def _search(
    method: str, setting: str, num_sequences: int, heads: list[str], streams: list[str], *more: Any
) -> SearchPlan:
    return SearchPlan(method, setting, num_sequences, tuple(heads), tuple(streams), *more)

"""Searches between the scheduler, which moves sequences, and the worker, where methods decide.

With each step that a search takes the scheduler says which seats live; with the step's output comes a verdict: what
lives on, in which seat, from whose tokens; or the answers. A verdict is known when tokens are drawn, so it travels as
plain data beside them, also where outputs are still on their way from the device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsLists

from whipstaff.decoding.search.search import Hypothesis
from whipstaff.server.engine.patch import carry

DRAFT_KEY = "draft"  # under which it is told what its answer may become
SEARCH_KEY = "search"  # under which a request is told what its search came to, beside what is explained


class SearchStep(NamedTuple):
    """A step of one search, as the scheduler tells it."""

    living: tuple[str, ...]  # seats, in the order of the last verdict
    seats: tuple[str, ...]  # all that it has; the primary's is the first
    max_tokens: int  # that an answer may have
    room: int  # the most tokens that a living sequence may have generated
    is_last: bool = False  # whether it has to end now: it may take no more


class Placed(NamedTuple):
    """A sequence that lives on."""

    seat: str
    source: str  # the seat whose tokens it continues
    keep: int  # how many of those that were generated there it keeps
    tokens: tuple[int, ...]  # that follow

    @property
    def stays(self) -> bool:
        """Whether it may be that nothing moves: it depends on whether all tokens are kept."""
        return self.seat == self.source and len(self.tokens) == 1


class TokenLogProbs(NamedTuple):
    """Of a token of an answer, as vLLM has them: its own, and those of the likeliest tokens where it stands."""

    tokens: tuple[int, ...]  # its own first
    log_probs: tuple[float, ...]  # of these
    rank: int  # its own; 1 is the likeliest


class Verdict(NamedTuple):
    """What one step of a search came to."""

    living: tuple[Placed, ...]  # none once it is over
    settled: int = 0  # leading tokens of the first that every answer will have
    hypotheses: tuple[Hypothesis, ...] = ()  # once it is over, best first
    counts: Mapping[str, int] = {}  # of the whole search, so far
    facts: Mapping[str, Any] = {}  # of this step, where the request wants things explained
    log_probs: tuple[tuple[TokenLogProbs, ...], ...] = ()
    """Where wanted: of tokens that are newly settled; or of those of all answers that were not told yet."""


def seat_id(primary: str, index: int) -> str:
    """The id of a further seat; 1 is the first."""
    return f"{primary}/seat{index}"


def companion_id(lead: str, index: int) -> str:
    """The id of a companion of a request or of a seat; 1 is the first."""
    return f"{lead}/{index}"


def stop_token(tokens: Sequence[int], params: SamplingParams) -> int | None:
    """The token that ended an answer, where the request names it and it is not the model's own: a `stop_reason`."""
    last = tokens[-1] if tokens else None
    return last if last != params.eos_token_id and last in (params.stop_token_ids or ()) else None


def as_lists(told: Sequence[Sequence[Any]]) -> LogprobsLists:
    """Tokens' log-probabilities in vLLM's form."""
    tokens, log_probs, ranks = zip(*told, strict=True)
    return LogprobsLists(np.array(tokens, np.int32), np.array(log_probs, np.float32), np.array(ranks, np.int32))


def attach_verdicts(output: Any, verdicts: Mapping[str, Verdict]) -> Any:
    """Let a step's output carry verdicts, by primary, to the scheduler."""
    if not verdicts or output is None:
        return output
    return carry(output, "whipstaff_verdicts", lambda: verdicts)


def verdicts_of(output: Any) -> Mapping[str, Verdict]:
    """Those that a step's output carries."""
    found: Mapping[str, Verdict] = getattr(output, "whipstaff_verdicts", {})
    return found

"""DRY: a token that would carry on a repetition is penalised, the more the longer it already is.

    l(v) -= multiplier * base ** (n(v) - allowed_length)        where n(v) >= allowed_length

n(v) is the length of the longest run of tokens that ends the text, stood in it before, and was followed by v there.
Runs do not reach over a sequence breaker, and a token that holds a breaker is never penalised. As in llama.cpp, where
it is p-e-w's proposal; of breakers that span tokens, only their own tokenisation is found.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import Tensor

from whipstaff.decoding.method import Params, Rewriting, Words
from whipstaff.decoding.rows import Rows

Breaker = Annotated[str, Field(min_length=1, max_length=40)]

_LOG_MAX = 88.7228391  # of float32's largest number, as llama.cpp bounds the exponent
_MOST = 1e30  # a penalty: rows stay finite, however cold the temperature
_PRIMES, _ROOTS = (2147483647, 2147483629), (1103515245, 1664525)


class DryParams(Params):
    """How hard, from which length on, how far back."""

    method: Literal["dry"] = "dry"
    multiplier: float = Field(
        0.8, ge=0, le=1000, allow_inf_nan=False, description="penalty at allowed_length; 0 is off"
    )
    base: float = Field(1.75, ge=1, le=100, allow_inf_nan=False, description="growth with every further token")
    allowed_length: int = Field(2, ge=0, le=10_000, description="longest repetition without penalty, plus one")
    penalty_last_n: int = Field(-1, ge=-1, le=10_000_000, description="tokens looked back; -1 is all, 0 is off")
    sequence_breakers: list[Breaker] = Field(["\n", ":", '"', "*"], max_length=64, description="texts that end a run")


class DrySetting(BaseModel):
    """DRY with its breakers as tokens."""

    model_config = ConfigDict(frozen=True)

    multiplier: float
    base: float
    allowed_length: int
    penalty_last_n: int
    breakers: tuple[int, ...]
    phrases: tuple[tuple[int, ...], ...]  # breakers of several tokens

    _is_breaker: Tensor | None = PrivateAttr(None)

    def is_breaker(self, logits: Tensor) -> Tensor:
        """(V,) bool: the tokens that hold a breaker; made once."""
        if self._is_breaker is None:
            mask = torch.zeros(logits.shape[1], dtype=torch.bool)
            mask[torch.tensor(self.breakers, dtype=torch.int64)] = True
            self._is_breaker = mask.to(logits.device, non_blocking=True)
        return self._is_breaker


class Dry(Rewriting[DryParams]):
    name, paper = "dry", "llama.cpp, dry_multiplier"
    stage, params = "penalty", DryParams
    setting = DrySetting
    shorthands: ClassVar[Mapping[str, str]] = {
        "dry_multiplier": "multiplier",
        "dry_base": "base",
        "dry_allowed_length": "allowed_length",
        "dry_penalty_last_n": "penalty_last_n",
        "dry_sequence_breakers": "sequence_breakers",
    }
    needs = frozenset({"tokens"})

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> DryParams:
        return DryParams(multiplier=0.0)

    def resolve(self, params: DryParams, words: Words) -> DrySetting:
        breakers: set[int] = set()
        phrases: set[tuple[int, ...]] = set()
        for text in params.sequence_breakers:
            breakers.update(words.ids_with(text))
            if len(phrase := tuple(words.encode(text))) > 1:
                phrases.add(phrase)
        own = params.model_dump(exclude={"method", "sequence_breakers"})
        return DrySetting(**own, breakers=tuple(sorted(breakers)), phrases=tuple(sorted(phrases)))

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        logits = rows.logits
        if not len(logits):
            return logits
        is_breaker = torch.stack([setting.is_breaker(logits) for setting in settings])  # (R, V)
        text, window = _newest_first(rows, settings)
        limit = _free_run(text, is_breaker, settings)
        longest = _longest_runs(text, window, limit, logits.shape[1])
        allowed = rows.column(setting.allowed_length for setting in settings)
        penalty = rows.column(setting.base for setting in settings) ** torch.minimum(
            longest - allowed, rows.column(_max_exponent(setting.base) for setting in settings)
        )
        penalty = (rows.column(setting.multiplier for setting in settings) * penalty).clamp(max=_MOST)
        return logits.sub_(torch.where((longest >= allowed) & ~is_breaker, penalty, 0.0))


def _max_exponent(base: float) -> float:
    return float(int(_LOG_MAX / math.log(base))) if base > 1.000001 else 1e9


def _newest_first(rows: Rows, settings: Sequence[DrySetting]) -> tuple[Tensor, Tensor]:
    """(R, W) the tokens from the last one backwards, -1 beyond each row's window, and the windows' lengths (R, 1)."""
    assert rows.tokens is not None
    tokens = rows.tokens
    length = (tokens >= 0).sum(1, keepdim=True)
    reach = rows.column(setting.penalty_last_n for setting in settings).long()
    window = torch.where(reach < 0, length, torch.minimum(length, reach))
    back = torch.arange(tokens.shape[1], device=tokens.device)
    text = tokens.gather(1, (length - 1 - back).clamp(min=0))
    return text.masked_fill(back >= window, -1), window


def _free_run(text: Tensor, is_breaker: Tensor, settings: Sequence[DrySetting]) -> Tensor:
    """(R, 1) how many of the newest tokens stand after the last breaker."""
    width = text.shape[1]
    back = torch.arange(width, device=text.device)
    matched = torch.where((text >= 0) & is_breaker.gather(1, text.clamp(min=0)), 1, 0)  # (R, W) length from here on
    for phrase in sorted({phrase for setting in settings for phrase in setting.phrases}, key=len):
        asks = torch.tensor([phrase in setting.phrases for setting in settings]).to(text.device, non_blocking=True)
        ends = len(phrase) - 1  # the phrase's first token is that many before its last
        if ends < width:
            is_here = torch.stack([text[:, ends - k : width - k] == token for k, token in enumerate(phrase)]).all(0)
            matched[:, ends:].masked_fill_(is_here & asks[:, None], len(phrase))
    free = torch.where(matched > 0, back - matched + 1, width)
    first = (matched > 0).to(torch.int8).argmax(1, keepdim=True)  # the newest; 0 where there is none
    return free.gather(1, first)


def _longest_runs(text: Tensor, window: Tensor, limit: Tensor, vocab: int) -> Tensor:
    """(R, V) how long the run is that each token would carry on; -1 for tokens that carry on none."""
    num_rows, width = text.shape
    start = torch.arange(1, width, device=text.device).expand(num_rows, -1)  # where the earlier run ends
    run = torch.minimum(_common(text, window, start), limit)
    follower = torch.where(start < window, text[:, :-1], vocab)
    longest = torch.full((num_rows, vocab + 1), -1, device=text.device)
    return longest.scatter_reduce_(1, follower, run, "amax")[:, :vocab]


def _common(text: Tensor, window: Tensor, start: Tensor) -> Tensor:
    """(R, W - 1) the length of the longest common prefix of text and text[start:], within the window.

    By bisection over lengths, with polynomials modulo two primes in place of the texts: no loop over tokens.
    """
    width = text.shape[1]
    primes = torch.tensor(_PRIMES, device=text.device)[:, None, None]
    powers = _powers(width, text.device)  # (2, 1, W)
    sums = torch.nn.functional.pad(((text + 2) * powers % primes).cumsum(2), (1, 0))  # (2, R, W + 1), below 2 ** 63
    step, common = 1 << (width.bit_length() - 1), torch.zeros_like(start)
    shift = powers.expand(2, len(text), width).gather(2, start.expand(2, -1, -1))
    here = sums.gather(2, start.expand(2, -1, -1))
    while step:
        longer = common + step
        end = (start + longer).clamp(max=width)
        there = sums.gather(2, end.expand(2, -1, -1)) - here
        prefix = sums.gather(2, longer.clamp(max=width).expand(2, -1, -1)) % primes * shift
        is_same = ((there - prefix) % primes == 0).all(0) & (start + longer <= window)
        common = torch.where(is_same, longer, common)
        step >>= 1
    return common


def _powers(width: int, device: torch.device) -> Tensor:
    """(2, 1, W) root ** i modulo prime, of each of the two."""
    primes, roots = torch.tensor(_PRIMES, device=device)[:, None], torch.tensor(_ROOTS, device=device)[:, None]
    powers = torch.ones_like(roots)
    while powers.shape[1] < width:
        powers = torch.cat([powers, powers * (powers[:, -1:] * roots % primes) % primes], dim=1)
    return powers[:, None, :width]

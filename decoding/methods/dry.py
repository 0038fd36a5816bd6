"""DRY: a token that would carry on a repetition is penalised, the more the longer it already is.

    l(v) -= multiplier * base ** (n(v) - allowed_length)        where n(v) >= allowed_length

n(v) is the length of the longest run of tokens that ends the text, stood in it before, and was followed by v there.
Runs do not reach over a sequence breaker, and a token that holds a breaker is never penalised. As in llama.cpp, where
it is p-e-w's proposal; of breakers that span tokens, only their own tokenisation is found.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import Tensor
from torch.nn.functional import pad

from whipstaff.decoding.method import DecodingError, LogitsRewriter, Params, Vocabulary
from whipstaff.decoding.rows import Rows

Breaker = Annotated[str, Field(min_length=1, max_length=40)]

_MOST = 1e9  # a penalty: more than any logit, and rows stay finite however cold the temperature
_LONGEST = 1024  # a run; beyond, only penalties with a base below 1.03 would still grow
_AT_ONCE = 1 << 26  # tokens compared at once


class DryParams(Params):
    """How hard, from which length on, how far back."""

    method: Literal["dry"] = "dry"
    multiplier: float = Field(
        0.8, ge=0, le=1000, allow_inf_nan=False, description="penalty at allowed_length; 0 is off"
    )
    base: float = Field(1.75, ge=1, le=100, allow_inf_nan=False, description="growth with every further token")
    allowed_length: int = Field(2, ge=0, le=1000, description="longest repetition without penalty, plus one")
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

    @property
    def exponent(self) -> float:
        """Where the penalty reaches its bound."""
        if self.multiplier == 0 or self.base == 1:
            return 0.0
        return max(math.log(_MOST / self.multiplier) / math.log(self.base), 0.0)

    def is_breaker(self, logits: Tensor) -> Tensor:
        """(V,) bool: the tokens that hold a breaker; made once."""
        if self._is_breaker is None:
            mask = torch.zeros(logits.shape[1], dtype=torch.bool)
            mask[[token for token in self.breakers if token < len(mask)]] = True
            self._is_breaker = mask.to(logits.device, non_blocking=True)
        return self._is_breaker


class Dry(LogitsRewriter[DryParams]):
    name, paper = "dry", "llama.cpp, dry_multiplier"
    stage, params = "penalty", DryParams
    example: ClassVar[Mapping[str, Any]] = {"multiplier": 4.0, "allowed_length": 1}
    setting = DrySetting
    shorthands: ClassVar[Mapping[str, str]] = {
        "dry_multiplier": "multiplier",
        "dry_base": "base",
        "dry_allowed_length": "allowed_length",
        "dry_penalty_last_n": "penalty_last_n",
        "dry_sequence_breakers": "sequence_breakers",
    }
    switches = (frozenset({"multiplier"}),)
    texts = ("dry_sequence_breakers",)
    needs = frozenset({"tokens"})

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> DryParams:
        return DryParams(multiplier=0.0)

    def is_off(self, params: DryParams) -> bool:
        return params.multiplier == 0 or params.penalty_last_n == 0

    def read(self, field: str, value: Any) -> Any:
        """llama.cpp's server takes a base below 1 for none; text-generation-webui's breakers are a list's JSON without
        its brackets."""
        if field == "dry_base" and isinstance(value, int | float) and value < 1:
            return None
        return _listed(value) if field == "dry_sequence_breakers" and isinstance(value, str) else value

    def resolve(self, params: DryParams, words: Vocabulary) -> DrySetting:
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
        assert rows.tokens is not None
        if not len(logits) or rows.tokens.shape[1] == 1:
            return logits
        is_breaker = torch.stack([setting.is_breaker(logits) for setting in settings])  # (R, V)
        text, window = _newest_first(rows, settings)
        longest = min(max(one.allowed_length + math.ceil(one.exponent) for one in settings), _LONGEST)
        run, follower = _runs(text, window, _free_run(text, is_breaker, settings), longest)
        is_known, follower = _in_vocabulary(follower, logits.shape[1])
        penalty = _penalties(rows, settings, run).masked_fill_(~is_known | is_breaker.gather(1, follower), 0)
        return logits.scatter_reduce_(1, follower, logits.gather(1, follower) - penalty, "amin")


def _listed(text: str) -> Any:
    """A list from its JSON, with or without brackets. Raises: DecodingError."""
    try:
        return json.loads(text if text.lstrip().startswith("[") else f"[{text}]" if text.strip() else text or "[]")
    except (ValueError, RecursionError):
        raise DecodingError("a list of texts, or its JSON", "sequence_breakers") from None


def _penalties(rows: Rows, settings: Sequence[DrySetting], run: Tensor) -> Tensor:
    """What runs (R, n) cost the token that would carry them on."""
    columns = (rows.column(getattr(one, name) for one in settings) for name in ("multiplier", "base", "exponent"))
    multiplier, base, bound = columns
    excess = run - rows.column(setting.allowed_length for setting in settings)
    return (multiplier * base ** torch.minimum(excess, bound)).masked_fill_(excess < 0, 0)


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
    is_known, tokens = _in_vocabulary(text, is_breaker.shape[1])
    matched = torch.where(is_known & is_breaker.gather(1, tokens), 1, 0)  # (R, W) length of the breaker from here on
    for phrase in sorted({phrase for setting in settings for phrase in setting.phrases}, key=len):
        asks = torch.tensor([phrase in setting.phrases for setting in settings]).to(text.device, non_blocking=True)
        ends = len(phrase) - 1  # the phrase's first token is that many before its last
        if ends < width:
            is_here = torch.stack([text[:, ends - k : width - k] == token for k, token in enumerate(phrase)]).all(0)
            matched[:, ends:].masked_fill_(is_here & asks[:, None], len(phrase))
    free = torch.where(matched > 0, back - matched + 1, width)
    first = (matched > 0).to(torch.int8).argmax(1, keepdim=True)  # the newest; 0 where there is none
    return free.gather(1, first)


def _in_vocabulary(tokens: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Whether tokens have a logit, and them as indices of one; those of a prompt need not."""
    return (tokens >= 0) & (tokens < vocab), tokens.clamp(0, vocab - 1)


def _runs(text: Tensor, window: Tensor, limit: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """(R, W - 1) the lengths of the earlier runs that end where text[start] stands, start = 1, 2, .., as far as
    `longest`, and the tokens that follow them; -1 beyond the window."""
    start = torch.arange(1, text.shape[1], device=text.device)
    return torch.minimum(_common(text, longest), limit), text[:, :-1].masked_fill(start >= window, -1)


def _common(text: Tensor, longest: int) -> Tensor:
    """(R, W - 1) how many tokens text and text[start:] have in common from their beginning, as far as `longest`."""
    num_rows, width = text.shape
    block = max(16, min(longest, width, _AT_ONCE // (num_rows * width)))
    padded = pad(text, (0, longest + block), value=-2)
    common = torch.zeros(num_rows, width - 1, dtype=torch.int64, device=text.device)
    for begin in range(0, min(longest, width), block):
        here = pad(padded[:, begin : begin + block], (0, 1), value=-3)  # its end equals nothing
        there = padded[:, begin + 1 : begin + width + block].unfold(1, block + 1, 1)  # (R, W - 1, block + 1)
        num_same = (there != here[:, None]).view(torch.uint8).argmax(2)
        common = torch.where(common == begin, begin + num_same, common)
    return common

"""Rule adapter: a few biases make a base model answer like a tuned one.

    s = logits + ramp + style + repetition + opening

ramp        15 * L / 250 on the tokens that end a text, for L > 0 generated tokens; 15 from 250 on
style       fixed biases on fifteen tokens: away from markup, "I", "We", "What", "should"; towards lists, "!"
repetition  -1.5 on every token since the last user message began, and of the response
opening     biases on the first three tokens of the response, which the paper does not mention

A row's constant changes no distribution, so raw logits stand for the authors' log-probabilities. Hewitt et al. 2024,
arXiv:2409.14254; the style's ids are those of Llama-2, for other vocabularies it goes by the text.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from whipstaff.decoding.method import LogitsRewriter, Params, PromptFacts, Vocabulary
from whipstaff.decoding.rows import Rows

_RAMP, _RAMP_TOKENS = 15.0, 250
_AGAIN = -1.5
_STYLE = (  # text, Llama-2's id, bias
    ("<", 29966, -4.0),
    (" <", 529, -4.0),
    ("|", 29989, -4.0),
    (" I", 306, -5.0),
    ("I", 29902, -5.0),
    ("What", 5618, -5.0),
    (" We", 1334, -3.0),
    (" should", 881, -6.0),
    (" *", 334, 1.0),
    (" -", 448, 1.0),
    ("   ", 1678, 1.0),
    (" #", 396, 1.0),
    (" ##", 444, 1.0),
    ("\n", 13, 1.0),
    ("!", 29991, 1.0),
)
_OPENING: Sequence[Mapping[str, float]] = (  # first, second and third token; the first beside +5 for every word
    {**dict.fromkeys(".,:;!?<>[]{}()\"'`~@#$%^&*-=+\\|/", -10.0), "I": -20.0, " I": -20.0, "Okay": 45.0, " Okay": 45.0},
    {"!": 15.0},
    {"\n": -10.0},
)

Bias = tuple[int, float]  # token, what is added


class RuleAdapterParams(Params):
    """Which rules hold."""

    method: Literal["rule_adapter"] = "rule_adapter"
    ramp: bool = Field(True, description="ever likelier to end")
    style: bool = Field(True, description="biases on fifteen tokens")
    repetition: bool = Field(True, description="less likely to repeat a token of the question or the answer")
    opening: bool = Field(False, description="how the answer begins; not in the paper")
    after_ramp: Literal["hold", "official"] = Field("hold", description="official: no ramp from 250 tokens on")
    vocabulary: Literal["auto", "llama2"] = Field("auto", description="llama2: its ids, whatever they mean here")


class RuleAdapterSetting(BaseModel):
    """The rules as tokens."""

    model_config = ConfigDict(frozen=True)

    ends: tuple[int, ...]  # empty: no ramp
    is_held: bool
    style: tuple[Bias, ...]
    openings: tuple[tuple[Bias, ...], ...]
    is_repetition: bool
    first: int = 0  # position from which on repetition counts


class RuleAdapter(LogitsRewriter[RuleAdapterParams]):
    name, paper = "rule_adapter", "Hewitt et al. 2024, arXiv:2409.14254"
    stage, params = "rule", RuleAdapterParams
    setting = RuleAdapterSetting
    needs = frozenset({"tokens"})

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> RuleAdapterParams:
        return RuleAdapterParams(ramp=False, style=False, repetition=False)

    def is_off(self, params: RuleAdapterParams) -> bool:
        return not (params.ramp or params.style or params.repetition or params.opening)

    def resolve(self, params: RuleAdapterParams, words: Vocabulary) -> RuleAdapterSetting:
        known = _known(words, params.vocabulary)

        def biases(texts: Mapping[str, float]) -> tuple[Bias, ...]:
            return tuple((known[text], bias) for text, bias in texts.items() if text in known)

        return RuleAdapterSetting(
            ends=tuple(words.eos) if params.ramp else (),
            is_held=params.after_ramp == "hold",
            style=biases({text: bias for text, _, bias in _STYLE}) if params.style else (),
            openings=tuple(map(biases, _OPENING)) if params.opening else (),
            is_repetition=params.repetition,
        )

    def at_prompt(self, setting: RuleAdapterSetting, prompt: PromptFacts) -> RuleAdapterSetting:
        return setting.model_copy(update={"first": prompt.last_user()})

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        logits = rows.logits
        _add(logits, [_biases(setting, done) for setting, done in zip(settings, rows.num_generated, strict=True)])
        rows.facts["rules"] = torch.tensor(list(map(_acting, settings, rows.num_generated))).view(-1, 4)
        if any(setting.is_repetition for setting in settings):
            _add_again(rows, rows.column(s.first if s.is_repetition else torch.inf for s in settings))
        return logits


def _known(words: Vocabulary, vocabulary: str) -> Mapping[str, int]:
    """The texts of the rules that are one token. Llama-2's newline is a byte, which no text finds: where all that are
    found have its ids, the others have theirs too."""
    official = {text: token for text, token, _ in _STYLE}
    texts = {*official, *(text for opening in _OPENING for text in opening)}
    found = {text: token for text in texts if (token := words.id_of(text)) is not None}
    is_llama2 = "!" in found and all(found.get(text, token) == token for text, token in official.items())
    return {**found, **official} if is_llama2 or vocabulary == "llama2" else found


def _ramp(setting: RuleAdapterSetting, num_generated: int) -> float:
    if not setting.ends or (num_generated >= _RAMP_TOKENS and not setting.is_held):
        return 0.0
    return _RAMP * min(num_generated / _RAMP_TOKENS, 1.0)


def _biases(setting: RuleAdapterSetting, num_generated: int) -> dict[int, float]:
    """Of one row, without repetition: token -> what is added."""
    opening = setting.openings[num_generated] if num_generated < len(setting.openings) else ()
    total: dict[int, float] = {}
    for token, bias in (*setting.style, *opening, *((end, _ramp(setting, num_generated)) for end in setting.ends)):
        total[token] = total.get(token, 0.0) + bias
    return total


def _acting(setting: RuleAdapterSetting, num_generated: int) -> list[bool]:
    """Whether ramp, style, repetition and opening act on the next token."""
    is_opening = num_generated < len(setting.openings)
    return [_ramp(setting, num_generated) > 0, bool(setting.style), setting.is_repetition, is_opening]


def _add(logits: Tensor, biases: Sequence[Mapping[int, float]]) -> None:
    vocab = logits.shape[1]
    flat = [(row, token, bias) for row, some in enumerate(biases) for token, bias in some.items() if token < vocab]
    if flat:
        rows, tokens, values = zip(*flat, strict=True)
        cells = torch.tensor([rows, tokens]).to(logits.device, non_blocking=True)
        added = torch.tensor(values, dtype=logits.dtype).to(logits.device, non_blocking=True)
        logits.index_put_((cells[0], cells[1]), logits[cells[0], cells[1]] + added)


def _add_again(rows: Rows, first: Tensor) -> None:
    """Add what repetition costs, once, to the tokens that stand at position `first` (R, 1) or later."""
    assert rows.tokens is not None
    logits, tokens = rows.logits, rows.tokens
    position = torch.arange(tokens.shape[1], device=first.device)
    counts = (tokens >= 0) & (tokens < logits.shape[1]) & (position >= first)
    tokens = tokens.clamp(0, logits.shape[1] - 1)
    penalised = (logits.gather(1, tokens) + _AGAIN).masked_fill_(~counts, torch.inf)
    logits.scatter_reduce_(1, tokens, penalised, "amin")

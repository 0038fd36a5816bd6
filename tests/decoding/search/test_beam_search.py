"""Beam search against transformers' own, and against vLLM's loop."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from search_loop import Asked, Loop, of_vllm
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from whipstaff.decoding.methods.contrastive import Contrastive, ContrastiveParams
from whipstaff.decoding.mix import MixedRow, mix_rows
from whipstaff.decoding.search.beam_search import BeamSearch, BeamSearchParams

EOS, VOCAB, LENGTH = 2, 64, 12
METHOD = BeamSearch()
SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_beams": 2, "early_stopping": True},
    {"num_beams": 5, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 4, "length_penalty": 2.5, "early_stopping": True},
    {"num_beams": 4, "length_penalty": -1.5},
    {"num_beams": 6, "length_penalty": 0.6, "early_stopping": "never"},
    {"num_beams": 1},
]
LIKES = {"seldom": 0.0, "often": 2.5, "at once": 5.0}  # how much the model likes to end a text


def model_that_ends(liking: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.35,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(32, VOCAB)
    head.weight.data = model.lm_head.weight.data
    head.bias.data = torch.zeros(VOCAB).index_fill(0, torch.tensor([EOS]), liking)
    model.lm_head = head
    return model


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    """Of a few lengths, each of them often."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (3 + r % 3,), generator=random).tolist() for r in range(num)]


def of_transformers(model: Any, texts: Sequence[Sequence[int]], params: BeamSearchParams, eos: Any = EOS) -> list[Any]:
    """(tokens, score) of each text's answers."""
    found: list[Any] = [None] * len(texts)
    for length in {len(text) for text in texts}:
        index = [r for r, text in enumerate(texts) if len(text) == length]
        out = model.generate(
            torch.tensor([list(texts[r]) for r in index]),
            attention_mask=torch.ones(len(index), length, dtype=torch.int64),
            num_beams=params.num_beams,
            num_return_sequences=params.num_beams,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            max_new_tokens=LENGTH,
            do_sample=False,
            use_cache=False,
            eos_token_id=eos,
            return_dict_in_generate=True,
            output_scores=True,
        )
        answers = [cut(row, eos) for row in out.sequences[:, length:].tolist()]
        scores = out.sequences_scores.tolist() if params.num_beams > 1 else [math.nan] * len(answers)
        for at, r in enumerate(index):
            own = slice(at * params.num_beams, (at + 1) * params.num_beams)
            found[r] = list(zip(answers[own], scores[own], strict=True))
    return found


def cut(row: Sequence[int], eos: Any) -> tuple[int, ...]:
    """An answer without the padding behind it."""
    ends = [at for at, token in enumerate(row) if token in (eos if isinstance(eos, list) else [eos])]
    return tuple(row[: ends[0] + 1] if ends else row)


@pytest.mark.parametrize("liking", LIKES)
def test_answers_are_those_of_transformers(liking: str) -> None:
    """200 prompts in all for every setting, token for token."""
    model, texts = model_that_ends(LIKES[liking]), prompts(67, seed=len(liking))
    reasons = set()
    for own in SETTINGS:
        params = BeamSearchParams(**own)
        ran = Loop(model).run_all(METHOD, [Asked(params, text, LENGTH, [EOS]) for text in texts])
        for one, expected in zip(ran, of_transformers(model, texts, params), strict=True):
            assert [answer.tokens for answer in one.hypotheses] == [tokens for tokens, _ in expected], own
            for answer, (_, score) in zip(one.hypotheses, expected, strict=True):
                assert answer.score == pytest.approx(score, rel=1e-6) or math.isnan(score)
                assert (answer.finish_reason == "stop") == (answer.tokens[-1] == EOS)
                reasons.add(answer.finish_reason)
    assert reasons == {"stop", "length"}


def test_several_tokens_may_end_an_answer() -> None:
    model, texts, params = model_that_ends(2.0), prompts(12), BeamSearchParams(num_beams=3)
    eos = [EOS, 7, 11]
    ran = Loop(model).run_all(METHOD, [Asked(params, text, LENGTH, eos) for text in texts])
    for one, expected in zip(ran, of_transformers(model, texts, params, eos), strict=True):
        assert [answer.tokens for answer in one.hypotheses] == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("liking", LIKES)
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0])
def test_answers_are_those_of_vllm(liking: str, penalty: float) -> None:
    model, texts = model_that_ends(LIKES[liking]), prompts(3, seed=5)
    params = BeamSearchParams(num_beams=3, scoring="vllm", length_penalty=penalty)
    for eos in (EOS, None):
        ran = Loop(model).run_all(METHOD, [Asked(params, text, LENGTH, [] if eos is None else [eos]) for text in texts])
        for text, one in zip(texts, ran, strict=True):
            expected = of_vllm(model, text, params, eos, LENGTH)
            found = [(a.tokens[:-1] if a.finish_reason == "stop" else a.tokens, a.score) for a in one.hypotheses]
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
            assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-6)


def test_vllms_beams_end_where_nothing_can_change() -> None:
    model, params = model_that_ends(LIKES["at once"]), BeamSearchParams(num_beams=2, scoring="vllm", length_penalty=0)
    ran = Loop(model).run_all(METHOD, [Asked(params, text, 200, [EOS]) for text in prompts(4)])
    assert all(len(one.decisions) < 60 for one in ran)


def test_what_is_settled_is_told() -> None:
    """Some of it before the end, and never what an answer lacks (the loop looks)."""
    ran = Loop(model_that_ends(0.0)).run(METHOD, BeamSearchParams(num_beams=2), [5, 6, 7], 40)
    told = [decision.settled for decision in ran.decisions[:-1]]
    assert told == sorted(told) and 0 < told[-1] < 40


class Table:
    """A model whose next logits follow from the last token."""

    def __init__(self, rows: dict[int, dict[int, float]]) -> None:
        self.rows = rows

    def search(self, params: BeamSearchParams, max_tokens: int, eos: Sequence[int] = (0,)) -> list[tuple[int, ...]]:
        model = model_that_ends(0.0)
        loop = Loop(model, rewrite=lambda texts, _: self.logits(texts))
        ran = loop.run(METHOD, params, [1], max_tokens, eos)
        return [answer.tokens for answer in ran.hypotheses]

    def logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        found = torch.full((len(texts), 8), -torch.inf)
        for row, text in enumerate(texts):
            for token, value in self.rows[text[-1]].items():
                found[row, token] = value
        return found


def test_of_equal_continuations_the_first_come_first() -> None:
    table = Table({token: dict.fromkeys(range(3, 8), 0.0) for token in range(1, 8)})
    assert table.search(BeamSearchParams(num_beams=3), 1) == [(3,), (4,), (5,)]
    assert table.search(BeamSearchParams(num_beams=3), 2) == [(3, 3), (3, 4), (3, 5)]


def test_what_is_banned_is_no_continuation() -> None:
    """Where fewer than K are left, fewer beams run, and there may be fewer answers."""
    table = Table({1: {3: 0.0}, 3: {4: 0.0, 0: 0.0}, 4: {0: 0.0}})
    assert table.search(BeamSearchParams(num_beams=3, length_penalty=0), 9) == [(3, 0), (3, 4, 0)]
    assert table.search(BeamSearchParams(num_beams=3, scoring="vllm"), 9) == [(3, 4, 0), (3, 0)]


def test_scores_may_be_left_as_they_are() -> None:
    """3 is taken where raw scores add up, for what follows it; normalised, it is as good as 4."""
    table = Table({1: {3: 0.0, 4: 0.1}, 3: {5: 4.0}, 4: {5: 3.0}})
    assert table.search(BeamSearchParams(num_beams=2, normalize=False), 2)[0] == (3, 5)
    assert table.search(BeamSearchParams(num_beams=2), 2)[0] == (4, 5)


def test_beams_find_what_greedy_misses() -> None:
    table = Table({1: {3: 0.2, 4: 0.0}, 3: dict.fromkeys(range(8), 0.0), 4: {5: 0.0}, 5: {0: 0.0}})
    assert table.search(BeamSearchParams(num_beams=1), 3)[0][0] == 3
    assert table.search(BeamSearchParams(num_beams=2), 3)[0][0] == 4


def test_bad_parameters_are_named() -> None:
    for own, field in (
        ({"num_beams": 0}, "num_beams"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"scoring": "vllm", "early_stopping": True}, "scoring"),
    ):
        with pytest.raises(ValueError, match=field):
            BeamSearchParams(**own)


def test_off_is_one_beam() -> None:
    assert METHOD.is_off(METHOD.off((), ()))
    assert not any(METHOD.is_off(BeamSearchParams(**own)) for own in SETTINGS if own.get("num_beams") != 1)
    assert not METHOD.is_off(BeamSearchParams(num_beams=1, scoring="vllm"))
    assert METHOD.num_sequences(BeamSearchParams(num_beams=7)) == METHOD.num_answers(BeamSearchParams(num_beams=7)) == 7


def test_contrastive_beams_are_beams_over_a_mix_as_it_is() -> None:
    """Li et al.'s objective, log p_expert - log p_amateur among the plausible tokens, added up along each text."""
    expert, amateur = model_that_ends(0.0), model_that_ends(0.0)
    amateur.lm_head.weight.data = amateur.lm_head.weight.data.roll(3, 0)
    mix = Contrastive().mix(ContrastiveParams(amateur="first"))

    def mixed(texts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
        streams = {"first": Loop(amateur).see(texts).logits}
        return mix_rows(logits.clone(), streams, [MixedRow(row, mix, [row]) for row in range(len(texts))])

    def added(text: Sequence[int]) -> list[tuple[float, int]]:
        strong, weak = (Loop(model).see([text]).logits[0].log_softmax(0).tolist() for model in (expert, amateur))
        least = max(strong) + math.log(0.1)
        return [(s - w, token) for token, (s, w) in enumerate(zip(strong, weak, strict=True)) if s >= least]

    different = 0
    for prompt in prompts(6, seed=9):
        asked = Asked(BeamSearchParams(num_beams=3, normalize=False), prompt, 6)
        ran = Loop(expert, rewrite=mixed).run_all(METHOD, [asked])[0]
        beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for _ in range(6):
            longer = [(total + s, (*text, token)) for total, text in beams for s, token in added([*prompt, *text])]
            beams = sorted(longer, key=lambda one: -one[0])[:3]
        assert [answer.tokens for answer in ran.hypotheses] == [text for _, text in beams]
        assert ran.hypotheses[0].score == pytest.approx(beams[0][0] / 6, rel=1e-5)
        normalised = asked._replace(setting=BeamSearchParams(num_beams=3))
        different += ran.best != Loop(expert, rewrite=mixed).run_all(METHOD, [normalised])[0].best
    assert different

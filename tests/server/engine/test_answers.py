"""Answers of a search beside the one that the engine generates: written out as vLLM writes out its own."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from serving import make_tokenizer
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

from whipstaff.decoding.plan import DecodingPlan, Rewrite
from whipstaff.server.engine.frontend.answers import RankedAnswers, SearchAnswers
from whipstaff.server.plan import CompanionPlan, RequestPlan


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def output(tokens: list[int], text: str, finish_reason: str | None) -> RequestOutput:
    one = CompletionOutput(0, text, tokens, None, None, finish_reason=finish_reason)
    return RequestOutput("r", None, [5, 6], None, [one], finish_reason is not None)


async def engine(closed: list[bool]) -> AsyncGenerator[Any, None]:
    try:
        yield output([7], "a", None)
        yield output([8], "b", "length")
    finally:
        closed.append(True)


def answered(answers: SearchAnswers, tokenizer: Any, record: dict[str, Any] | None) -> list[RequestOutput]:
    async def run() -> list[RequestOutput]:
        found, closed = [], list[bool]()
        async for one in answers.of(engine(closed), tokenizer):
            found.append(one)
            if record is not None and len(found) == 1:
                answers.explained(0, {"search": record})
        assert closed
        return found

    return asyncio.run(run())


def hypothesis(tokens: list[int], finish_reason: str, score: float = -1.0) -> dict[str, Any]:
    return {"tokens": tokens, "score": score, "finish_reason": finish_reason}


def test_further_answers_come_with_the_end(tokenizer: Any) -> None:
    eos, text = tokenizer.eos_token_id, tokenizer.encode("def main() return", add_special_tokens=False)
    assert len(text) > 2
    record = {
        "hypotheses": [
            hypothesis([7, 8], "length"),
            hypothesis([*text, eos], "stop"),
            hypothesis(text, "length"),
            hypothesis([*text[:2], text[0]], "stop"),
            hypothesis([9], "length"),
        ]
    }
    params, noted = SamplingParams(stop_token_ids=[text[0]]), list[Any]()
    params._eos_token_id = eos
    first, last = answered(SearchAnswers(4, params, noted.append), tokenizer, record)
    assert noted == [record]
    assert [one.index for one in first.outputs] == [0] and first.outputs[0].text == "a"
    assert [one.index for one in last.outputs] == [0, 1, 2, 3]  # the fifth was not asked for
    written = tokenizer.decode(text)
    assert [one.text for one in last.outputs] == ["b", written, written, tokenizer.decode(text[:2])]
    assert [list(one.token_ids) for one in last.outputs[1:]] == [one["tokens"] for one in record["hypotheses"][1:4]]
    assert [one.finish_reason for one in last.outputs] == ["length", "stop", "length", "stop"]
    assert [one.stop_reason for one in last.outputs] == [None, None, None, text[0]]


def test_special_tokens_and_stops_are_written_where_asked(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    record = {"hypotheses": [hypothesis([7, 8], "length"), hypothesis([7, eos], "stop")]}
    params = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False)
    _, last = answered(SearchAnswers(2, params, lambda _: None), tokenizer, record)
    assert last.outputs[1].text == tokenizer.decode([7, eos])
    params = SamplingParams(detokenize=False)
    _, last = answered(SearchAnswers(2, params, lambda _: None), tokenizer, record)
    assert last.outputs[1].text == ""


def test_an_answer_that_was_cut_short_is_alone(tokenizer: Any) -> None:
    """A stop string ends the request before its search is over."""
    noted = list[Any]()
    _, last = answered(SearchAnswers(3, SamplingParams(), noted.append), tokenizer, {"counts": {"tried": 2}})
    assert len(last.outputs) == 1
    assert noted == [{"counts": {"tried": 2}}, {"counts": {"tried": 2}, "ended_by": "stop"}]


def test_text_goes_ahead_and_is_taken_back(tokenizer: Any) -> None:
    """Of what was settled later than the draft, nothing is shown before its own draft, or the end, comes."""
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in ("def main", "def print", "class")]
    drafts = [(0, texts[0]), (0, texts[1]), (1, texts[1][1:]), (0, texts[2])]
    outputs = [([], ""), ([], ""), (texts[1][:1], tokenizer.decode(texts[1][:1])), ([], "")]
    taken, shown, events = list[int](), "", list[str]()
    answers = SearchAnswers(1, SamplingParams(), lambda _: None, taken.append)

    async def generated() -> AsyncGenerator[Any, None]:
        for (settled, draft), (tokens, text) in zip(drafts, outputs, strict=True):
            answers.explained(0, {"draft": {"settled": settled, "tokens": draft}})
            yield output(tokens, text, None)
        yield output(texts[1][1:], tokenizer.decode(texts[1])[len(outputs[2][1]) :] + "!", "length")

    async def run() -> list[Any]:
        found = []
        nonlocal shown, events
        async for one in answers.of(generated(), tokenizer):
            events += [f"-{num}" for num in taken]
            shown = (shown[: -taken.pop()] if taken else shown) + one.outputs[0].text
            found.append((shown, list(one.outputs[0].token_ids)))
        return found

    said = asyncio.run(run())
    assert said == [
        ("def main", []),
        ("def print", []),
        ("def print", outputs[2][0]),
        ("def print", []),
        ("def print!", texts[1][1:]),
    ]
    assert events == ["-4"]


def test_closing_the_answers_closes_what_the_engine_generates(tokenizer: Any) -> None:
    closed: list[bool] = []

    async def run() -> None:
        answers = SearchAnswers(2, SamplingParams(), lambda _: None).of(engine(closed), tokenizer)
        await anext(answers)
        await answers.aclose()

    asyncio.run(run())
    assert closed == [True]


# ---- ranked answers


def candidates(*said: tuple[list[int], float | None]) -> RequestOutput:
    outputs = [
        CompletionOutput(i, f"t{i}", tokens, by, None, finish_reason="stop") for i, (tokens, by) in enumerate(said)
    ]
    return RequestOutput("r", None, [5, 6], None, outputs, True)


def ranked(answers: RankedAnswers, output: RequestOutput) -> list[CompletionOutput]:
    async def outputs() -> AsyncGenerator[Any, None]:
        yield output

    async def run() -> list[CompletionOutput]:
        (found,) = [one async for one in answers.of(outputs(), None)]
        return list(found.outputs)

    return asyncio.run(run())


def test_the_best_candidates_are_answered() -> None:
    noted, explained = list[Any](), list[Any]()

    def explain(choice: int, told: dict[str, Any]) -> None:
        explained.append((choice, told["id"]))

    trying = Rewrite("kwd", "{}", num_tried=5), Rewrite("contrastive_search", "{}", num_tried=2)
    further = CompanionPlan((3,)), CompanionPlan((3,), until=1)
    plan = RequestPlan(decoding=DecodingPlan(rewrites=trying), companions=further)
    own = explain, plan.computed
    answers = RankedAnswers(2, lambda one: one.log_probability / one.num_tokens, noted.append, *own)
    for candidate, tokens in enumerate(([1, 2], [3], [4, 5, 6])):
        for token in tokens:
            answers.explained(candidate, {"id": token})
    found = ranked(answers, candidates(([1, 2], -4.0), ([3], -1.0), ([4, 5, 6], -1.5)))
    assert [(one.index, one.text) for one in found] == [(0, "t2"), (1, "t1")]
    assert explained == [(0, 4), (0, 5), (0, 6), (1, 3)]
    counts = {"tokens_computed": 6 + 6 + 3, "tried": 6 * 7}  # one of the further sequences stays for a token only
    assert noted == [{"hypotheses": [{"score": -0.5}, {"score": -1.0}, {"score": -2.0}], "counts": counts}]


def test_of_equal_candidates_the_first_is_best_and_empty_ones_are_last() -> None:
    answers = RankedAnswers(3, lambda one: one.log_probability, lambda _: None, None)
    found = ranked(answers, candidates(([], None), ([1], -2.0), ([2], -2.0)))
    assert [one.text for one in found] == ["t1", "t2", "t0"]

"""Searches in requests: what of them is admitted, what they do to the rest of a request, and which field is refused."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
from catalogues import PAIR, WHEN, at_prompt, compiled, refusal
from pydantic import Field

from whipstaff.decoding.method import PromptFacts
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.plan import DecodingPlan, Explain, Rewrite, SearchPlan
from whipstaff.decoding.search.search import Search, SearchFacts, SearchMethod, SearchParams
from whipstaff.decoding.spans import Span, SpanMessages, span_at
from whipstaff.server.admission.prepare import prepare
from whipstaff.server.admission.receipt import Tally, receipt
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.admission.search import effort
from whipstaff.server.engine.frontend.requests import ChatRequest, Notes, TextRequest
from whipstaff.server.errors import BadRequest, WhipstaffError
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, RequestPlan
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.prompt.vocabulary import Vocabulary
from whipstaff.server.registry.capabilities import Capabilities

BEAMS = {"method": "beam_search", "num_beams": 4}


LOOKING = {"method": "looks"}


class TrustParams(SearchParams):
    """A search that trusts a part of the prompt."""

    method: Literal["trust"] = "trust"
    span: Span = Field(SpanMessages())
    beams: int = 2


class Trust(SearchMethod[TrustParams]):
    name, paper = "trust", "a test's"
    params = TrustParams
    needs = frozenset({"tries", "attention"})
    sequences_field = "beams"
    explains: ClassVar[bool] = True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        return None

    def num_sequences(self, params: TrustParams) -> int:
        return params.beams

    def at_prompt(self, setting: TrustParams, prompt: PromptFacts) -> TrustParams:
        return setting.model_copy(update={"span": list(span_at(setting.span, prompt))})

    def start(self, setting: TrustParams, facts: SearchFacts) -> Search:
        raise NotImplementedError


class LooksParams(SearchParams):
    method: Literal["looks"] = "looks"


class Looks(SearchMethod[LooksParams]):
    """One whose sequence is where it looks."""

    name, paper = "looks", "a test's"
    params, drafts = LooksParams, False

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        return None

    def num_sequences(self, params: LooksParams) -> int:
        return 1

    def start(self, setting: LooksParams, facts: SearchFacts) -> Search:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _with_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "trust", Trust())
    monkeypatch.setitem(METHODS, "looks", Looks())


@pytest.fixture(scope="module")
def able(caps: Capabilities) -> Capabilities:
    """A server that can search: 16 sequences at once."""
    words = Vocabulary(["a", "b"], {"a": 0, "b": 1}, (), None)
    return replace(caps, words=words, looks_ahead=True, reads_attention=True, max_seqs=64, max_search_seqs=16)


def of_text(caps: Capabilities, **fields: Any) -> CompiledRequest:
    """A whole request of text."""
    made = prepare(TextRequest.model_validate({"prompt": "a", **fields}), caps)
    assert made is not None
    return made


def refused(caps: Capabilities, request: type[Any] = TextRequest, **fields: Any) -> WhipstaffError:
    body = {"prompt": "a"} if request is TextRequest else {"messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(WhipstaffError) as caught:
        prepare(request.model_validate({**body, **fields}), caps)
    return caught.value


# ---- what travels


def search_of(made: CompiledRequest) -> SearchPlan:
    plan = made.plan.decoding
    assert plan is not None and plan.search is not None
    assert RequestPlan.from_wire(json.loads(json.dumps({PLAN_KEY: made.plan.to_wire()}))) == made.plan
    return plan.search


def test_a_search_travels_beside_a_mix(able: Capabilities) -> None:
    made = compiled(able, decoding=[PAIR, BEAMS, {"method": "rule_adapter", "vocabulary": "auto"}])
    search = search_of(made)
    assert (search.method, search.num_sequences, search.heads, search.streams) == ("beam_search", 4, (), ())
    assert json.loads(search.setting)["num_beams"] == 4
    plan = made.plan.decoding
    assert plan is not None and plan.mix is not None and [one.method for one in plan.rewrites] == ["rule_adapter"]
    assert (made.searches, made.num_sequences, made.draws_itself) == (True, 4, False)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"num_beams": 3}, {"num_beams": 3, "length_penalty": 1.0, "scoring": "hf"}),
        ({"num_beams": 3, "length_penalty": 0.5}, {"num_beams": 3, "length_penalty": 0.5}),
        ({"num_beams": 3, "early_stopping": True}, {"early_stopping": True}),
        ({"decoding": BEAMS, "length_penalty": 0.5}, {"num_beams": 4, "length_penalty": 0.5}),
        ({"decoding": BEAMS | {"length_penalty": 2.0}, "length_penalty": 0.5}, {"length_penalty": 2.0}),
    ],
)
def test_other_servers_names(able: Capabilities, fields: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    setting = json.loads(search_of(of_text(able, **fields)).setting)
    assert setting | wanted == setting


@pytest.mark.parametrize("fields", [{"num_beams": 1}, {"length_penalty": 0.5}, {"early_stopping": True}])
def test_what_searches_nothing(able: Capabilities, fields: dict[str, Any]) -> None:
    request = TextRequest.model_validate({"prompt": "a", **fields})
    made = prepare(request, able)
    assert made is None or (made.is_plain and not made.searches)


def test_answers_by_either_name(able: Capabilities) -> None:
    request = TextRequest.model_validate({"prompt": "a", "num_beams": 4, "num_return_sequences": 3})
    assert request.n == 3 and prepare(request, able) is not None


# ---- vLLM's own beam search


def test_vllms_beam_search_beside_ours(able: Capabilities) -> None:
    made = of_text(able, use_beam_search=True, n=3, length_penalty=0.7, decoding=PAIR)
    search = search_of(made)
    setting = json.loads(search.setting)
    assert (setting["num_beams"], setting["length_penalty"], setting["scoring"]) == (3, 0.7, "vllm")
    one = search_of(of_text(able, use_beam_search=True, steering={"vector": "calm"}))
    assert one.num_sequences == 1  # as vLLM: a beam of one is greedy


@pytest.mark.parametrize("more", [{}, {"typical_p": 1}, {"temperature": 0}], ids=str)
def test_vllms_beam_search_alone_is_ours(able: Capabilities, more: dict[str, Any]) -> None:
    request = TextRequest.model_validate({"prompt": "a", "use_beam_search": True, "n": 3, **more})
    made = prepare(request, able)
    assert made is not None and request.may_have_extras and search_of(made).num_sequences == 3
    request.attach(made)
    assert not request.use_beam_search


def test_vllms_beam_search_draws_nothing(able: Capabilities) -> None:
    made = of_text(able, use_beam_search=True, n=2, temperature=0.7)
    assert made.warnings == ("temperature did nothing: beam_search draws no tokens",)
    assert of_text(able, use_beam_search=True, n=2).warnings == ()


def test_two_beam_searches(able: Capabilities) -> None:
    error = refused(able, use_beam_search=True, n=2, decoding=BEAMS)
    assert (error.status, error.param) == (400, "use_beam_search") and "decoding" in error.message


def test_a_request_that_searches_is_one_request_of_the_engines(able: Capabilities) -> None:
    request = TextRequest.model_validate(
        {"prompt": "a", "use_beam_search": True, "n": 3, "steering": {"vector": "calm"}, "temperature": 3.0}
    )
    made = prepare(request, able)
    assert made is not None
    request.attach(made)
    params = request.to_sampling_params(5, {})
    assert (params.n, params.temperature, request.n, request.temperature) == (1, 0.0, 3, 3.0)
    assert not request.use_beam_search


def test_what_a_search_came_to_is_noted_by_prompt_and_choice(able: Capabilities) -> None:
    """In the second of two prompts, two answers each; a choice gets what is said of its tokens where that was asked."""
    fields = {"prompt": ["a", "b"], "n": 1, "decoding": {"method": "trust", "span": [[0, None]]}, "explain": {"top": 0}}
    request = TextRequest.model_validate(fields)
    made = prepare(request, able)
    assert made is not None and made.plan.decoding is not None and made.plan.decoding.explain == Explain(0)
    searches, explained = list[Any](), list[Any]()
    notes = Notes(
        token=lambda choice, record: explained.append((choice, record)),
        search=lambda prompt, record: searches.append((prompt, record)),
    )
    request.attach(made, notes)
    request._placed += [at_prompt(made, Prompt(9, list(range(9)), 64, None)) for _ in range(2)]
    plans = [(request.to_sampling_params(5, {}).extra_args or {})[PLAN_KEY] for _ in range(2)]
    assert all(plan["decoding"]["search"][0] == "trust" and plan.answers is not None for plan in plans)
    record = {"hypotheses": [], "facts": [{"said": [{"token": 1, "classifier": 0.5}]}, {"back_to": 3}]}
    plans[1].explained(0, {"search": record})
    assert searches == [(1, record)] and explained == [(1, {"id": 1, "facts": {"classifier": 0.5}})]


# ---- where in the prompt


def placed(made: CompiledRequest, prompt: Prompt | None = None) -> Any:
    plan = at_prompt(made, prompt or Prompt(9, list(range(9)), 64, None)).plan.decoding
    assert plan is not None and plan.search is not None
    return json.loads(plan.search.setting)["span"]


def test_spans_become_positions(able: Capabilities) -> None:
    assert placed(compiled(able, decoding={"method": "trust", "span": [[0, None]]})) == [[0, 9]]
    assert placed(compiled(able, decoding={"method": "trust", "span": [[-3, -1], [0, 2]]})) == [[0, 2], [6, 8]]


def test_images_become_positions(able: Capabilities) -> None:
    prompt = Prompt(9, None, 64, None, images=[[(1, 3)], [(4, 5), (6, 8)]])
    for image, wanted in (("all", [[1, 3], [4, 5], [6, 8]]), (0, [[1, 3]]), (-1, [[4, 5], [6, 8]])):
        assert placed(compiled(able, decoding={"method": "trust", "span": {"image": image}}), prompt) == wanted
    for image in (2, -3):
        made = compiled(able, decoding={"method": "trust", "span": {"image": image}})
        with pytest.raises(BadRequest, match="the prompt has 2 images") as caught:
            at_prompt(made, prompt)
        assert caught.value.param == "decoding.span"


class Lettered(Prompt):
    """A prompt of letters, each a token."""

    def text_at(self, text: str, param: str) -> tuple[int, int]:
        start = "abcdefghi".index(text)
        return start, start + len(text)


def test_texts_move_with_rows_that_are_put_before_them(able: Capabilities) -> None:
    """Windows count in the prompt as it then is, as those of where clauses do."""
    prompt = Lettered(9, list(range(9)), 64, None)
    for insert, text, span in ((0, "bc", [4, 6]), (2, "bcd", [1, 7]), (3, "bc", [1, 3]), (3, "d", [6, 7])):
        made = compiled(able, decoding={"method": "trust", "span": text}, steering={"vector": "soft", "insert": insert})
        assert placed(made, prompt) == [span], (insert, text)
    soft = {"vector": "soft", "insert": 0}
    assert placed(compiled(able, decoding={"method": "trust", "span": [[0, None]]}, steering=soft), prompt) == [[0, 12]]


@pytest.mark.parametrize("method", ["trust", "opera", "opera_lite"])
@pytest.mark.parametrize("span", [[[0, 10]], "nowhere", {"role": "user"}, {"image": "all"}])
def test_spans_outside_the_prompt(able: Capabilities, method: str, span: Any) -> None:
    made = compiled(able, decoding=[{"method": method, "span": span}])
    with pytest.raises(BadRequest) as caught:
        at_prompt(made, Prompt(9, list(range(9)), 64, None))
    assert re.sub(r"\[0\]$", "", caught.value.param or "") == "decoding[0].span"


# ---- refusals


BAD: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "two": ({"decoding": [BEAMS, {"method": "trust"}]}, 400, "decoding[1].method", "one search"),
    "temperature": ({"decoding": [{"method": "edt"}, BEAMS]}, 400, "decoding[0].method", "beam_search draws nothing"),
    "truncation": ({"num_beams": 2, "top_a": 0.1}, 400, "top_a", "beam_search draws nothing"),
    "forced": ({"decoding": [BEAMS, {"method": "forced", "ids": [1]}]}, 400, "decoding[1].method", "forced"),
    "ranked": ({"num_beams": 2, "best_of": 3}, 400, "best_of", "beam_search draws nothing"),
    "room": ({"decoding": BEAMS | {"num_beams": 17}}, 422, "decoding.num_beams", "17 sequences .* at most 16"),
    "room by its field": ({"num_beams": 40}, 422, "num_beams", "--max-search-seqs"),
    "beams": ({"decoding": BEAMS | {"num_beams": 0}}, 400, "decoding.num_beams", "greater than"),
    "explained": ({"num_beams": 2, "explain": {"top": 1}}, 400, "explain", "explains no tokens"),
    "unsteered": (
        {"decoding": {"method": "trust", "span": [[0, None]]}, "n": 1, "explain": {"unsteered": True}},
        400,
        "explain.unsteered",
        "draws no tokens",
    ),
    "both sources": ({"num_beams": 2, "logprobs_source": "both"}, 400, "logprobs_source", "explains no tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_search_takes(able: Capabilities, name: str) -> None:
    fields, status, param, reason = BAD[name]
    error = refusal(able, **fields)
    assert (error.status, error.param) == (status, param) and re.search(reason, error.message), error.message


GRAMMAR = {"type": "json_object"}
BESIDE: dict[str, tuple[type[Any], dict[str, Any], str, str]] = {
    "answers": (TextRequest, {"decoding": BEAMS, "n": 5}, "n", "at most 4 answers, its num_beams"),
    "one answer": (TextRequest, {"decoding": {"method": "trust"}, "n": 2}, "n", "one answer"),
    "grammar": (TextRequest, {"decoding": BEAMS, "response_format": GRAMMAR}, "decoding.method", "follows no grammar"),
    "logprobs": (TextRequest, {"decoding": LOOKING, "logprobs": 0}, "logprobs", "receipt has every answer's score"),
    "logprobs of a chat": (ChatRequest, {"decoding": LOOKING, "logprobs": True}, "logprobs", "forced"),
    "their source": (
        TextRequest,
        {"decoding": BEAMS, "logprobs": 0, "logprobs_source": "base"},
        "logprobs_source",
        "tells no others",
    ),
    "unstreamed": (TextRequest, {"decoding": BEAMS, "stream_retractions": True}, "stream_retractions", "streamed"),
    "prompt": (ChatRequest, {"decoding": BEAMS, "prompt_logprobs": 1}, "prompt_logprobs", "forced"),
    "echo": (TextRequest, {"decoding": BEAMS, "logprobs": 1, "echo": True}, "logprobs", "forced"),
    "repetition": (
        TextRequest,
        {"decoding": BEAMS, "repetition_detection": {"max_pattern_size": 4, "min_count": 3}},
        "repetition_detection",
        "does not stop",
    ),
    "stop": (TextRequest, {"decoding": BEAMS, "n": 2, "stop": ["."]}, "stop", "is to come to 2"),
    "vLLM's width": (
        TextRequest,
        {"steering": {"vector": "calm"}, "use_beam_search": True, "n": 17},
        "n",
        "at most 16",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_does_not_go_beside_a_search(able: Capabilities, name: str) -> None:
    request, fields, param, reason = BESIDE[name]
    error = refused(able, request, **fields)
    assert error.param == param and re.search(reason, error.message), error.message


def test_what_a_search_reads_must_be_there(able: Capabilities) -> None:
    for lacking, flag in (
        (replace(able, looks_ahead=False), "--lookahead"),
        (replace(able, reads_attention=False), "--attention-rows"),
    ):
        error = refusal(lacking, decoding=[{"method": "trust"}])
        assert (error.status, error.param) == (422, "decoding[0].method") and flag in error.message
        compiled(lacking, decoding=BEAMS)
    error = refusal(replace(able, words=None), decoding=[BEAMS])
    assert (error.status, error.param) == (422, "decoding[0].method") and "tokenizer" in error.message


def test_the_engines_own_limit_is_named_where_it_is_the_lower_one(able: Capabilities) -> None:
    assert "--max-num-seqs" in refusal(replace(able, max_seqs=3), decoding=BEAMS).message


def test_further_prompts_count_for_every_sequence(able: Capabilities) -> None:
    guided = {"decoding": [BEAMS | {"num_beams": 8}, {"method": "cfg"}]}
    compiled(able, **guided)
    error = refusal(replace(able, max_search_seqs=15), **guided)
    assert "16 sequences" in error.message and error.param == "decoding[0].num_beams"


def test_every_sequence_reads_its_conditions(able: Capabilities) -> None:
    conditional = {"steering": {"vector": "calm", "layers": [1], "when": WHEN}, "decoding": BEAMS}
    at_prompt(compiled(replace(able, num_histories=4), **conditional), Prompt(9, list(range(9)), 64, None))
    with pytest.raises(WhipstaffError, match="4 sequences read 4 things") as caught:
        at_prompt(compiled(replace(able, num_histories=3), **conditional), Prompt(9, list(range(9)), 64, None))
    assert caught.value.param == "steering"


def test_tries_know_no_entropy(able: Capabilities) -> None:
    steering = {"vector": "calm", "schedule": {"shape": "entropy", "low": 0.5, "high": 2}}
    assert refusal(able, decoding={"method": "trust"}, steering=[steering]).param == "steering[0].schedule"
    compiled(able, decoding=BEAMS, steering=[steering])


# ---- what is said


def test_what_changes_a_draw_is_told_to_do_nothing(able: Capabilities) -> None:
    made = of_text(able, decoding=BEAMS, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, temperature_last=True)
    fields = ("temperature", "top_p", "top_k", "min_p", "temperature_last")
    assert list(made.warnings) == [f"{field} did nothing: beam_search draws no tokens" for field in fields]
    assert of_text(able, decoding=BEAMS, temperature=0, top_p=1).warnings == ()
    alone = {"method": "opera", "beams": 1, "temperature": 0.5}
    assert of_text(able, decoding=alone, top_p=0.9).warnings == (
        "top_p did nothing: opera draws by parameters of its own",
    )
    assert refusal(able, decoding=alone | {"beams": 2}).param == "decoding.temperature"
    assert of_text(able, decoding=BEAMS).warnings == ()
    assert of_text(able, decoding=BEAMS, temperature=50).warnings[0].startswith("temperature did nothing")


def test_the_receipt_says_what_was_computed(able: Capabilities) -> None:
    made, tally = of_text(able, decoding=BEAMS, n=2), Tally()
    hypotheses = [{"tokens": [1, 2], "score": -0.5, "finish_reason": "stop"}, {"tokens": [3], "score": -1.0}]
    tally.note_search(1, {"hypotheses": hypotheses[1:], "counts": {}})
    tally.note_search(0, {"hypotheses": hypotheses, "counts": {"tokens_computed": 9, "forks": 3, "moved": 1}})
    said = receipt(made, searches=tally.searches)["search"]
    assert said == [
        {"sequences": 4, "tokens_computed": 9, "tried": 0, "forks": 3, "rollbacks": 0, "scores": [-0.5, -1.0]},
        {"sequences": 4, "tokens_computed": 0, "tried": 0, "forks": 0, "rollbacks": 0, "scores": [-1.0]},
    ]
    assert "search" not in receipt(made)


def test_what_was_computed_is_told_of_all_answers_together() -> None:
    """Of a search by what the engine says, and else by what was generated; nothing where these are all."""
    plain, guided = RequestPlan(), RequestPlan(companions=(CompanionPlan((1,), until=2),))
    trying = RequestPlan(decoding=DecodingPlan(rewrites=(Rewrite("kwd", "{}", num_tried=4),)))
    tally = Tally()
    tally.note(0, output([1], [2, 3]))
    assert tally.num_computed([plain]) is None
    assert tally.num_computed([guided]) == (1 + 1) + (2 + 2) and tally.num_computed([trying]) == 3 * 5
    tally.note(0, output([4, 5]))
    assert tally.num_computed([guided]) == (3 + 2) + (2 + 2)
    tally.note(1, output([1]))
    tally.note_search(1, {"counts": {"tokens_computed": 7, "tried": 5}})
    assert tally.num_computed([plain, plain]) == 5 + 12 and tally.num_computed([trying, plain]) == 5 * 5 + 12


def test_what_a_search_may_take_is_known_before(able: Capabilities) -> None:
    """With what other methods try for each of its sequences."""
    search = of_text(able, decoding=BEAMS).search
    assert search is not None
    assert effort(search, 0)[:2] == (4, 0) and effort(search, 3)[:2] == (4, 12)


def output(*tokens: list[int]) -> Any:
    """One of vLLM's, of so many sequences."""
    outputs = [SimpleNamespace(index=index, token_ids=own) for index, own in enumerate(tokens)]
    return SimpleNamespace(prompt_token_ids=[3], outputs=outputs)


# ---- what may be taken back, and what is told of tokens


def test_what_may_be_taken_back_is_told_to_who_wants_it(able: Capabilities) -> None:
    for method, tells in ((BEAMS, True), (LOOKING, False)):
        made = of_text(able, decoding=method, stream=True, stream_retractions=True)
        assert (made.retracts, search_of(made).tells_drafts) == (tells, tells)
        assert not of_text(able, decoding=method, stream=True).retracts
    made = of_text(able, decoding=PAIR, stream=True, stream_retractions=True)
    assert made.warnings == ("stream_retractions did nothing: without a search nothing is taken back",)
    assert refusal(able, decoding=BEAMS, stream_retractions="perhaps").param == "stream_retractions"


@pytest.mark.parametrize(("asked", "told"), [({}, None), ({"logprobs": 0}, 0), ({"logprobs": 5}, 5)])
def test_log_probabilities_travel_in_the_plan(able: Capabilities, asked: dict[str, int], told: int | None) -> None:
    request = TextRequest.model_validate({"prompt": "a", "decoding": BEAMS, **asked})
    made = prepare(request, able)
    assert made is not None
    request.attach(made)
    request._placed.append(at_prompt(made, Prompt(9, list(range(9)), 64, None)))
    plan = RequestPlan.from_wire(request.to_sampling_params(5, {}).extra_args)
    assert plan is not None and plan.decoding is not None and plan.decoding.search is not None
    assert plan.decoding.search.logprobs == told


def test_budgets_travel_in_the_plan(able: Capabilities) -> None:
    search = search_of(of_text(able, decoding=BEAMS | {"max_time": 2.5, "max_computed_tokens": 100}))
    assert (search.max_time, search.max_computed_tokens) == (2.5, 100)

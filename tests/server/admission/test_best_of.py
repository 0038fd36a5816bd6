"""Ranked answers in requests: what they come to, and which field is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from catalogues import SHAPE, UNIT, compiled, refusal

from whipstaff.decoding.method import Candidate
from whipstaff.decoding.plan import DecodingPlan, Explain
from whipstaff.server.admission.prepare import prepare
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.engine.frontend.requests import TextRequest
from whipstaff.server.errors import WhipstaffError
from whipstaff.server.plan import PLAN_KEY, RequestPlan
from whipstaff.server.prompt.vocabulary import Vocabulary
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import VectorSnapshot, read_vectors
from whipstaff.steering import vector_file
from whipstaff.steering.vector_file import Header

BEST = {"method": "best_of", "num_candidates": 4}


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory, caps: Capabilities) -> Capabilities:
    """A server with a classifier."""
    folder = tmp_path_factory.mktemp("heads")
    header = Header(method="prefix_classifier", model=SHAPE)
    vector_file.write(Path(folder / "prefix.safetensors"), header, {"weight": UNIT[:2]})
    registry = VectorSnapshot(read_vectors([folder]), SHAPE)
    return replace(caps, registry=registry, words=Vocabulary([], {}, (), None))


def of_text(caps: Capabilities, **fields: Any) -> CompiledRequest:
    made = prepare(TextRequest.model_validate({"prompt": "a", **fields}), caps)
    assert made is not None
    return made


def test_its_own_likelihood_needs_nothing_of_the_engine(able: Capabilities) -> None:
    made = compiled(able, decoding=BEST)
    assert made.plan.decoding == DecodingPlan() and made.num_candidates == made.num_sequences == 4
    assert made.score(Candidate(2, -3.0, [])) == -1.5


@pytest.mark.parametrize(
    ("own", "streams", "num_heads"), [({"model": "expert"}, ("expert",), 0), ({"classifier": "prefix"}, (), 1)]
)
def test_who_else_ranks_is_asked_on_the_way(
    able: Capabilities, own: dict[str, Any], streams: tuple[str, ...], num_heads: int
) -> None:
    made = compiled(able, decoding=BEST | own)
    plan = made.plan.decoding
    assert plan is not None and plan.explain == Explain(0) and plan.models == list(streams)
    (rewrite,) = plan.rewrites
    assert (rewrite.method, rewrite.streams, len(rewrite.heads)) == ("best_of", streams, num_heads)
    assert RequestPlan.from_wire(json.loads(json.dumps({PLAN_KEY: made.plan.to_wire()}))) == made.plan
    assert made.options.explain is None  # which the client did not ask for
    again = compiled(able, decoding=BEST | own, explain={"top": 3}).plan.decoding
    assert again is not None and again.explain == Explain(3)


def test_openais_name(able: Capabilities) -> None:
    assert of_text(able, best_of=5, n=2).num_candidates == 5
    assert of_text(able, best_of=1).is_plain


def test_candidates_are_answers_of_one_request(able: Capabilities) -> None:
    request = TextRequest.model_validate({"prompt": "a", "best_of": 5, "n": 2, "stream": True})
    made = prepare(request, able)
    assert made is not None
    request.attach(made)
    params = request.to_sampling_params(5, {})
    assert (params.n, params.logprobs, params.output_kind.name, request.n) == (5, 0, "FINAL_ONLY", 2)
    request.logprobs = 3
    assert request.to_sampling_params(5, {}).logprobs == 3


@pytest.mark.parametrize(
    ("fields", "status", "param", "reason"),
    [
        ({"best_of": 3, "n": 4}, 400, "n", "draws 3 candidates"),
        ({"best_of": 3, "temperature": 0}, 400, "best_of", "all the same"),
        ({"decoding": [BEST], "temperature": 0}, 400, "decoding[0].method", "all the same"),
        ({"decoding": BEST, "best_of": 3}, 400, "best_of", "given twice"),
        ({"best_of": 65}, 400, "best_of", "less than or equal"),
        ({"use_beam_search": True, "best_of": 3}, 400, "best_of", "draws nothing"),
    ],
)
def test_what_is_refused(able: Capabilities, fields: dict[str, Any], status: int, param: str, reason: str) -> None:
    with pytest.raises(WhipstaffError, match=reason) as caught:
        of_text(able, **fields)
    assert (caught.value.status, caught.value.param) == (status, param)


def test_who_ranks_must_be_there(able: Capabilities) -> None:
    for own, status, param in (
        ({"model": "absent"}, 404, "decoding.model"),
        ({"classifier": "absent"}, 404, "decoding.classifier"),
        ({"model": "expert", "classifier": "prefix"}, 400, "decoding"),
    ):
        error = refusal(able, decoding=BEST | own)
        assert (error.status, error.param) == (status, param), error.message

"""Beams in groups against transformers' own, as the last version that has them in its library recorded it."""

import json
from typing import Any

import pytest
from decodings import GOLDEN, StubVocabulary
from search_loop import Asked, Loop
from transformers import LlamaForCausalLM

from whipstaff.decoding.search.beam_search import BeamSearch, BeamSearchParams

SAID = json.loads((GOLDEN / "beam_groups.json").read_text())
METHOD = BeamSearch()


def params_of(case: dict[str, Any], **own: Any) -> BeamSearchParams:
    names = BeamSearchParams.model_fields.keys() & case.keys()
    return BeamSearchParams(**{name: case[name] for name in names} | own)


def answers_of(**own: Any) -> list[Any]:
    loop = Loop(LlamaForCausalLM.from_pretrained(GOLDEN / "models" / "base").eval())
    asked = [Asked(params_of(case, **own), case["prompt"], SAID["max_tokens"], case["eos"]) for case in SAID["cases"]]
    return [ran.hypotheses for ran in loop.run_all(METHOD, asked)]


def test_answers_and_scores_are_the_recorded_ones() -> None:
    for case, answers in zip(SAID["cases"], answers_of(), strict=True):
        said = [
            [*one.tokens[:-1], *(case["eos"][:1] if one.finish_reason == "stop" else one.tokens[-1:])]
            for one in answers
        ]
        assert said == case["answers"]
        assert [one.score for one in answers] == pytest.approx(case["scores"], rel=1e-5)
    reasons = {one.finish_reason for answers in answers_of() for one in answers}
    assert reasons == {"stop", "length"}


def test_groups_say_the_same_where_nothing_keeps_them_from_it() -> None:
    for case, answers in zip(SAID["cases"], answers_of(diversity_penalty=1e-6), strict=True):
        num_groups = case["num_beam_groups"]
        assert len({one.tokens for one in answers}) == case["num_beams"] // num_groups
        assert [*map(tuple, case["answers"])] != [one.tokens for one in answers]


@pytest.mark.parametrize(
    ("own", "field"),
    [
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beam_groups"),
        ({"num_beam_groups": 2}, "diversity_penalty"),
        ({"diversity_penalty": 1.0}, "diversity_penalty"),
        ({"num_beam_groups": 2, "diversity_penalty": 1.0, "scoring": "vllm"}, "scoring"),
        ({"num_beam_groups": 2, "diversity_penalty": 1.0, "normalize": False}, "normalize"),
    ],
    ids=str,
)
def test_bad_parameters_are_named(own: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError) as caught:
        BeamSearch().resolve(BeamSearchParams(**own), StubVocabulary())
    assert field in (getattr(caught.value, "param", ""), *str(caught.value).split())
    BeamSearch().resolve(BeamSearchParams(num_beams=1, num_beam_groups=3), StubVocabulary())  # off, whatever it says

"""Coupled prompts through the engine against the papers' and libraries' own code, token for token."""

from collections.abc import Iterator
from typing import Any

import pytest
from decodings import GOLDEN, golden
from engines import Ask, EngineUnderTest, running

from whipstaff.decoding.methods.cad import Cad, CadParams
from whipstaff.decoding.methods.cfg import Cfg, CfgParams
from whipstaff.decoding.methods.forced import ForcedSetting
from whipstaff.decoding.methods.sh2 import Sh2, Sh2Params
from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan, Rewrite, SamplerSettings
from whipstaff.server.plan import CompanionPlan, RequestPlan

pytestmark = pytest.mark.engine

TOLERANCE = 2e-4
UNLIKELY = -1000.0  # what SH2's code counts for an answer's token that its mask excludes


def cases(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = golden(name)[0]["cases"]
    return found


def coupled(mix: Mix, other: list[int], *rewrites: Rewrite) -> RequestPlan:
    draw = SamplerSettings(0.0, 0, 1.0, 0.0, False) if rewrites else None
    return RequestPlan(None, DecodingPlan(mix, rewrites, draw), companions=(CompanionPlan(tuple(other)),))


def guided(case: dict[str, Any]) -> Ask:
    other = case["negative_prompt"] or case["prompt"][-1:]
    mix = Cfg().mix(CfgParams(guidance_scale=case["guidance_scale"]))
    sampling = {"repetition_penalty": case["repetition_penalty"], "logprobs": 5}
    return Ask(case["prompt"], coupled(mix, other), len(case["output"]), sampling)


def aware(case: dict[str, Any]) -> Ask:
    nuclei = {"top_p": case["filter_p"], "top_p_without": case["filter_p_prior"]}
    mix = Cad().mix(CadParams(alpha=case["alpha"], context="any", **nuclei))
    return Ask(case["context_prompt"], coupled(mix, case["prior_prompt"]), len(case["output"]))


def test_guidance_and_context_aware_decoding_in_one_batch(recorded: EngineUnderTest) -> None:
    """Penalties run after guidance, and count the tokens of the plain prompt and of the answer."""
    contexts = [case for case in cases("context_aware_decoding") if "filter_p" in case]
    guidance = cases("classifier_free_guidance")
    asks = [*map(guided, guidance), *map(aware, contexts)]
    for case, tokens in zip([*guidance, *contexts], recorded.tokens(*asks), strict=True):
        assert tokens == case["output"], case["id"]


def test_log_probabilities_are_the_guided_ones(recorded: EngineUnderTest) -> None:
    _, tensors = golden("classifier_free_guidance")
    unpenalised = [case for case in cases("classifier_free_guidance") if case["repetition_penalty"] == 1]
    for case, output in zip(unpenalised, recorded.generate(*map(guided, unpenalised)), strict=True):
        expected = tensors[f"{case['id']}.scores_after_processors"].log_softmax(-1)
        for row, said in zip(expected, output.outputs[0].logprobs, strict=True):
            for token, entry in said.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=TOLERANCE), case["id"]


@pytest.fixture(scope="module")
def hesitant() -> Iterator[EngineUnderTest]:
    with running("v1-eager-async", str(GOLDEN / "models" / "sh2"), max_num_seqs=32) as engine:
        yield engine


def test_hesitation(hesitant: EngineUnderTest) -> None:
    """Generation, and answers that are scored by saying them."""
    generated = [case for case in cases("sh2") if case["kind"] == "greedy generation"]
    asks = []
    for case in generated:
        plan = coupled(Sh2().mix(Sh2Params(alpha=case["alpha"])), case["hesitation_prompt_ids"])
        asks.append(
            Ask(case["plain_prompt_ids"], plan, len(case["output"]), {"repetition_penalty": case["repetition_penalty"]})
        )
    for case, tokens in zip(generated, hesitant.tokens(*asks), strict=True):
        assert tokens == case["output"], case["id"]


def test_answers_score_what_they_score_there(hesitant: EngineUnderTest) -> None:
    scored = [case for case in cases("sh2") if case["kind"] == "multiple-choice score"]
    answers = [ids(case["answer"]) for case in scored]
    asks = []
    for case, answer in zip(scored, answers, strict=True):
        mix = Sh2().mix(Sh2Params(alpha=case["alpha"]))
        masked = Sh2().mix(Sh2Params(alpha=case["alpha"], relative_top=case["relative_top"]))
        says = Rewrite("forced", ForcedSetting(ids=tuple(answer)).model_dump_json(), (), (), ())
        for one in (mix, masked):
            plan = coupled(one, [0, *ids(case["hesitation_prompt"])], says)
            asks.append(Ask([0, *ids(case["plain_prompt"])], plan, len(answer), {"logprobs": 0}))
    outputs = iter(hesitant.generate(*asks))
    for case, answer in zip(scored, answers, strict=True):
        open_scores, masked_scores = (_said(next(outputs), answer) for _ in range(2))
        kept = [score > -1e30 for score in masked_scores]
        total = sum(score if is_kept else UNLIKELY for score, is_kept in zip(open_scores, kept, strict=True))
        assert total == pytest.approx(case["sum_logprob"], abs=3e-3, rel=1e-5), case["id"]


def ids(text: str) -> list[int]:
    """Of that model's tokenizer: a token is a byte."""
    return [byte + 3 for byte in text.encode()]


def _said(output: Any, answer: list[int]) -> list[float]:
    assert list(output.outputs[0].token_ids) == answer
    return [said[token].logprob for token, said in zip(answer, output.outputs[0].logprobs, strict=True)]

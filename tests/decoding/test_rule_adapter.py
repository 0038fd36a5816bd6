"""The rule adapter against the authors' class, with its token ids and by text."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decodings import StubPrompt, StubVocabulary, golden
from reference import rule_adapter as reference
from torch import Tensor

from whipstaff.decoding.methods.rule_adapter import RuleAdapter, RuleAdapterParams
from whipstaff.decoding.rows import Rows

SAID, TENSORS = golden("rule_adapter")
CASES = {case["id"]: case for case in SAID["cases"] if case["id"] != "combine"}
VOCAB, USER_END = 32000, 7  # the stub prompt's user tag ends there
METHOD = RuleAdapter()
RULES = {
    "eos-uniform-diversity": {},
    "eos-uniform": {"repetition": False},
    "diversity": {"ramp": False, "style": False},
    "True": {"opening": True},
}


def biases(case: dict[str, Any], texts: dict[str, int] | None = None, **own: Any) -> Tensor:
    """(V,) what is added to one row."""
    params = RuleAdapterParams(**{"vocabulary": "llama2", **RULES[str(case["options"])], **own})
    setting = METHOD.at_prompt(METHOD.resolve(params, StubVocabulary(texts or {})), StubPrompt(user=USER_END))
    text = case["prompt"] + case["response"]
    tokens = torch.tensor([[*text, -1, -1]])
    rows = Rows(torch.zeros(1, VOCAB), [len(case["prompt"])], [len(case["response"])], tokens)
    return METHOD.rewrite(rows, [setting])[0]


@pytest.mark.parametrize("name", [name for name in CASES if name != "m3_L0"])
def test_biases_are_those_of_the_official_class(name: str) -> None:
    case = CASES[name]
    expected = torch.zeros(VOCAB).index_put((TENSORS[f"{name}.token"],), TENSORS[f"{name}.bias"])
    torch.testing.assert_close(biases(case, after_ramp="official"), expected, atol=1e-5, rtol=0)


def test_the_official_opening_is_ours_but_for_a_constant() -> None:
    """There every token of the stub's vocabulary reads like a word; the file leaves out those that end at 0."""
    case = CASES["m3_L0"]
    result = biases(case, opening=False) + case["mode_value"]
    assert all(int((result == value).sum()) == num for value, num in case["all_vocab_bias_values"])
    assert result[TENSORS["m3_L0.token"]].tolist() == TENSORS["m3_L0.bias"].tolist()


def test_scores_are_those_of_the_official_sum() -> None:
    """Biases on raw logits give the distribution of the sum of two log-probabilities."""
    result = (TENSORS["combine.lm_logits"].float() + biases(CASES["m0_L1"])).log_softmax(0)
    tokens, theirs = TENSORS["combine.top20_token"], TENSORS["combine.top20_score"]
    assert result.topk(20).indices.tolist() == tokens.tolist()
    normalised = theirs - SAID["cases"][-1]["logsumexp_score"]
    torch.testing.assert_close(result[tokens], normalised, atol=1e-4, rtol=0)


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("num_generated", [0, 1, 100, 249, 250, 251, 4000])
def test_a_plain_computation(holds: bool, num_generated: int) -> None:
    since: Sequence[int] = [900, 901, 900, *(1000 + k % 50 for k in range(num_generated))]
    case = {"options": "eos-uniform-diversity", "prompt": [5] * USER_END + [900, 901, 900], "response": since[3:]}
    result = biases(case, after_ramp="hold" if holds else "official")
    expected = reference.biases(since, num_generated, reference.LLAMA2, [2], holds)
    found = {int(token): float(result[token]) for token in result.nonzero().flatten()}
    assert found == pytest.approx(expected)


def test_style_goes_by_text_for_other_vocabularies() -> None:
    """Texts that are not one token are left out; the ids of Llama-2 mean something else here."""
    case = {"options": "eos-uniform", "prompt": [5] * 9, "response": []}
    result = biases(case, {"!": 3, "<": 4, " I": 6, "other": 529}, vocabulary="auto")
    assert {int(token): float(result[token]) for token in result.nonzero().flatten()} == {3: 1.0, 4: -4.0, 6: -5.0}


def test_llama2_is_known_by_its_ids() -> None:
    """Also where some of its tokens cannot be found by text."""
    case = {"options": "eos-uniform", "prompt": [5] * 9, "response": []}
    assert torch.equal(biases(case, {"!": 29991, "<": 29966}, vocabulary="auto"), biases(case))


def test_the_opening_goes_by_text() -> None:
    case = {"options": "True", "prompt": [5] * USER_END, "response": []}
    result = biases(case, {"Okay": 50, "I": 51, ",": 52, "word": 53}, style=False, vocabulary="auto")
    assert result[50:54].tolist() == [45.0, -20.0, -10.0, 0.0]


def test_every_end_of_a_text_is_made_likelier() -> None:
    class Vocabulary(StubVocabulary):
        eos = (3, 9)  # type: ignore[assignment]

    setting = METHOD.resolve(RuleAdapterParams(style=False, repetition=False), Vocabulary())
    rows = Rows(torch.zeros(1, 12), [4], [125], torch.zeros(1, 129, dtype=torch.int64))
    assert METHOD.rewrite(rows, [setting])[0].tolist() == [7.5 * (token in (3, 9)) for token in range(12)]
    assert rows.facts["rules"].tolist() == [[True, False, False, False]]


def test_ids_that_a_vocabulary_lacks_are_left_out() -> None:
    setting = METHOD.resolve(RuleAdapterParams(vocabulary="llama2", repetition=False), StubVocabulary({}))
    rows = Rows(torch.zeros(1, 500), [4], [0], torch.zeros(1, 4, dtype=torch.int64))
    assert METHOD.rewrite(rows, [setting])[0].nonzero().flatten().tolist() == [13, 306, 334, 396, 444, 448]

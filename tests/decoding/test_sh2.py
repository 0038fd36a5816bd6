"""SH2 against the authors' class: which tokens are shown again, where, and what that does to scores."""

from typing import Any

import pytest
import torch
from decodings import GOLDEN as FOLDER
from decodings import golden
from torch import Tensor
from transformers import AutoTokenizer

from whipstaff.decoding.methods.sh2 import Sh2, Sh2Params, keys, placed
from whipstaff.decoding.mix import MixedRow, mix_rows

GOLDEN, TENSORS = golden("sh2")
METHOD = Sh2()
UNLIKELY = -1000.0  # what a masked answer token counts in the authors' sums


def of_kind(kind: str, **also: str) -> Any:
    cases = [case for case in GOLDEN["cases"] if {"kind": kind, **also}.items() <= case.items()]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["id"])


def mixed(plain: Tensor, hesitation: Tensor, **own: Any) -> Tensor:
    num, mix = len(plain), METHOD.mix(Sh2Params(**own))
    return mix_rows(torch.cat([plain, hesitation]), {}, [MixedRow(r, mix, (r, num + r)) for r in range(num)])[:num]


@of_kind("key selection")
def test_keys_are_the_authors(case: dict[str, Any]) -> None:
    scores = TENSORS[f"{case['id'].partition('_')[0]}.token_logprob"].tolist()
    found = keys(scores, case["key_num"])
    assert found == [index + 1 for index in case["deterministic_positions"]]  # there, of tokens that have a score
    for drawn in case["random_runs"]:
        assert keys(scores, case["key_num"], drawn["numpy_seed"]) == [index + 1 for index in drawn["positions"]]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "models" / "sh2")
    ids = tokenizer.encode(case["text"])
    assert tokenizer.decode([ids[position] for position in found]) == case["deterministic_text"]


@of_kind("multiple-choice score", answer=" She was Polish.")  # the recorded logits are of this one
def test_answers_score_what_they_score_there(case: dict[str, Any]) -> None:
    plain, hesitation = TENSORS["score.plain_logits"], TENSORS["score.hesitation_logits"]
    answer = [byte + 3 for byte in case["answer"].encode()]
    own = {"alpha": case["alpha"], "relative_top": case["relative_top"]}
    open_scores = mixed(plain, hesitation, **own | {"relative_top": 0.0}).log_softmax(1)
    kept = mixed(plain, hesitation, **own) > -torch.inf
    chosen = torch.arange(len(answer)), torch.tensor(answer)
    total = torch.where(kept[chosen], open_scores[chosen], UNLIKELY).sum()
    assert float(total) == pytest.approx(case["sum_logprob"], abs=2e-3, rel=1e-5)


@of_kind("greedy generation")
def test_generated_tokens_are_the_authors(case: dict[str, Any]) -> None:
    plain, hesitation, after = (
        TENSORS[f"{case['id']}.{name}"] for name in ("plain_logits", "hesitation_logits", "scores_after_processors")
    )
    scores = mixed(plain, hesitation, alpha=case["alpha"])
    penalty = case["repetition_penalty"]
    for step in range(len(scores)):
        seen = torch.tensor(sorted({*case["plain_prompt_ids"], *case["output"][:step]}))
        old = scores[step, seen]
        scores[step, seen] = torch.where(old < 0, old * penalty, old / penalty)
    torch.testing.assert_close(scores, after, atol=2e-4, rtol=1e-5)
    assert scores.argmax(1).tolist() == case["output"]


def test_keys_stand_where_the_authors_put_them() -> None:
    score, gen = (next(case for case in GOLDEN["cases"] if case["id"] == name) for name in ("score0", "gen0"))
    assert placed(Sh2Params(), score["plain_prompt"], "eun ,s ") == score["hesitation_prompt"]
    assert placed(Sh2Params(placement="append"), gen["plain_prompt"], "   ") == gen["hesitation_prompt"]


@pytest.mark.parametrize(
    ("own", "prompt", "result"),
    [
        ({"placement": "after_document"}, "D\n#Summary#:", "D\n#Pondering#: k\n#Summary#:"),
        ({"placement": "after_document"}, "D", "D\n#Pondering#: k"),
        ({"placement": "append"}, "Q: a\nA: b\nQ: c\nA:", "Q: a\nA: b\nQ: c\nPondering: k\nA:"),
        ({"placement": "append", "before": "\nAnswer"}, "Q: c\nAnswer:", "Q: c\nPondering: k\nAnswer:"),
        ({"placement": "append", "before": ""}, "Q: c", "Q: c\nPondering: k"),
        ({"template": "{prompt} ({keys})"}, "Q", "Q (k)"),
        ({"template": "{keys} {prompt}"}, "{keys}", "k {keys}"),
    ],
)
def test_placements(own: dict[str, Any], prompt: str, result: str) -> None:
    assert placed(Sh2Params(**own), prompt, "k") == result


def test_ties_go_to_the_first_and_one_key_is_always_shown() -> None:
    assert keys([-1.0] * 30, 10) == [1, 2, 3]
    assert keys([-1.0, -3.0], 1) == [2] == keys([-1.0, -3.0], 1, seed=0)

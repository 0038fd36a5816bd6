"""OPERA against the authors' recorded tensors, traces and generations, in that order."""

from collections import Counter
from typing import Any

import pytest
import torch
from decodings import GOLDEN, StubPrompt, StubVocabulary, golden
from pydantic import ValidationError
from search_loop import Asked, Loop
from torch import Tensor
from transformers import LlamaForCausalLM

from whipstaff.decoding.method import DecodingError
from whipstaff.decoding.search.beams import Candidate
from whipstaff.decoding.search.opera import (
    Opera,
    OperaParams,
    OperaSetting,
    Retrospection,
    Text,
    draw,
    grown,
    judged,
    most_frequent,
    shares,
)

SAID, TENSORS = golden("opera")
CASES = {case["id"]: case for case in SAID["cases"]}
SYNTHETIC = [name for name in CASES if name.startswith("syn")]
WHOLE = ["plain0", "plain1", "roll0", "roll1"]
METHOD = Opera()


def params_of(case: dict[str, Any], **own: Any) -> OperaParams:
    named = {"official_fp16": True, "scale_factor": case["scale_factor"], **own}
    if "threshold" in case:
        named |= {"beams": case["num_beams"], "candidates": case["num_attn_candidates"]}
        named |= {"threshold": case["threshold"], "penalty_weight": case["penalty_weights"]} | own
    return OperaParams(**named)


def products_of(weights: Tensor, scale_factor: float) -> Tensor:
    """(S, T) logarithms, one row of (S, T, T) weights after the other."""
    products = weights.new_empty(len(weights), 0)
    for row in range(weights.shape[1]):
        products = grown(products, weights[:, row, : row + 1], scale_factor)
    return products


@pytest.mark.parametrize("name", SYNTHETIC)
def test_penalties_are_those_of_the_authors_statements(name: str) -> None:
    case, attention = CASES[name], TENSORS[f"{name}.attn_headmax"].flatten(0, 1)
    first, length, (start, end) = case["response_start"], case["response_len_incl_candidate"], case["image"]
    whole = shares(attention.flatten(0, 1)).view_as(attention)
    answer = whole[:, first : first + length, first : first + length]
    trust = whole[:, first + length - 1, start : end + 1].sum(1)
    torch.testing.assert_close(trust, TENSORS[f"{name}.image_mass"].flatten())
    for fp16 in (True, False):
        params = params_of(case, official_fp16=fp16)
        products = products_of(answer, params.scale_factor)
        penalty, column = judged(params, products, trust)
        expected = TENSORS[f"{name}.penalty"].flatten()
        if fp16:
            torch.testing.assert_close(penalty, expected, atol=1e-7, rtol=1e-3)
            assert column.tolist() == TENSORS[f"{name}.rollback_locs"].flatten().tolist()
            scores = (products - 16.11809565095832).exp().half().float()
            torch.testing.assert_close(scores, TENSORS[f"{name}.attn_local_scores"].flatten(0, 1), rtol=2e-3, atol=1e-7)
        visible = (expected > 1e-6) & (expected < 50)
        torch.testing.assert_close(penalty[visible], expected[visible], rtol=1e-2, atol=0)
        shape = TENSORS[f"{name}.candidate_logits"].shape
        lowered = TENSORS[f"{name}.candidate_logits"] - params.penalty_weight * penalty.view(shape)
        torch.testing.assert_close(lowered, torch.tensor(case["new_candidate_logits_weight1"]), rtol=4e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in TENSORS if name.endswith("attn_local")])
def test_penalties_are_those_of_recorded_attention(name: str) -> None:
    case_name, step, _ = name.split(".")
    case = CASES[case_name]
    said = case["steps"][int(step.removeprefix("step"))]
    weights = TENSORS[name].flatten(0, 1)
    params = params_of(case)
    trust = torch.tensor(said["image_mass"]).flatten()
    penalty, column = judged(params, products_of(weights, params.scale_factor), trust)
    torch.testing.assert_close(penalty, torch.tensor(said["penalty"]).flatten(), atol=6.1e-8, rtol=1e-3)
    assert column.tolist() == [one for row in said["argmax_locs"] for one in row]


@pytest.mark.parametrize("name", ["roll0", "roll1"])
def test_places_are_those_of_the_recorded_traces(name: str) -> None:
    case = CASES[name]
    past = Retrospection(params_of(case))
    backs = []
    for said in case["steps"]:
        columns = [most_frequent(row) for row in said["argmax_locs"]]
        assert most_frequent(columns) == said["common_loc"]
        place = past.look(columns)
        assert (place is not None) == said["rollback"]
        if place is not None:
            assert place == said["rollback_to_response_length"]
            rejected = {beam * 256 + token for beam, token in past.rejected[place]}
            assert [rejected] == [set(row) for row in said["rejected_flat"]]
            backs.append(place)
        chosen = zip(said["next_source_beam"], said["next_tokens"], strict=True)
        past.choose(said["prefix_len_response"] if place is None else place, [Candidate(*pair, 0.0) for pair in chosen])
    assert len(backs) == sum(said["rollback"] for said in case["steps"]) > 0


def loop(name: str) -> Loop:
    folder = GOLDEN / "models" / f"opera_{name}"
    return Loop(LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(), reads_attention=True)


def asked(name: str, **own: Any) -> Asked:
    case = CASES[name]
    start, end = case["image"]  # both belong to it
    setting = OperaSetting(**params_of(case, **own).model_dump(), trusted=((start, end + 1),))
    return Asked(setting, case["prompt"], case["max_new_tokens"], [1])


@pytest.mark.parametrize("name", WHOLE)
def test_generations_are_the_recorded_ones(name: str) -> None:
    """Step by step: what the beams chose, from which, and what they score then; and the answer."""
    case = CASES[name]
    ran = loop(name).run_all(METHOD, [asked(name)])[0]
    chosen: list[tuple[list[int], list[int]]] = []
    for decision in ran.decisions:
        if not decision.hypotheses and not decision.counts.get("rollbacks"):
            chosen.append(([one.source for one in decision.living], [one.tokens[-1] for one in decision.living]))
    recorded = [(said["next_source_beam"], said["next_tokens"]) for said in case["steps"]]
    assert chosen == recorded[: len(chosen)] and len(chosen) == len(recorded) - 1
    assert list(ran.best) == case["output"]
    assert ran.count("rollbacks") == sum(said["rollback"] for said in case["steps"])
    assert ran.hypotheses[0].score == pytest.approx(
        case["steps"][-1]["beam_scores_after"][0] / case["max_new_tokens"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("roll0", {"penalty_weight": 0.0}),  # the penalty left out
        ("roll0", {"threshold": 1000}),  # no way back
        ("roll0", {"visits": 0}),
        ("roll0", {"switch_length": 3}),
    ],
    ids=str,
)
def test_whatever_is_left_out_is_missed(name: str, own: dict[str, Any]) -> None:
    assert list(loop(name).run_all(METHOD, [asked(name, **own)])[0].best) != CASES[name]["output"]


def test_a_place_is_visited_so_often() -> None:
    for visits in (1, 2):
        ran = loop("roll0").run_all(METHOD, [asked("roll0", visits=visits)])[0]
        places = [decision.facts["back_to"] for decision in ran.decisions if decision.facts]
        assert max(map(places.count, places)) == visits


def test_a_short_history_settles_early() -> None:
    """And the beams still go back, no further than that (the loop looks that nothing settled is lost)."""
    loops, at = loop("roll0"), []
    for history in (512, 6, 3):
        ran = loops.run_all(METHOD, [asked("roll0", history=history)])[0]
        at.append([decision.settled for decision in ran.decisions[:-1]])
        assert ran.count("rollbacks") > 0
        assert at[-1] == sorted(at[-1])
        backs = [
            (d.facts["back_to"], len(before[0])) for d, before in zip(ran.decisions, ran.texts, strict=False) if d.facts
        ]
        assert all(length - place <= history for place, length in backs)
    assert at[0][-1] <= 10 < at[1][-1] <= at[2][-1]


def test_what_was_tried_is_counted() -> None:
    ran = loop("plain1").run_all(METHOD, [asked("plain1")])[0]
    assert ran.count("tried") == 4 + 17 * 3 * 4


def test_one_beam_is_greedy_among_its_candidates() -> None:
    """A form of our own: the best of N by logits less penalties."""
    case, loops = CASES["plain1"], loop("plain1")
    params = params_of(case, beams=1, official_fp16=False)
    start, end = case["image"]
    ran = loops.run(METHOD, OperaSetting(**params.model_dump(), trusted=((start, end + 1),)), case["prompt"], 18)
    text, num_prompt, rows = [*case["prompt"]], len(case["prompt"]), []
    for length in range(1, 19):
        seen = loops.see([text])
        if length > 1:
            rows.append((seen.attention[0] / seen.attention[0].sum())[num_prompt:])
        best = []
        for token in seen.logits[0].topk(params.candidates).indices.tolist():
            row = loops.see([[*text, token]]).attention[0]
            row = row / row.sum()
            square = [*rows, row[num_prompt:]]
            penalty = -float(row[start : end + 1].sum())
            if length > params.switch_length:
                columns = [
                    1e-7 * torch.stack([params.scale_factor * w[j] for w in square[j:]]).prod() for j in range(length)
                ]
                penalty = min(50.0, float(max(columns)))
            best.append((float(seen.logits[0, token]) - params.penalty_weight * penalty, token))
        text.append(max(best)[1])
    assert text[num_prompt:] == list(ran.best)


def test_penalties_are_capped_where_float16_overflows() -> None:
    products, trust = torch.full((1, 12), 80.0), torch.zeros(1)
    assert judged(OperaParams(), products, trust)[0].item() == 50.0
    assert judged(OperaParams(penalty_cap=7.0), products, trust)[0].item() == 7.0
    assert judged(OperaParams(official_fp16=True), products, trust)[0].item() == 65504.0
    assert judged(OperaParams(), products[:, :10], trust)[0].item() == 0.0  # which the span decides


def test_a_column_without_weight_is_never_the_one() -> None:
    assert judged(OperaParams(), torch.tensor([[-torch.inf, -200.0, -300.0]]), torch.zeros(1))[1].item() == 1


def test_spans_are_placed_in_the_prompt() -> None:
    def placed(prompt: StubPrompt, **own: Any) -> Any:
        setting = METHOD.resolve(OperaParams(**own), StubVocabulary())
        return METHOD.at_prompt(setting, prompt).trusted

    assert placed(StubPrompt(5)) == ((1, 5),)
    assert placed(StubPrompt(1)) == ()
    assert placed(StubPrompt(9), span=[(-4, -1), (0, 2)]) == ((0, 2), (5, 8))
    with pytest.raises(DecodingError) as caught:
        placed(StubPrompt(5), span=[(2, 9)])
    assert caught.value.param.startswith("span")


@pytest.mark.parametrize(
    ("own", "field"),
    [({"candidates": 1, "beams": 1}, "candidates"), ({"beams": 6}, "candidates"), ({"threshold": 0}, "threshold")],
    ids=str,
)
def test_bad_parameters_are_named(own: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        OperaParams(**own)


def test_one_beam_draws_of_its_candidates() -> None:
    """A form of our own: by logits less penalties over the temperature, with the request's numbers alone."""
    case, loops = CASES["plain1"], loop("plain1")
    start, end = case["image"]

    def run(temperature: float, *seeds: int, num: int = 18) -> list[Text]:
        params = params_of(case, beams=1, official_fp16=False, temperature=temperature)
        setting = OperaSetting(**params.model_dump(), trusted=((start, end + 1),))
        return [ran.best for ran in loops.run_all(METHOD, [Asked(setting, case["prompt"], num, seed=s) for s in seeds])]

    together = run(1.0, *range(6))
    assert run(1e-3, 3) == run(0, 0) and len(set(together)) > 3  # where it is cold, the best is all that is left
    assert run(1.0, 3) == together[3:4]
    candidates = set(loops.see([case["prompt"]]).logits[0].topk(params_of(case).candidates).indices.tolist())
    first = {text[0] for text in run(100.0, *range(40), num=1)}
    assert first == candidates  # and however hot, nothing else


def test_one_beam_that_draws_goes_back_and_says_something_else() -> None:
    case, loops, num = CASES["roll0"], loop("roll0"), 0
    start, end = case["image"]
    for seed in range(4):
        params = params_of(case, beams=1, official_fp16=False, temperature=0.3, threshold=1, switch_length=2)
        setting = OperaSetting(**params.model_dump(), trusted=((start, end + 1),))
        ran = loops.run_all(METHOD, [Asked(setting, case["prompt"], case["max_new_tokens"], seed=seed)])[0]
        num += ran.count("rollbacks")
        for index, decision in enumerate(ran.decisions):
            if decision.facts:
                place, left = decision.facts["back_to"], ran.texts[index][0]
                assert ran.texts[index + 2][0][:place] == left[:place] and ran.texts[index + 2][0][place] != left[place]
    assert num > 0


def test_a_place_where_nothing_was_chosen_yet_is_none_to_go_back_to() -> None:
    past = Retrospection(OperaParams(beams=1, candidates=2, threshold=1, switch_length=1))
    for place, column in enumerate((0, 1, 1)):  # the second time with the token before the one that is tried
        assert past.look([column]) is None
        past.choose(place, [Candidate(0, place, 0.0)])
    assert past.look([1]) == 2 and past.rejected == {2: {(0, 2)}}


def test_a_draw_follows_its_distribution() -> None:
    random, logits = torch.Generator().manual_seed(1), torch.tensor([0.0, -torch.inf, 1.0, 2.0, -torch.inf])
    found = Counter(int(draw(logits, random)) for _ in range(4000))
    assert found.keys() == {0, 2, 3}
    for token, share in enumerate(logits.softmax(0).tolist()):
        assert found[token] / 4000 == pytest.approx(share, abs=0.03)


def test_several_beams_draw_nothing() -> None:
    with pytest.raises(ValidationError, match="draw nothing"):
        OperaParams(temperature=0.5)
    assert OperaParams(temperature=0.5, beams=1).temperature == 0.5

"""KCTS against the authors' recorded visits and outputs, and what a tree search owes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decodings import golden
from search_loop import Asked, Loop, Seen
from torch import Tensor

from whipstaff.decoding.search import kcts
from whipstaff.decoding.search.kcts import Kcts, KctsParams
from whipstaff.decoding.search.search import SearchFacts

SAID, TENSORS = golden("kcts")
TREES = {case["id"]: case for case in SAID["cases"] if case["kind"] == "tree search"}
METHOD, EOS = Kcts(), 1
EYE = {"classifier": {"weight": torch.eye(2)}}


class Table(Loop):
    """A model whose logits and classifier look at the last token alone."""

    def __init__(self, logits: Tensor, values: Tensor, penalised: Sequence[int] = (), penalty: float = 1.0) -> None:
        super().__init__(None)
        self.logits, self.values, self.computed = logits, values, 0
        self.penalised, self.penalty = penalised, penalty

    def see(self, texts: Sequence[Sequence[int]]) -> Seen:
        self.computed += len(texts)
        last = torch.tensor([text[-1] for text in texts])
        good = self.values[last]
        hidden = torch.stack([1 - good, good], 1).log()  # of which an identity makes `good` again
        logits = self.logits[last].clone()
        for row, text in enumerate(texts):
            for token in set(self.penalised) - set(text[len(self.penalised) :]):
                logits[row, token] *= 1 / self.penalty if logits[row, token] > 0 else self.penalty
        return Seen(logits, hidden, torch.zeros(len(texts), max(map(len, texts))))


def table(name: str) -> Table:
    """Its prompt is a decoder's, whose tokens the authors penalise, too; of an answer's own the search does it."""
    case = TREES[name]
    penalised = case["prompt"], case["repetition_penalty"]
    return Table(TENSORS[f"{name}.lm_table"], TENSORS[f"{name}.value_table"], *penalised)


def asked(name: str, **own: Any) -> Asked:
    case = TREES[name]
    params = {
        "classifier": "c",
        "k": case["top_k"],
        "simulations": case["num_simulations"],
        "exploration": case["c"],
        "repetition_penalty": case["repetition_penalty"],
        **own,
    }
    return Asked(KctsParams(**params), case["prompt"], case["tokens_to_generate"], [EOS], EYE)


@pytest.mark.parametrize("name", TREES)
def test_tokens_and_visits_are_the_recorded_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, roots = TREES[name], []
    say: Any = kcts._Tree._say

    def spy(tree: Any) -> bool:
        roots.append([list(tree.root.tokens), list(tree.root.counts)])
        is_done: bool = say(tree)
        return is_done

    monkeypatch.setattr(kcts._Tree, "_say", spy)
    ran = table(name).run_all(METHOD, [asked(name)])[0]
    assert list(ran.best) == case["output"]
    assert roots == case["root_actions_and_visits"]
    said = [one for decision in ran.decisions for one in decision.facts.get("said", [])]
    assert [one["token"] for one in said] == case["output"]
    scores = TENSORS[f"{name}.value_table"][case["output"]].tolist()
    assert [one["classifier"] for one in said] == pytest.approx(scores, abs=1e-6)
    assert [one["visits"] for one in said] == [max(counts) for _, counts in case["root_actions_and_visits"]]
    assert ran.hypotheses[0].score == pytest.approx(scores[-1], abs=1e-6)


@pytest.mark.parametrize("own", [{"exploration": 0.0}, {"simulations": 3}, {"k": 1}, {"temperature": 0.1}], ids=str)
def test_whatever_is_left_out_is_missed(own: dict[str, Any]) -> None:
    assert list(table("mcts0").run_all(METHOD, [asked("mcts0", **own)])[0].best) != TREES["mcts0"]["output"]


def test_the_penalty_is_on_the_answers_own_tokens() -> None:
    outputs = [list(table("mcts1").run_all(METHOD, [asked("mcts1", repetition_penalty=r)])[0].best) for r in (1.0, 1e2)]
    assert outputs[0] == TREES["mcts1"]["output"] != outputs[1]


def test_the_tree_is_kept() -> None:
    """A pass per simulation, and one for the prompt: nothing below a new root is computed again."""
    loop = table("mcts0")
    ran = loop.run_all(METHOD, [asked("mcts0")])[0]
    assert loop.computed == len(ran.decisions) == 1 + 50 * 6
    assert [decision.settled for decision in ran.decisions[:-1]] == sorted(d.settled for d in ran.decisions[:-1])


def test_a_token_that_ends_the_answer_ends_it() -> None:
    """Walked to again and again, it costs nothing more."""
    logits = torch.zeros(6, 6)
    logits[:, EOS] = 5.0
    loop = Table(logits, torch.full((6,), 0.3).index_fill(0, torch.tensor([EOS]), 0.9))
    ran = loop.run(METHOD, KctsParams(classifier="c", simulations=40, exploration=0.1), [0], 8, [EOS], EYE)
    assert ran.hypotheses[0].tokens == (EOS,) and ran.hypotheses[0].finish_reason == "stop"
    assert loop.computed < 20


def test_the_classifier_decides() -> None:
    """Between two tokens that the model finds alike."""
    for good in (3, 4):
        values = torch.full((6,), 0.1).index_fill(0, torch.tensor([good]), 0.9)
        logits = torch.full((6, 6), -9.0)
        logits[:, 3:5] = 2.0
        ran = Table(logits, values).run(METHOD, KctsParams(classifier="c", repetition_penalty=1), [0], 3, [], EYE)
        assert ran.best == (good,) * 3 and ran.hypotheses[0].finish_reason == "length"


def test_no_text_is_longer_than_there_is_room() -> None:
    params = KctsParams(classifier="c", simulations=30)
    search = METHOD.start(params, SearchFacts(1, 2, frozenset(), EYE, room=3))
    loop, longest = table("mcts0"), 0
    texts: list[tuple[int, ...]] = [()]
    generator = torch.Generator()
    while True:
        (decision,) = loop.step([search], [[0]], [texts], [generator], [False])
        if decision.hypotheses:
            break
        texts = [(*texts[one.source][: one.keep], *one.tokens) for one in decision.living]
        longest = max(longest, len(texts[0]))
    assert longest == 3 and len(decision.hypotheses[0].tokens) == 2


def test_what_is_banned_is_no_child() -> None:
    logits = torch.full((6, 6), -torch.inf)
    logits[:, 4] = 0.0
    ran = Table(logits, torch.full((6,), 0.5)).run(METHOD, KctsParams(classifier="c"), [0], 2, [], EYE)
    assert ran.best == (4, 4)


def test_a_bias_counts() -> None:
    params, text = KctsParams(classifier="c", simulations=1), table("mcts0")
    head = {"classifier": {"weight": torch.zeros(2, 2), "bias": torch.tensor([0.0, 2.0])}}
    ran = text.run(METHOD, params, [0], 1, [], head)
    assert ran.hypotheses[0].score == pytest.approx(1 / (1 + torch.tensor(-2.0).exp().item()))

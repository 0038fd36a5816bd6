"""Searches that have to end before they like: each comes to the best that it has."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from search_loop import Asked, Loop, Ran

from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.search.beam_search import BeamSearch, BeamSearchParams
from whipstaff.decoding.search.kcts import Kcts
from whipstaff.decoding.search.opera import Opera

from .test_beam_search import EOS, model_that_ends, prompts
from .test_kcts import TREES, table
from .test_kcts import asked as asked_of_kcts
from .test_opera import asked as asked_of_opera
from .test_opera import loop as opera_loop

LENGTH = 7
BEAMS: dict[str, dict[str, Any]] = {
    "beams": {},
    "fewer": {"num_beams": 2, "length_penalty": 0.0},
    "vLLM's": {"scoring": "vllm"},
    "groups": {"num_beam_groups": 2, "diversity_penalty": 0.5},
}


@pytest.mark.parametrize("own", BEAMS.values(), ids=BEAMS)
def test_beams_that_are_stopped_say_what_they_would_say_at_their_last_token(own: dict[str, Any]) -> None:
    loop, params, reasons = Loop(model_that_ends(2.5)), BeamSearchParams(**own), set[str]()
    for num in range(1, LENGTH):
        stopped, short = (
            loop.run_all(BeamSearch(), [Asked(params, text, most, [EOS], num_steps=steps) for text in prompts(6)])
            for most, steps in ((LENGTH, num), (num, None))
        )
        for ours, theirs in zip(stopped, short, strict=True):
            assert [one.tokens for one in ours.hypotheses] == [one.tokens for one in theirs.hypotheses]
            assert [one.score for one in ours.hypotheses] == pytest.approx([one.score for one in theirs.hypotheses])
            reasons |= {one.finish_reason for one in ours.hypotheses}
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("name", ["plain0", "roll0"])
def test_opera_is_stopped(name: str) -> None:
    """Also where it has just gone back, and before it comes forward again."""
    loop, whole = opera_loop(name), asked_of_opera(name)
    ran = loop.run_all(Opera(), [whole])[0]
    backs = [at for at, decision in enumerate(ran.decisions, 1) if decision.counts.get("rollbacks")]
    assert bool(backs) == (name == "roll0")
    nums = [3, 8, *(at + more for at in backs[:1] for more in (0, 1))]
    for num, stopped in zip(nums, _stopped(loop, Opera(), whole, nums), strict=True):
        (answer,) = stopped.hypotheses
        assert answer.finish_reason == "length" and answer.tokens in ran.texts[num]
        if num < min([len(ran.decisions), *backs]):
            short = loop.run_all(Opera(), [whole._replace(max_tokens=num)])[0]
            assert answer.tokens == short.best and answer.score == pytest.approx(short.hypotheses[0].score)


def test_a_tree_says_one_token_more() -> None:
    name = next(iter(TREES))
    whole = asked_of_kcts(name)
    ran = table(name).run_all(Kcts(), [whole])[0]
    nums, lengths = [len(ran.decisions) * part // 8 for part in (1, 3, 6)], set()
    for stopped in _stopped(table(name), Kcts(), whole, nums):
        said = stopped.decisions[-2].settled
        assert stopped.best[:-1] == ran.best[:said] and len(stopped.best) == said + 1
        lengths.add(len(stopped.best))
    assert len(lengths) > 1


def _stopped(loop: Loop, method: Any, asked: Asked, nums: Sequence[int]) -> Sequence[Ran]:
    """The same request, stopped after so many steps."""
    return loop.run_all(method, [asked._replace(num_steps=num) for num in nums])


STOPPED: dict[str, Callable[..., None]] = {
    "beam_search": test_beams_that_are_stopped_say_what_they_would_say_at_their_last_token,
    "opera": test_opera_is_stopped,
    "kcts": test_a_tree_says_one_token_more,
}


def test_every_search_is_stopped_here() -> None:
    assert STOPPED.keys() == {name for name, method in METHODS.items() if method.stage == "search"}

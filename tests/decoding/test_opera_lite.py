"""OPERA's penalty on one sequence: against a plain loop over whole attention matrices, row after row."""

from typing import Any

import pytest
import torch
from decodings import StubPrompt
from reference import opera_lite as reference
from torch import Tensor

from whipstaff.decoding.method import DecodingError
from whipstaff.decoding.methods.opera_lite import OperaLite, OperaLiteParams
from whipstaff.decoding.rows import Rows

METHOD, VOCAB, NUM_PROMPT = OperaLite(), 30, 5
CASES: list[dict[str, Any]] = [
    {},
    {"scale_factor": 8.0, "switch_length": 3},
    {"scale_factor": 3.0, "switch_length": 0, "penalty_weight": 2e5, "candidates": 2},
    {"scale_factor": 20.0, "history": 4, "penalty_cap": 3.0},
    {"span": [(1, 3), (4, 5)], "candidates": 30, "penalty_weight": 0.5},
    {"span": [(0, None)], "switch_length": 1000},
]


def placed(said: dict[str, Any]) -> Any:
    return METHOD.at_prompt(OperaLiteParams(**said), StubPrompt(NUM_PROMPT))


def leaning(num: int, random: torch.Generator) -> Tensor:
    """(num, num) rows of head maxima: they sum to more than 1, and some columns draw them."""
    scores = 2 * torch.randn(3, num, num, generator=random) + 4 * torch.rand(num, generator=random)
    hidden = torch.ones(num, num).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(2).amax(0)


def sort(penalty: float, cap: float) -> str:
    if penalty < 0 or penalty == cap:
        return "reward" if penalty < 0 else "cap"
    return "penalty" if penalty > 1e-4 else "none"


def test_a_loop_over_whole_attention_matrices() -> None:
    """Requests in one batch, which are at different places of their texts."""
    random, steps = torch.Generator().manual_seed(4), 24
    settings = [placed(said) for said in CASES]
    late = [2 * row for row in range(len(CASES))]  # steps by which each is behind the others
    squares = [leaning(NUM_PROMPT + steps, random) for _ in CASES]
    state = torch.full((len(CASES), METHOD.state_size), torch.nan)
    kinds = set()
    for step in range(steps):
        here = [row for row in range(len(CASES)) if step >= late[row]]
        num = [step - late[row] for row in here]
        width = NUM_PROMPT + max(num)
        attention = torch.stack([squares[row][NUM_PROMPT + n - 1][:width] for row, n in zip(here, num, strict=True)])
        logits = 3 * torch.randn(len(here), VOCAB, generator=random)
        rows = Rows(logits.clone(), [NUM_PROMPT] * len(here), num, attention=attention, state=state[here])
        found = METHOD.rewrite(rows, [settings[row] for row in here])
        assert rows.state is not None
        state[here] = rows.state
        for place, (row, n) in enumerate(zip(here, num, strict=True)):
            square = squares[row][: NUM_PROMPT + n, : NUM_PROMPT + n]
            text = [line[: index + 1] for index, line in enumerate(square.tolist())]
            wanted = reference.penalty(text, NUM_PROMPT, settings[row], settings[row].span)
            assert float(rows.facts["penalty"][place]) == pytest.approx(wanted, rel=1e-3, abs=1e-6), (row, n)
            expected = reference.rewrite(logits[place].tolist(), wanted, settings[row].candidates)
            torch.testing.assert_close(found[place], torch.tensor(expected), rtol=1e-3, atol=1e-4)
            kinds.add(sort(wanted, settings[row].penalty_cap))
    assert kinds == {"none", "reward", "cap", "penalty"}


def test_columns_leave_after_512_tokens() -> None:
    """The products are kept in a ring: one column after the other draws half of all attention."""
    setting = placed({"scale_factor": 2.0, "switch_length": 0, "penalty_weight": 1e6})
    state = torch.full((1, METHOD.state_size), torch.nan)
    leaning = []
    for num in range(1, 1400):
        column = 5 if num < 700 else 700
        row = torch.full((1, NUM_PROMPT + num), 0.5 / (NUM_PROMPT + num - 1))
        if num > column:
            row[0, NUM_PROMPT + column] = 0.5
        METHOD.rewrite(rows := Rows(torch.zeros(1, VOCAB), [NUM_PROMPT], [num], attention=row, state=state), [setting])
        if float(rows.facts["penalty"][0]) == pytest.approx(1e6 * 1e-7, rel=1e-3):
            leaning.append(num)
    assert leaning == [*range(6, 5 + 513), *range(701, 700 + 513)]


def test_a_product_that_would_overflow_is_capped() -> None:
    state = torch.full((1, METHOD.state_size), torch.nan)
    setting = placed({"scale_factor": 1e6, "switch_length": 0})
    for n in range(40):
        rows = Rows(torch.zeros(1, VOCAB), [NUM_PROMPT], [n], attention=torch.ones(1, NUM_PROMPT + n), state=state)
        found = METHOD.rewrite(rows, [setting])
        assert found.isfinite().all()
    assert float(rows.facts["penalty"][0]) == setting.penalty_cap


def test_what_nobody_looks_at_costs_nothing() -> None:
    """A share of 0 ends a column for good."""
    state, setting = torch.full((1, METHOD.state_size), torch.nan), placed({"switch_length": 0})
    for n in range(6):
        attention = torch.zeros(1, NUM_PROMPT + n)
        attention[:, 0] = 1.0
        rows = Rows(torch.zeros(1, VOCAB), [NUM_PROMPT], [n], attention=attention, state=state)
        assert torch.equal(METHOD.rewrite(rows, [setting]), torch.zeros(1, VOCAB))


def test_a_span_outside_of_the_prompt_is_refused() -> None:
    with pytest.raises(DecodingError) as caught:
        placed({"span": [(0, 9)]})
    assert caught.value.param.startswith("span")

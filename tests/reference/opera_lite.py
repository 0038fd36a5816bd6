"""OPERA's penalty on one sequence, as a loop over attention that reads like the formula."""

import math
from collections.abc import Sequence
from typing import Any

Matrix = Sequence[Sequence[float]]


def penalty(rows: Matrix, num_prompt: int, params: Any, span: Sequence[tuple[int, int]]) -> float:
    """Of the next token.

    Args:
        rows: row i says how much token i of the text, prompt included, looks at those up to itself: the largest
            probability among the heads.
        span: [start, end) positions.
    """
    shares = [[value / math.fsum(row) for value in row] for row in rows]
    num = len(rows) - num_prompt
    if num < params.switch_length:
        on_span = math.fsum(shares[-1][j] for start, end in span for j in range(start, end))
        return -params.penalty_weight * on_span
    largest = 0.0
    for j in range(max(0, num - params.history), num):
        product = 1e-7
        for i in range(j, num):
            product *= params.scale_factor * shares[num_prompt + i][num_prompt + j]
        largest = max(largest, product)
    return min(params.penalty_cap, params.penalty_weight * largest)


def rewrite(row: Sequence[float], amount: float, candidates: int) -> list[float]:
    """The row of logits whose best tokens lose the penalty; of equal ones the first."""
    best = sorted(range(len(row)), key=lambda v: (-row[v], v))[:candidates]
    return [value - amount if v in best and value > -math.inf else value for v, value in enumerate(row)]

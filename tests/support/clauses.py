"""Random where clauses and plans, and the positions that they name by definition."""

import json
from typing import Any

from hypothesis import strategies as st
from pydantic import ValidationError

from whipstaff.steering.plan import Edit
from whipstaff.steering.where import Where

PROMPT_WINDOW = st.tuples(st.integers(-12, 12), st.none() | st.integers(-12, 12))
GENERATION_WINDOW = st.tuples(st.integers(0, 12), st.none() | st.integers(0, 14))
HORIZON = 40


def windows(window: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(["all", "none"]) | st.lists(window, max_size=4)


REGION = st.fixed_dictionaries(
    {},
    optional={
        "prompt": windows(PROMPT_WINDOW),
        "generation": windows(GENERATION_WINDOW),
        "middle": st.lists(PROMPT_WINDOW, min_size=1, max_size=3),
        "tokens": st.just([3, 4]),
    },
)
CLAUSE = st.builds(
    lambda region, hole: region | ({} if hole is None else {"exclude": hole}), REGION, st.none() | REGION
)


def selected(region: dict[str, Any], prompt_len: int, is_named: bool = False) -> set[int]:
    """The positions below HORIZON that a region names: slices of the prompt's and of the generation's positions; all
    of them, should their tokens be the named ones and the region name them."""
    found: set[int] = set(range(HORIZON)) if is_named and "tokens" in region else set()
    parts = {"prompt": range(prompt_len), "generation": range(prompt_len, HORIZON)}
    for name, positions in parts.items():
        chosen = region.get(name, "none")
        for start, end in [(0, None)] if chosen == "all" else [] if chosen == "none" else chosen:
            found |= set(positions[start:end])
    for start, end in region.get("middle", ()):
        offsets = ((position, position - prompt_len // 2) for position in range(prompt_len))
        found |= {position for position, offset in offsets if start <= offset and (end is None or offset < end)}
    return found


def valid(clause: dict[str, Any]) -> Where | None:
    try:
        return Where.model_validate(clause)
    except ValidationError:
        return None


PLANNED = st.builds(
    lambda digest, scale, clause: (Edit(digest, json.dumps({"scale": scale}), None), clause),
    st.sampled_from("abc"),
    st.sampled_from([1.0, -2.0]),
    CLAUSE,
)

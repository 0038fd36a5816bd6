"""Stretches of rows are placed between a prompt's tokens, and windows move with them."""

from hypothesis import given
from hypothesis import strategies as st

from whipstaff.steering.inserts import Wanted, place_inserts, shift


@given(
    st.lists(st.integers(0, 9), max_size=12),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=5),
    st.sets(st.integers(0, 9)),
)
def test_what_is_inserted_can_be_taken_out(ids: list[int], chosen: list[tuple[int, int]], avoid: set[int]) -> None:
    wanted = [Wanted(str(i), num, min(before, len(ids))) for i, (num, before) in enumerate(chosen)]
    expanded, inserts = place_inserts(ids, wanted, avoid)
    rows = {
        position: insert.digest for insert in inserts for position in range(insert.start, insert.start + insert.num)
    }
    assert [token for position, token in enumerate(expanded) if position not in rows] == ids
    assert len(expanded) == len(ids) + len(rows)
    assert not {expanded[position] for position in rows} & avoid
    for digest, num, before in wanted:
        (insert,) = [insert for insert in inserts if insert.digest == digest]
        assert insert.num == num
        assert sum(position not in rows for position in range(insert.start)) == before
    order = [(wanted[int(insert.digest)].before, int(insert.digest)) for insert in inserts]
    assert order == sorted(order)
    real = [position for position in range(len(expanded)) if position not in rows]
    for start in range(len(ids)):
        for end in range(start + 1, len(ids) + 1):
            assert shift((start, end), inserts) == (real[start], real[end - 1] + 1)


def test_placeholders_are_tokens_of_the_prompt() -> None:
    assert place_inserts([5, 6], [Wanted("a", 2, 1)])[0] == [5, 5, 5, 6]
    assert place_inserts([5, 6], [Wanted("a", 2, 1)], {5})[0] == [5, 6, 6, 6]
    assert place_inserts([5, 6], [Wanted("a", 1, 0)], {5, 6, 0})[0] == [1, 5, 6]

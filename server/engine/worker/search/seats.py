"""Which sequence goes on in which seat: as many as can stay where they are, so that nothing has to move."""

from collections.abc import Sequence

from whipstaff.decoding.search.search import Continuation
from whipstaff.server.engine.searches import Placed, SearchStep


def seated(living: Sequence[Continuation], lengths: Sequence[int], step: SearchStep) -> list[Placed]:
    """Find seats for those that live on.

    One that goes on from each sequence stays in its seat: the first that only gets one token more, or else the first.
    The others take seats in which nothing lives any more. The primary's is always taken, since its request is the one
    that vLLM's front end hears of.

    Args:
        lengths: tokens that each living sequence has generated.

    Raises: ValueError where a method asks for what cannot be.
    """
    if len(living) > len(step.seats):
        raise ValueError(f"{len(living)} sequences were to live, and the search may have {len(step.seats)}")
    for one in living:
        if not 0 <= one.keep <= lengths[one.source]:
            raise ValueError(f"{one.keep} tokens were to be kept of {lengths[one.source]}")
        if one.keep + len(one.tokens) > step.room:
            raise ValueError(
                f"a sequence was to have {one.keep + len(one.tokens)} tokens, and has room for {step.room}"
            )
    seats: list[str | None] = [None] * len(living)
    children: dict[int, list[int]] = {}
    for index, one in enumerate(living):
        children.setdefault(one.source, []).append(index)
    for source, indices in children.items():
        grows = (index for index in indices if _grows(living[index], lengths[source]))
        seats[next(grows, indices[0])] = step.living[source]
    if step.seats[0] not in seats:
        seats[seats.index(None) if None in seats else 0] = step.seats[0]
    free = iter(dict.fromkeys(seat for seat in (*step.living, *step.seats) if seat not in seats))
    return [
        Placed(next(free) if seat is None else seat, step.living[one.source], one.keep, one.tokens)
        for seat, one in zip(seats, living, strict=True)
    ]


def _grows(one: Continuation, length: int) -> bool:
    return one.keep == length and len(one.tokens) == 1

"""The rule adapter's biases for one row: token -> what is added."""

from collections.abc import Mapping, Sequence

LLAMA2 = {
    29966: -4,
    529: -4,
    29989: -4,
    306: -5,
    29902: -5,
    5618: -5,
    1334: -3,
    881: -6,
    334: 1,
    448: 1,
    1678: 1,
    396: 1,
    444: 1,
    13: 1,
    29991: 1,
}


def biases(
    since_user: Sequence[int], num_generated: int, style: Mapping[int, float], ends: Sequence[int], holds: bool
) -> dict[int, float]:
    found = dict(style)
    if 0 < num_generated < 250 or (holds and num_generated >= 250):
        for end in ends:
            found[end] = found.get(end, 0.0) + 15 * min(num_generated, 250) / 250
    for token in set(since_user):
        found[token] = found.get(token, 0.0) - 1.5
    return found

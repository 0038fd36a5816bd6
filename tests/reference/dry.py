"""DRY for one row, as llama.cpp states it: look for every earlier end of the text's last n tokens, by comparing."""

import math
from collections.abc import Sequence


def repeats(
    text: Sequence[int], allowed: int, last_n: int, breakers: set[int], phrases: Sequence[tuple[int, ...]]
) -> dict[int, int]:
    """Token -> the length of the longest repetition that it would carry on."""
    text = list(text if last_n < 0 else text[len(text) - min(last_n, len(text)) :])
    free = since_breaker(text, breakers, phrases)
    longest: dict[int, int] = {}
    for end in range(len(text) - 1):  # an earlier occurrence ends here
        n = 0
        while n <= end and text[end - n] == text[len(text) - 1 - n]:
            n += 1
        n = min(n, free)
        follower = text[end + 1]
        if n >= allowed and follower not in breakers:
            longest[follower] = max(longest.get(follower, 0), n)
    return longest


def since_breaker(text: Sequence[int], breakers: set[int], phrases: Sequence[tuple[int, ...]]) -> int:
    """How many of the last tokens stand after the newest breaker."""
    for start in reversed(range(len(text))):
        here = [1] if text[start] in breakers else []
        here += [len(phrase) for phrase in phrases if tuple(text[start : start + len(phrase)]) == phrase]
        if here:
            return len(text) - start - max(here)
    return len(text)


def penalty(length: int, multiplier: float, base: float, allowed: int) -> float:
    """Bounded, where llama.cpp bounds the exponent instead."""
    if multiplier == 0:
        return 0.0
    power = (length - allowed) * math.log(base) + math.log(multiplier)
    return math.exp(min(power, math.log(1e9)))

"""What answers are worth, what an edit costs, and whether a difference is noise. Scores are named as lm_eval's."""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Likelihoods(NamedTuple):
    """Of one question's answers: sums of log-probabilities, and how many characters each has."""

    log_p: tuple[float, ...]
    characters: tuple[int, ...]
    right: tuple[int, ...]  # which of them are right
    best: int  # the one that counts as best


def multiple_choice(found: Likelihoods) -> dict[str, float]:
    """mc1: the best answer is likelier than every wrong one; mc2: the right answers' share of all probability; acc: the
    likeliest answer is right; acc_norm: the same per character."""
    wrong = [value for index, value in enumerate(found.log_p) if index not in found.right]
    most = max(found.log_p)
    shares = [math.exp(value - most) for value in found.log_p]
    likeliest = max(range(len(found.log_p)), key=lambda index: found.log_p[index])
    normed = max(range(len(found.log_p)), key=lambda index: found.log_p[index] / max(found.characters[index], 1))
    return {
        "mc1": float(not wrong or found.log_p[found.best] > max(wrong)),
        "mc2": sum(shares[index] for index in found.right) / sum(shares),
        "acc": float(likeliest in found.right),
        "acc_norm": float(normed in found.right),
    }


def normalised(text: str) -> list[str]:
    """SQuAD's: lower case, no punctuation, no articles."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


def generated(said: str, wanted: str, pattern: str | None = None) -> dict[str, float]:
    """exact_match and f1 of words, contains: the wanted words stand in a row; match: the pattern is found; words."""
    ours, theirs = normalised(said), normalised(wanted)
    common = sum((Counter(ours) & Counter(theirs)).values())
    f1 = 2 * common / (len(ours) + len(theirs)) if common else float(not ours and not theirs)
    found = {"exact_match": float(ours == theirs), "f1": f1}
    found["contains"] = float(f" {' '.join(theirs)} " in f" {' '.join(ours)} ")
    if pattern is not None:
        found["match"] = float(re.search(pattern, said) is not None)
    triples = list(zip(ours, ours[1:], ours[2:], strict=False))
    found["rep_3"] = 1 - len(set(triples)) / len(triples) if triples else 0.0
    found["words"] = float(len(said.split()))
    return found


def least_kl(plain: Mapping[str, float], other: Mapping[str, float]) -> float:
    """KL(plain || other) of one token in nats, at least: of the tokens that both list, and one bucket of all others."""
    both = plain.keys() & other.keys()
    p, q = ([math.exp(side[token]) for token in both] for side in (plain, other))
    rest_p, rest_q = max(1 - sum(p), 0.0), max(1 - sum(q), 1e-12)
    found = sum(a * (math.log(a) - math.log(max(b, 1e-30))) for a, b in zip(p, q, strict=True) if a > 0)
    return max(found + (rest_p * math.log(rest_p / rest_q) if rest_p > 0 else 0.0), 0.0)


class Difference(NamedTuple):
    """Of a mean from that of plain answers, with a 95 % interval over groups."""

    mean: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        return self.low <= 0 <= self.high


def difference(
    plain: Sequence[float], other: Sequence[float], groups: Sequence[str], seed: int = 0, num: int = 2000
) -> Difference:
    """Paired by row; whole groups are drawn with replacement."""
    change = np.array(other, dtype=np.float64) - np.array(plain, dtype=np.float64)
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    at = np.array([names[name] for name in groups])
    sums, counts = np.bincount(at, change), np.bincount(at).astype(np.float64)
    draws = np.random.RandomState(seed).randint(0, len(names), (num, len(names)))
    means: NDArray[np.float64] = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(change.mean()), float(low), float(high))

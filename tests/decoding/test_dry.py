"""DRY against a plain search for repetitions, over random texts of few tokens."""

import random
from collections.abc import Sequence

import pytest
import torch
from decodings import VOCAB, StubVocabulary
from reference import dry as reference
from torch import Tensor

from whipstaff.decoding.methods.dry import Dry, DryParams, DrySetting
from whipstaff.decoding.rows import Rows

METHOD = Dry()


def setting(breakers: Sequence[int] = (), phrases: Sequence[tuple[int, ...]] = (), **own: float) -> DrySetting:
    params = DryParams(**own).model_dump(exclude={"method", "sequence_breakers"})
    return DrySetting(**params, breakers=tuple(breakers), phrases=tuple(phrases))


def penalties(texts: Sequence[Sequence[int]], settings: Sequence[DrySetting]) -> Tensor:
    """(R, V) what is taken from each token."""
    width = max(map(len, texts)) + 2
    tokens = torch.tensor([[*text, *[-1] * (width - len(text))] for text in texts])
    rows = Rows(torch.zeros(len(texts), VOCAB), [1] * len(texts), [len(text) - 1 for text in texts], tokens)
    return -METHOD.rewrite(rows, settings)


def expected(text: Sequence[int], one: DrySetting) -> list[float]:
    found = reference.repeats(text, one.allowed_length, one.penalty_last_n, set(one.breakers), one.phrases)
    own = (one.multiplier, one.base, one.allowed_length)
    return [reference.penalty(found[v], *own) if v in found else 0.0 for v in range(VOCAB)]


@pytest.mark.parametrize("seed", range(6))
def test_random_texts(seed: int) -> None:
    """Two or three kinds of tokens, so that runs are long; windows, breakers and phrases of all sorts."""
    draw, texts, settings = random.Random(seed), [], []
    for _ in range(30):
        kinds = draw.choice([2, 3, 5])
        texts.append([draw.randrange(kinds) for _ in range(draw.randrange(1, 70))])
        settings.append(
            setting(
                breakers=draw.choice([(), (), (0,), (4, 1)]),
                phrases=draw.choice([(), ((0, 1),), ((1, 0, 0), (0, 1))]),
                allowed_length=draw.choice([0, 1, 2, 5]),
                penalty_last_n=draw.choice([-1, -1, 0, 1, 10, 300]),
                base=draw.choice([1.0, 1.1, 1.75]),
            )
        )
    found = penalties(texts, settings)
    for row, (text, one) in enumerate(zip(texts, settings, strict=True)):
        torch.testing.assert_close(found[row], torch.tensor(expected(text, one)), atol=1e-5, rtol=1e-4)


def test_a_worked_case() -> None:
    """a b c c b c y a b c: c would make four of three, y three of two, b two of one."""
    a, b, c, y = 3, 4, 5, 6
    found = penalties([[a, b, c, c, b, c, y, a, b, c]], [setting(multiplier=1.0, base=2.0, allowed_length=1)])
    assert {v: float(x) for v, x in enumerate(found[0]) if x} == {c: 4.0, y: 2.0, b: 1.0}


@pytest.mark.parametrize("length", [120, 500])
@pytest.mark.parametrize("base", [1.0, 1.001, 1.02, 1.75, 100.0])
def test_long_repetitions_are_bounded(length: int, base: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared in one go, and block by block beside other texts."""
    texts = [[3] * length, [3, 4, 5] * (length // 3), [3, *[4] * 15, *[5] * 17] * (length // 33)]
    one, wanted = setting(base=base), torch.tensor([expected(text, setting(base=base)) for text in texts])
    for at_once in (1 << 26, 1):
        monkeypatch.setattr("whipstaff.decoding.methods.dry._AT_ONCE", at_once)
        torch.testing.assert_close(penalties(texts, [one] * 3), wanted, atol=1e-5, rtol=2e-3)


def test_a_text_of_one_token() -> None:
    rows = Rows(torch.zeros(1, VOCAB), [1], [0], torch.tensor([[3]]))
    assert not METHOD.rewrite(rows, [setting(allowed_length=0)]).any()


def test_a_breaker_ends_runs_and_is_not_penalised() -> None:
    text = [3, 4, 5, 9, 3, 4, 5, 9, 3, 4]
    assert float(penalties([text], [setting()])[0, 5]) > float(penalties([text], [setting(breakers=[9])])[0, 5]) > 0
    assert float(penalties([text[:-3]], [setting(breakers=[9])])[0, 9]) == 0


def test_breakers_become_tokens() -> None:
    """Every token that holds one; and the tokens of one that takes several."""
    words = StubVocabulary({"a": 0, "b": 1, "b\n": 2, "\n": 3, ":": 4})
    found = METHOD.resolve(DryParams(sequence_breakers=["\n", "ab"]), words)
    assert found.breakers == (2, 3) and found.phrases == ((0, 1),)

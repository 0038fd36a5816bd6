"""Mixes of streams: rows of different methods side by side, against sums written out in plain torch."""

import json
import math

import pytest
import torch
from torch import Tensor

from whipstaff.decoding.mix import MAIN, Mix, MixedRow, Stream, Term, Window, added, mix_rows

VOCAB = 30


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def own(mixes: dict[int, Mix]) -> list[MixedRow]:
    """Rows without coupled sequences."""
    return [MixedRow(row, mix, [row]) for row, mix in mixes.items()]


def everywhere(mix: Mix, num_rows: int) -> list[MixedRow]:
    return [MixedRow(row, mix, (row,)) for row in range(num_rows)]


def test_plain_rows_are_untouched_beside_others() -> None:
    base, other = normal(4, VOCAB), normal(4, VOCAB, seed=1)
    mixes = {1: Mix.of({"a": 2.0}), 2: Mix.of({"a": 0.0}), 3: Mix.of({"a": -1.0})}
    result = mix_rows(base, {"a": other}, own(mixes))
    assert torch.equal(result[[0, 2]], base[[0, 2]])
    torch.testing.assert_close(result[[1, 3]], base[[1, 3]] + torch.tensor([[2.0], [-1.0]]) * other[[1, 3]])


def test_the_served_models_logits_are_not_changed() -> None:
    base = normal(2, VOCAB)
    before = base.clone()
    assert mix_rows(base, {"a": base.clone()}, own({0: Mix.of({"a": 1.0})})).data_ptr() != base.data_ptr()
    assert torch.equal(base, before)


def test_what_is_off_reads_nothing() -> None:
    base, broken = normal(2, VOCAB), torch.full((2, VOCAB), torch.nan)
    assert torch.equal(mix_rows(base, {"a": broken}, own(dict.fromkeys((0, 1), Mix.of({"a": 0.0})))), base)


def test_vocabularies_of_other_lengths() -> None:
    """A longer stream is cut; what a shorter one lacks is padding and keeps a sum's base; bans stay bans."""
    base = normal(3, 10)
    base[:, 3] = -torch.inf
    streams = {"longer": normal(3, 14, seed=1), "shorter": normal(3, 8, seed=2)}
    sums = Mix.of({"longer": 1.0, "shorter": -1.0})
    scores = Mix((Term(MAIN, 1.0, True), Term(Stream("shorter"), -1.0, True)))
    result = mix_rows(base, streams, own({0: sums, 1: sums, 2: scores}))
    torch.testing.assert_close(result[:2, :8], (base[:, :8] + streams["longer"][:, :8] - streams["shorter"])[:2])
    assert torch.equal(result[:2, 8:], base[:2, 8:])
    assert torch.isneginf(result[2, 8:]).all() and torch.isneginf(result[:, 3]).all()


def test_log_softmax_and_temperature_of_a_term() -> None:
    base, other = normal(2, VOCAB), normal(2, VOCAB, seed=1)
    mix = Mix((Term(MAIN, 1.0, True), Term(Stream("a"), -0.7, True, 0.5), Term(Stream("a"), 0.1, False, 2.0)))
    result = mix_rows(base, {"a": other}, own({1: mix}))
    expected = base.log_softmax(1) - 0.7 * (other / 0.5).log_softmax(1) + 0.1 * other / 2
    torch.testing.assert_close(result[1], expected[1])
    assert torch.equal(result[0], base[0])


def test_masks_look_at_the_main_stream() -> None:
    base, other = normal(2, VOCAB), normal(2, VOCAB, seed=1)
    masked = Term(MAIN, 1.5, alpha=0.2), Term(MAIN, 1.5, top_p=0.6)
    mixes = {row: Mix((term, Term(Stream("a"), -0.5))) for row, term in enumerate(masked)}
    result = mix_rows(base, {"a": other}, own(mixes))
    close = base[0] >= base[0].max() + math.log(0.2)
    best_first, order = base[1].softmax(0).sort(descending=True)
    likely = torch.zeros(VOCAB, dtype=torch.bool).scatter(0, order, best_first.cumsum(0) - best_first <= 0.6)
    for row, kept in ((0, close), (1, likely)):
        assert torch.equal(result[row] > -torch.inf, kept)
        torch.testing.assert_close(result[row][kept], (1.5 * base - 0.5 * other)[row][kept])


def test_members_are_other_rows_of_the_batch() -> None:
    """Row 1 is the first of a couple whose other prompt is row 3; row 3 itself is not mixed."""
    base = normal(5, VOCAB)
    mix = Mix((Term(MAIN, 2.0), Term(Stream("", 1), -1.0), Term(Stream("a", 1), 0.5)))
    other = normal(5, VOCAB, seed=1)
    result = mix_rows(base, {"a": other}, [MixedRow(1, mix, [1, 3])])
    torch.testing.assert_close(result[1], 2 * base[1] - base[3] + 0.5 * other[3])
    assert torch.equal(result[[0, 2, 3, 4]], base[[0, 2, 3, 4]])


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_may_need_more_models_than_one_pass_takes(masked: bool) -> None:
    """Twenty auxiliary models at once: some rows use many of them, some one, some none."""
    base, weights = normal(3, 40), normal(3, 20, seed=1)
    others = {f"m{k}": normal(3, 40, seed=2 + k) for k in range(20)}
    mixes = {0: Mix.of(dict(zip(others, weights[0].tolist(), strict=True))), 2: Mix.of({"m19": 0.3})}
    if masked:
        mixes = {row: Mix((mix.terms[0]._replace(alpha=0.3), *mix.terms[1:])) for row, mix in mixes.items()}
    result = mix_rows(base, others, own(mixes))
    stacked = torch.stack(list(others.values()))  # (20, 3, 40)
    expected = {0: base[0] + weights[0] @ stacked[:, 0], 2: base[2] + 0.3 * others["m19"][2]}
    for row, mixed in expected.items():
        kept = base[row] >= (base[row].max() + math.log(0.3) if masked else -torch.inf)
        assert torch.equal(result[row] > -torch.inf, kept)
        torch.testing.assert_close(result[row][kept], mixed[kept], atol=1e-4, rtol=1e-5)
    assert torch.equal(result[1], base[1])


def test_several_streams_may_have_a_say() -> None:
    """A token must be plausible in each; where none is, the main stream's best one is left."""
    base = normal(4, VOCAB) / 2
    base[2, :5] += 20.0
    base[3, 5:] += 20.0  # these two share no token
    terms = Term(MAIN, 1.5, top_p=0.7), Term(Stream("", 1), -0.5, top_p=0.8, alpha=0.1)
    result = mix_rows(base, {}, [MixedRow(0, Mix(terms), (0, 1)), MixedRow(2, Mix(terms), (2, 3))])
    inner, outer = base[0].softmax(0), base[1].softmax(0)
    likely = [inner[inner > inner[v]].sum() <= 0.7 and outer[outer > outer[v]].sum() <= 0.8 for v in range(VOCAB)]
    kept = torch.tensor(likely) & (outer >= 0.1 * outer.max())
    assert 1 < kept.sum() < sum(likely) < VOCAB and torch.equal(result[0] > -torch.inf, kept)
    torch.testing.assert_close(result[0][kept], (1.5 * base[0] - 0.5 * base[1])[kept])
    assert (result[2] > -torch.inf).nonzero().flatten().tolist() == [int(base[2].argmax())]


def test_sums_add_up() -> None:
    both = added([Mix.of({"a": 1.0, "b": -1.0}), Mix.of({"b": 0.5})])
    assert both == Mix.of({"a": 1.0, "b": -0.5})
    assert added([]) is None


def test_probabilities_are_averaged() -> None:
    """Beside another kind of row, with a companion, an auxiliary model of a smaller vocabulary, and a banned token."""
    base, other = normal(3, VOCAB), normal(3, VOCAB - 2, seed=1)
    base[0, 4] = -torch.inf
    terms = Term(MAIN, 0.5), Term(Stream("", 1), 0.25), Term(Stream("a"), 0.25, False, 2.0), Term(Stream("a", 1), 0.0)
    averaged = MixedRow(0, Mix(terms, is_probability=True), (0, 2))
    result = mix_rows(base, {"a": other}, [averaged, MixedRow(1, Mix.of({"a": 1.0}), (1,))])
    expected = 0.5 * base[0].softmax(0) + 0.25 * base[2].softmax(0)
    expected[: VOCAB - 2] += 0.25 * (other[0] / 2).softmax(0)
    expected[4] = 0
    torch.testing.assert_close(result[0].exp(), expected)
    torch.testing.assert_close(result[1, : VOCAB - 2], base[1, : VOCAB - 2] + other[1])
    assert torch.equal(result[2], base[2]) and torch.isneginf(result[0, 4])


@pytest.mark.parametrize("num_models", [0, 9])
def test_a_mask_may_look_at_another_stream(num_models: int) -> None:
    """However many models the batch's other rows read."""
    base = normal(3, VOCAB)
    others = {f"m{k}": normal(3, VOCAB, seed=k) for k in range(num_models)}
    mix = Mix((Term(MAIN, -0.5, True), Term(Stream("", 1), 1.5, True, alpha=0.2)))
    result = mix_rows(base, others, [MixedRow(0, Mix.of(dict.fromkeys(others, 1.0)), (0,)), MixedRow(1, mix, (1, 2))])
    kept = base[2] >= base[2].max() + math.log(0.2)
    assert torch.equal(result[1] > -torch.inf, kept)
    torch.testing.assert_close(result[1][kept], (1.5 * base[2].log_softmax(0) - 0.5 * base[1].log_softmax(0))[kept])


def test_sums_add_up_each_with_members_of_its_own() -> None:
    aware = Mix((Term(MAIN, 1.5), Term(Stream("", 1), -0.5)))
    tuned = Mix((Term(MAIN, 1.0), Term(Stream("a", 1), 1.0), Term(Stream("a"), -1.0)))
    both = added([aware, tuned, aware])
    assert both is not None and both.num_companions == 3
    assert both.terms == (
        Term(MAIN, 2.0),
        Term(Stream("", 1), -0.5),
        Term(Stream("a", 2), 1.0),
        Term(Stream("a"), -1.0),
        Term(Stream("", 3), -0.5),
    )
    assert not aware._replace(window=Window(0, 5)).is_sum and not aware._replace(is_probability=True).is_sum


@pytest.mark.parametrize(
    ("window", "gains"),
    [
        (Window(), [1, 1, 1, 1, 1]),
        (Window(2), [0, 0, 1, 1, 1]),
        (Window(1, 3), [0, 1, 1, 0, 0]),
        (Window(0, 4, "linear"), [1, 0.75, 0.5, 0.25, 0]),
        (Window(1, 3, "cosine"), [0, 1, 0.5, 0, 0]),
    ],
)
def test_windows_and_fades(window: Window, gains: list[float]) -> None:
    assert [window.gain(num) for num in range(5)] == pytest.approx(gains)


def test_a_fading_mix_is_between_the_main_stream_and_itself() -> None:
    base = normal(2, VOCAB)
    mix = Mix((Term(MAIN, 3.0), Term(Stream("", 1), -2.0)), window=Window(1, 5, "linear"))
    whole = 3 * base[0] - 2 * base[1]
    assert mix.at(0) is None and mix.at(5) is None and mix.at(1) is mix
    for num in (2, 3, 4):
        faded, gain = mix.at(num), 1 - (num - 1) / 4
        assert faded is not None
        torch.testing.assert_close(
            mix_rows(base, {}, [MixedRow(0, faded, (0, 1))])[0], gain * whole + (1 - gain) * base[0]
        )


def test_fading_distributions_stay_distributions() -> None:
    mix = Mix((Term(MAIN, 0.2), Term(Stream("", 1), 0.8)), is_probability=True, window=Window(0, 4, "cosine"))
    faded = mix.at(1)
    assert faded is not None and sum(term.weight for term in faded.terms) == pytest.approx(1)


def test_what_a_mix_says_of_itself() -> None:
    mix = Mix((Term(MAIN, 1.0, alpha=0.1), Term(Stream("b", 2), 1.0), Term(Stream("a"), 1.0)))
    assert mix.models == ["a", "b"] and mix.num_companions == 2
    assert not mix.is_sum and not mix.is_off
    assert Mix.of({"a": 0.0}).is_off and not Mix.of({"a": 1.0}).is_off


def test_a_mix_travels() -> None:
    terms = Term(MAIN, 1.0, True), Term(Stream("a", 1), -0.25, True, 0.5, 0.1, 0.9)
    mix = Mix(terms, window=Window(2, 9, "cosine"))
    for one in (mix, mix._replace(is_probability=True), Mix.of({"a": 1.0})):
        assert Mix.from_wire(json.loads(json.dumps(one.to_wire()))) == one


def test_scores_leave_nothing_raw_beside_them() -> None:
    """Log-probabilities are far below raw logits: a column that some stream lacks must not win."""
    base, shorter = torch.randn(1, 10) + 30, torch.randn(1, 8)
    mix = Mix((Term(MAIN, 1.0, True), Term(Stream("shorter"), -1.0, True)))
    assert torch.isneginf(mix_rows(base, {"shorter": shorter}, everywhere(mix, 1))[:, 8:]).all()

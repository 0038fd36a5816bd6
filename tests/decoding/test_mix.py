"""Mixing: rows of different mixes side by side, each what its formula says, in as many passes as it takes."""

import json

import torch
from torch import Tensor

from whipstaff.decoding.mix import MAIN, Mix, MixedRow, Stream, Term, added, mix_rows


def everywhere(mix: Mix, num_rows: int) -> list[MixedRow]:
    return [MixedRow(row, mix, (row,)) for row in range(num_rows)]


def test_off_is_off_bit_for_bit() -> None:
    base, other = torch.randn(3, 50), torch.full((3, 50), torch.nan)
    assert torch.equal(mix_rows(base, {"a": other}, everywhere(Mix.of({"a": 0.0}), 3)), base)


def test_rows_of_plain_requests_are_untouched_beside_others() -> None:
    base, other = torch.randn(4, 50), torch.randn(4, 50)
    result = mix_rows(
        base, {"a": other}, [MixedRow(1, Mix.of({"a": 2.0}), (1,)), MixedRow(3, Mix.of({"a": -1.0}), (3,))]
    )
    assert torch.equal(result[[0, 2]], base[[0, 2]])
    torch.testing.assert_close(result[[1, 3]], base[[1, 3]] + torch.tensor([[2.0], [-1.0]]) * other[[1, 3]])


def test_vocabularies_of_other_lengths() -> None:
    """A longer stream is cut; what a shorter one lacks is padding and keeps the base's value; bans stay bans."""
    base = torch.randn(2, 10)
    base[:, 3] = -torch.inf
    others = {"longer": torch.randn(2, 14), "shorter": torch.randn(2, 8)}
    result = mix_rows(base, others, everywhere(Mix.of({"longer": 1.0, "shorter": -1.0}), 2))
    torch.testing.assert_close(result[:, :8], base[:, :8] + others["longer"][:, :8] - others["shorter"])
    assert torch.equal(result[:, 8:], base[:, 8:])
    assert torch.isneginf(result[:, 3]).all()


def test_scores_leave_nothing_raw_beside_them() -> None:
    """Log-probabilities are far below raw logits: a column that some stream lacks must not win."""
    base, shorter = torch.randn(1, 10) + 30, torch.randn(1, 8)
    mix = Mix((Term(MAIN, 1.0, True), Term(Stream("shorter"), -1.0, True)))
    assert torch.isneginf(mix_rows(base, {"shorter": shorter}, everywhere(mix, 1))[:, 8:]).all()


def test_a_batch_may_need_more_models_than_one_pass_takes() -> None:
    """Twenty auxiliary models at once: some rows use many of them, some one, some none; one is masked besides."""
    base, others = torch.randn(4, 40), {f"m{k}": torch.randn(4, 40) for k in range(20)}
    weights = torch.randn(4, 20)
    weights[1] = 0.0
    weights[2, :19] = 0.0
    mixes = [Mix.of({f"m{k}": float(weights[row, k]) for k in range(20) if weights[row, k]}) for row in range(4)]
    mixes[3] = mixes[3]._replace(alpha=0.1)
    result = mix_rows(base, others, [MixedRow(row, mix, (row,)) for row, mix in enumerate(mixes)])
    expected = base + sum(weights[:, [k]] * others[f"m{k}"] for k in range(20))
    kept = base[3] >= base[3].max() + torch.tensor(0.1).log()
    expected[3, ~kept] = -torch.inf
    torch.testing.assert_close(result, expected)
    assert torch.equal(result[1], base[1])


def test_members_are_rows_of_the_same_batch() -> None:
    """Guidance: u + gamma (c - u) in log-probabilities, where u is another row; the same model twice in one mix."""
    base = torch.randn(5, 30)
    guided = Mix((Term(MAIN, 1.5, True), Term(Stream(member=1), -0.5, True)))
    averaged = Mix((Term(MAIN, 0.5), Term(Stream(member=1), 0.25), Term(Stream(member=2), 0.25)))
    result = mix_rows(base, {}, [MixedRow(0, guided, (0, 4)), MixedRow(2, averaged, (2, 3, 1))])
    c, u = base[0].log_softmax(-1), base[4].log_softmax(-1)
    torch.testing.assert_close(result[0], u + 1.5 * (c - u))
    torch.testing.assert_close(result[2], 0.5 * base[2] + 0.25 * base[3] + 0.25 * base[1])
    assert torch.equal(result[[1, 3, 4]], base[[1, 3, 4]])


def test_masks_look_at_the_main_stream() -> None:
    base, other = torch.randn(2, 30), torch.randn(2, 30)
    mix = Mix((Term(MAIN, 1.0), Term(Stream("a"), 2.0, False, 0.5)), top_p=0.9)
    result = mix_rows(base, {"a": other}, everywhere(mix, 2))
    torch.testing.assert_close(result, (base + 4 * other).masked_fill(~nucleus(base, 0.9), -torch.inf))


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Tokens whose better ones hold at most top_p of the mass."""
    p = logits.softmax(-1)
    return torch.stack([torch.stack([row[row > value].sum() <= top_p for value in row]) for row in p])


def test_sums_add_up_and_survive_the_wire() -> None:
    mix = added([Mix.of({"a": 1.0, "b": -1.0}), Mix.of({"b": -2.0, "c": 0.5})])
    assert mix == Mix.of({"a": 1.0, "b": -3.0, "c": 0.5})
    assert Mix.from_wire(json.loads(json.dumps(mix.to_wire()))) == mix
    assert mix.models == ["a", "b", "c"] and mix.num_members == 0

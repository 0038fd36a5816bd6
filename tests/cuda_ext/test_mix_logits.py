"""mix_logits_: each row a weighted sum of streams, on the tokens its masks allow."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from whipstaff import cuda_ext
from whipstaff.cuda_ext import reference

from .batches import DTYPES, INDEX_TYPES, POPULARITY, PROPERTY, strided
from .tolerances import TOLERANCE

pytestmark = pytest.mark.usefixtures("library")

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding"
INF = float("inf")


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def identity_rows(num_rows: int, num_streams: int) -> Tensor:
    """Row r of the batch reads row r of every stream."""
    return torch.arange(num_rows)[:, None].repeat(1, num_streams)


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_against_reference(
    out: Tensor, streams: list[Tensor], rows: Tensor, weights: Tensor, **tables: Tensor | None
) -> None:
    want, got = out.double().clone(), out.clone()
    reference.mix_logits_(
        want, [s.double() for s in streams], rows, double(weights), **{name: double(t) for name, t in tables.items()}
    )
    cuda_ext.mix_logits_(got, streams, rows, weights, **tables)
    torch.testing.assert_close(got.double(), want.to(out.dtype).double(), **TOLERANCE[out.dtype])
    untouched = rows[: len(out), 0] < 0
    assert torch.equal(got[untouched], out[untouched])


def rows_for(popularity: str, num_rows: int, num_streams: int) -> Tensor:
    """Which rows are mixed; a token's main stream is its own row, the others come from anywhere."""
    rows = torch.randint(0, num_rows, (num_rows, num_streams))
    rows[:, 0] = torch.arange(num_rows)
    if popularity == "nobody":
        rows[:, 0] = -1
    if popularity == "one_and_the_rest":
        rows[1:, 0] = -1
    if popularity == "all_one":
        rows[:, 1:] = num_rows - 1
    if popularity == "zipf":
        rows[torch.rand(rows.shape) < 0.4] = -1
    return rows


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("num_rows", [1, 3, 33])
@pytest.mark.parametrize("vocab", [64, 1111, 32000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(popularity: str, num_rows: int, vocab: int, dtype: torch.dtype) -> None:
    streams = [strided(num_rows, vocab + padding, dtype) * 4 for padding in (0, 3, 64)]
    check_against_reference(
        strided(num_rows, vocab, torch.float32),
        streams,
        rows_for(popularity, num_rows, 3),
        torch.randn(num_rows, 3),
        temperatures=torch.rand(num_rows, 3) + 0.5,
        log_softmax=torch.rand(num_rows, 3) < 0.5,
        alphas=torch.where(torch.rand(num_rows, 3) < 0.5, torch.rand(num_rows, 3) * 0.1, 0),
    )


@PROPERTY
@given(st.data())
def test_any_mix_matches_the_reference(data: st.DataObject) -> None:
    num_rows, num_streams = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 8))
    vocab = data.draw(st.integers(1, 1500))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    dtype, index = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(INDEX_TYPES))
    streams = [
        strided(4, vocab + data.draw(st.integers(0, 9)), data.draw(st.sampled_from(DTYPES))) * 5
        for _ in range(num_streams)
    ]
    for stream in streams:
        stream[torch.rand(stream.shape) < data.draw(st.sampled_from([0, 0.1, 1]))] = -INF
    shape = num_rows + data.draw(st.integers(0, 2)), num_streams
    optional = {
        "temperatures": torch.rand(shape) + 0.2,
        "log_softmax": torch.rand(shape) < 0.5,
        "alphas": torch.where(torch.rand(shape) < 0.3, torch.rand(shape), 0),
        "top_ps": torch.where(torch.rand(shape) < 0.3, torch.rand(shape), 1),
    }
    chosen = data.draw(st.sets(st.sampled_from(sorted(optional))))
    check_against_reference(
        strided(num_rows, vocab, dtype),
        streams,
        torch.randint(-1, 4, shape).to(index),
        torch.where(torch.rand(shape) < 0.7, torch.randn(shape), 0),
        **{name: optional[name] for name in chosen},
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_main_stream_alone_is_unchanged_bit_for_bit(dtype: torch.dtype) -> None:
    logits = strided(5, 1000, dtype)
    logits[0, 3:9] = -INF
    before = logits.clone()
    cuda_ext.mix_logits_(logits, [logits, strided(5, 1000)], identity_rows(5, 2), table([1.0, 0.0]).repeat(5, 1))
    assert torch.equal(logits, before)


def test_a_stream_with_weight_zero_is_not_read() -> None:
    out = torch.ones(1, 4)
    cuda_ext.mix_logits_(out, [out, torch.full((1, 4), math.nan)], identity_rows(1, 2), table([2.0, 0.0]))
    assert out.tolist() == [[2.0] * 4]


def test_what_any_stream_bans_stays_banned() -> None:
    main, other = table([0.0, -INF, -INF, 1.0]), table([-INF, -INF, 0.0, 2.0])
    out = main.clone()
    cuda_ext.mix_logits_(out, [out, other], identity_rows(1, 2), table([1.0, -1.0]))
    assert out.tolist() == [[-INF, -INF, -INF, -1.0]]
    cuda_ext.mix_logits_(out := main.clone(), [out, other], identity_rows(1, 2), table([0.0, 1.0]))
    assert out.tolist() == [[-INF, -INF, -INF, 2.0]]


def test_top_p_keeps_the_first_token_that_crosses_and_all_its_equals() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    for p, kept in ((0.0, 1), (0.49, 1), (0.51, 3), (0.8, 3), (0.95, 4), (1.0, 4)):
        out, count = logits.clone(), torch.zeros(1, dtype=torch.int32)
        cuda_ext.mix_logits_(out, [out], identity_rows(1, 1), table([1.0]), top_ps=table([p]), num_allowed=count)
        assert (out > -INF).sum() == count == kept, p


def test_alpha_is_relative_to_the_best_token_of_its_own_stream() -> None:
    main, other = torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.1, 0.1, 0.8]]).log()
    cuda_ext.mix_logits_(
        out := main.clone(), [out, other], identity_rows(1, 2), table([1.0, -1.0]), alphas=table([0.4, 0])
    )
    torch.testing.assert_close(out, torch.tensor([[6.0, 3.0, 0.0]]).log())


def test_masks_that_exclude_each_other_leave_the_main_streams_best() -> None:
    main, other = table([-INF, 3.0, 1.0]), table([9.0, 0.0, 5.0])
    out, count = main.clone(), torch.ones(1, dtype=torch.int32)
    cuda_ext.mix_logits_(
        out, [out, other], identity_rows(1, 2), table([1, 1]), alphas=table([0.9, 0.9]), num_allowed=count
    )
    assert out.tolist() == [[-INF, 3.0, -INF]]
    assert count.item() == 0


def test_rows_do_not_see_each_other() -> None:
    streams = [torch.randn(7, 3000) for _ in range(3)]
    rows, weights = identity_rows(7, 3), torch.randn(7, 3)
    tables = {"log_softmax": torch.rand(7, 3) < 0.5, "top_ps": torch.rand(7, 3), "alphas": torch.rand(7, 3) * 0.01}
    together = torch.zeros(7, 3000)
    cuda_ext.mix_logits_(together, streams, rows, weights, **tables)
    for r in range(7):
        alone = torch.zeros(1, 3000)
        single = {name: t[r : r + 1] for name, t in tables.items()}
        cuda_ext.mix_logits_(alone, streams, rows[r : r + 1], weights[r : r + 1], **single)
        assert torch.equal(alone[0], together[r])


def golden(name: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"], load_file(GOLDEN / f"{name}.safetensors")


def mixed(streams: list[Tensor], weights: list[float], **tables: Tensor) -> Tensor:
    num_rows, vocab = streams[0].shape
    out = torch.zeros(num_rows, vocab)
    tables = {name: t.repeat(num_rows, 1) for name, t in tables.items()}
    rows = identity_rows(num_rows, len(streams))
    cuda_ext.mix_logits_(out, [s.float() for s in streams], rows, table(weights).repeat(num_rows, 1), **tables)
    return out


def test_golden_dexperts() -> None:
    cases, tensors = golden("dexperts")
    for case in cases:
        streams = [tensors[f"{case['id']}.{name}"] for name in ("base", "expert", "anti")]
        out = mixed(streams, [1, case["alpha"], -case["alpha"]], top_ps=table([case["filter_p"], 1, 1]))
        assert out.argmax(1).tolist() == case["output"]


def test_golden_contrastive_decoding_on_logits() -> None:
    cases, tensors = golden("contrastive_decoding_logit_beta")
    for case in cases[:3]:
        streams, beta = [tensors["expert"], tensors["amateur"]], case["beta"]
        out = mixed(streams, [1 + beta, -beta], alphas=table([case["alpha"], 0]))
        torch.testing.assert_close(out.double(), tensors[case["id"]], rtol=0, atol=1e-4)
        assert (out > -INF).sum(1).tolist() == case["kept"]


def test_golden_contrastive_decoding_on_log_probabilities() -> None:
    cases, tensors = golden("contrastive_decoding_voidism")
    for case in cases:
        streams = [tensors[f"{case['id']}.{name}"] for name in ("expert", "amateur")]
        tables = {"alphas": table([case["relative_top"], 0]), "log_softmax": torch.tensor([[True, True]])}
        out = mixed(streams, [1, -1], **tables)
        torch.testing.assert_close(out, tensors[f"{case['id']}.scores"], rtol=0, atol=1e-4)


def test_golden_context_aware_decoding() -> None:
    cases, tensors = golden("context_aware_decoding")
    for case in cases[:3]:
        streams = [tensors[f"{case['id']}.{name}_logits"] for name in ("context", "prior")]
        kept = table([case["filter_p"], case["filter_p_prior"]])
        out = mixed(streams, case["weights"], top_ps=kept)
        allowed = out > -INF
        torch.testing.assert_close(out[allowed], tensors[f"{case['id']}.score"][allowed], rtol=0, atol=1e-4)
        assert out.argmax(1).tolist() == case["output"]


OUT, ROWS, WEIGHTS = torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
REFUSED: dict[str, tuple[Any, ...]] = {
    "takes 1 to 8 streams, not 0": ([], ROWS, WEIGHTS),
    "takes 1 to 8 streams, not 9": ([OUT] * 9, ROWS, WEIGHTS),
    r"streams\[0\] has 7 columns, fewer than out's vocabulary of 8": ([OUT[:, 1:]], ROWS, WEIGHTS),
    r"streams\[0\] must be float32, bfloat16 or float16, not Double": ([OUT.double()], ROWS, WEIGHTS),
    "rows must be int32 or int64, not Float": ([OUT], WEIGHTS, WEIGHTS),
    r"weights has shape \[2, 1\] for 2 rows and 2 streams": ([OUT, OUT], ROWS.repeat(1, 2), WEIGHTS),
    r"rows has shape \[1, 1\] for 2 rows and 1 streams": ([OUT], ROWS[1:], WEIGHTS),
    "weights must be Float, not Double": ([OUT], ROWS, WEIGHTS.double()),
    "log_softmax must be Bool, not Float": ([OUT], ROWS, WEIGHTS, None, WEIGHTS),
    "num_allowed must be Int, not Long": ([OUT], ROWS, WEIGHTS, None, None, None, None, ROWS[:, 0]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_the_tensor(message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cuda_ext.mix_logits_(OUT.clone(), *REFUSED[message])

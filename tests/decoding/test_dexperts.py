"""DExperts against the authors' own loop and a plain computation."""

import pytest
import torch
from decodings import golden, random_batch, run
from reference import dexperts as reference
from torch import Tensor

from whipstaff.decoding.methods.dexperts import DExperts, DExpertsParams
from whipstaff.decoding.mix import MixedRow, mix_rows

SAID, TENSORS = golden("dexperts")
METHOD = DExperts()


@pytest.mark.parametrize("case", SAID["cases"], ids=lambda case: case["id"])
def test_tokens_are_those_of_the_official_loop(case: dict) -> None:  # type: ignore[type-arg]
    base, expert, anti = (TENSORS[f"{case['id']}.{name}"] for name in ("base", "expert", "anti"))
    params = DExpertsParams(expert="first", antiexpert="second", alpha=case["alpha"], top_p=case["filter_p"])
    rows = [MixedRow(row, METHOD.mix(params), [row]) for row in range(len(base))]
    result = mix_rows(base, {"first": expert, "second": anti}, rows)
    assert result.argmax(1).tolist() == case["output"]
    for row in range(len(base)):
        streams = (base[row].tolist(), expert[row].tolist(), anti[row].tolist())
        expected = torch.tensor(reference.rewrite(*streams, case["alpha"], case["filter_p"]))
        torch.testing.assert_close(result[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sides", [("first", "second"), ("first", None), (None, "second")])
def test_either_side_may_be_the_base_itself(sides: tuple[str | None, str | None]) -> None:
    batch = random_batch(METHOD, [DExpertsParams(expert=sides[0], antiexpert=sides[1])] * 5)

    def read(model: str | None, row: int) -> list[float] | None:
        stream: Tensor | None = batch.rows.streams.get(model or "")
        return None if stream is None else stream[row].tolist()

    rows = batch.rows.logits.tolist()
    pairs = ((read(sides[0], r), read(sides[1], r)) for r in range(5))
    expected = [reference.rewrite(row, *pair, 2.0, 0.9) for row, pair in zip(rows, pairs, strict=True)]
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected), atol=1e-4, rtol=1e-5)

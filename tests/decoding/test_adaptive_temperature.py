"""The adaptive decoder against a float64 computation, at both levels."""

import pytest
import torch
from decodings import golden, random_batch, run
from reference import adaptive_temperature as reference
from reference.plain import tempered

from whipstaff.decoding.method import DecodingError, HeadFile
from whipstaff.decoding.methods.adaptive_temperature import AdaptiveTemperature, AdaptiveTemperatureParams, chances
from whipstaff.decoding.rows import Rows

SAID, TENSORS = golden("adaptive_decoder")
METHOD = AdaptiveTemperature()
HEAD = {part: TENSORS[part].float() for part in ("w0", "b0", "w1", "b1", "w2", "b2")}
HEAD["temperatures"] = torch.tensor(SAID["temperatures"])


def golden_rows() -> Rows:
    return Rows(
        TENSORS["token_logits"].float(),
        [1] * 7,
        [0] * 7,
        hidden=TENSORS["hidden"].float(),
        random=TENSORS["uniforms"].float(),
        state=torch.full((7, 1), torch.nan),
        heads={"head": HEAD},
    )


def test_chances_are_the_golden_ones() -> None:
    found = chances(TENSORS["hidden"].float(), HEAD)
    torch.testing.assert_close(found, TENSORS["temperature_probs"].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("choose", ["argmax", "sample"])
def test_distributions_are_the_golden_ones(level: str, choose: str) -> None:
    rows, name = golden_rows(), "selected" if choose == "argmax" else "sampled"
    result = METHOD.rewrite(rows, [AdaptiveTemperatureParams(head="h", level=level, choose=choose)] * 7)
    assert rows.facts["temperature"].tolist() == HEAD["temperatures"][SAID[f"{name}_index"]].tolist()
    torch.testing.assert_close(result.softmax(1), TENSORS[f"p_{name}"].float(), atol=1e-5, rtol=0)


def test_a_sequence_keeps_its_first_temperature() -> None:
    """Its later tokens have other hidden states and numbers; a token-level row beside it moves on."""
    rows = golden_rows()
    settings = [AdaptiveTemperatureParams(head="h", level=level) for level in ("sequence",) * 4 + ("token",) * 3]
    METHOD.rewrite(rows, settings)
    first = rows.facts["temperature"]
    rows.logits, rows.hidden = TENSORS["token_logits"].float(), TENSORS["hidden"].float().flip(0)
    METHOD.rewrite(rows, settings)
    assert torch.equal(rows.facts["temperature"][:4], first[:4])
    assert torch.equal(rows.facts["temperature"][4:], first.flip(0)[4:])


def test_a_plain_computation() -> None:
    kinds = [AdaptiveTemperatureParams(head="h", choose=choose) for choose in ("argmax", "sample")]
    batch = random_batch(METHOD, kinds * 6)
    rows, head = batch.rows, {part: tensor.tolist() for part, tensor in batch.rows.heads["head"].items()}
    assert rows.hidden is not None and rows.random is not None
    expected = []
    for row, params in enumerate(batch.settings):
        pi = reference.chances(rows.hidden[row].tolist(), head)
        index = reference.chosen(pi, float(rows.random[row]) if params.choose == "sample" else None)
        expected.append(tempered(rows.logits[row].tolist(), head["temperatures"][index]))
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected))


def test_a_head_with_a_negative_temperature_is_refused() -> None:
    head = {"temperatures": torch.tensor([0.5, -1.0])}
    with pytest.raises(DecodingError, match="0 or more") as caught:
        METHOD.with_heads(AdaptiveTemperatureParams(head="h"), {"head": HeadFile(head)})
    assert caught.value.param == "head"

"""Methods that are sums over prompts and models without a paper's golden cases, against the sums themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from whipstaff.decoding.methods.instructive import Instructive, InstructiveParams
from whipstaff.decoding.methods.prompt_ensemble import PromptEnsemble, PromptEnsembleParams
from whipstaff.decoding.methods.streams import Streams, StreamsParams
from whipstaff.decoding.mix import Mix, MixedRow, mix_rows

ROWS, VOCABULARY = 5, 12
CHANCE = torch.Generator().manual_seed(8)
OWN, FIRST, SECOND, MODEL = 3 * torch.randn(4, ROWS, VOCABULARY, generator=CHANCE)


def mixed(mix: Mix) -> Tensor:
    """The mix of OWN with the further sequences FIRST and SECOND and the auxiliary model MODEL."""
    sequences = torch.cat([OWN, FIRST, SECOND])
    rows = [MixedRow(row, mix, (row, ROWS + row, 2 * ROWS + row)) for row in range(ROWS)]
    return mix_rows(sequences, {"model": torch.cat([MODEL, MODEL, MODEL])}, rows)[:ROWS]


@pytest.mark.parametrize("epsilon", (0.0, 0.3, 0.9))
def test_instructive_goes_away_from_the_noisy_instruction(epsilon: float) -> None:
    mix = Instructive().mix(InstructiveParams(noisy_prompt="do not", epsilon=epsilon))
    torch.testing.assert_close(mixed(mix), OWN - epsilon * FIRST)


@pytest.mark.parametrize("weights", (None, [2.0, 1.0, 0.5]))
def test_ensembles_of_prompts_average_distributions_or_their_logarithms(weights: list[float] | None) -> None:
    shares = torch.tensor(weights or [1.0, 1.0, 1.0])
    shares = shares / shares.sum()
    said: dict[str, Any] = {"prompts": ["a", "b"], "weights": weights}
    every = torch.stack([OWN, FIRST, SECOND]).log_softmax(-1)
    mix = PromptEnsemble().mix(PromptEnsembleParams(**said))
    wanted = torch.einsum("k,krv->rv", shares, every.exp()).log()
    torch.testing.assert_close(mixed(mix).log_softmax(-1), wanted, atol=1e-5, rtol=1e-5)
    mix = PromptEnsemble().mix(PromptEnsembleParams(**said, space="log"))
    torch.testing.assert_close(mixed(mix), torch.einsum("k,krv->rv", shares, every), atol=1e-5, rtol=1e-5)


def streams(**said: Any) -> Tensor:
    listed = [{"prompt": "a", "weight": 0.5, "temperature": 2.0}, {"model": "model", "weight": -0.25}]
    return mixed(Streams().mix(StreamsParams.model_validate({"streams": listed, "base_weight": 1.5, **said})))


def test_streams_are_summed_as_they_are() -> None:
    torch.testing.assert_close(streams(), 1.5 * OWN + 0.5 * FIRST / 2 - 0.25 * MODEL)


def test_streams_are_summed_as_logarithms() -> None:
    logs = 1.5 * OWN.log_softmax(-1) + 0.5 * (FIRST / 2).log_softmax(-1) - 0.25 * MODEL.log_softmax(-1)
    torch.testing.assert_close(streams(space="log"), logs, atol=1e-5, rtol=1e-5)


def test_streams_are_summed_as_distributions() -> None:
    listed = [{"prompt": "a", "weight": 0.5}, {"prompt": "b", "model": "model", "weight": 2.0}]
    found = streams(streams=listed, space="probability")
    wanted = 1.5 * OWN.softmax(-1) + 0.5 * FIRST.softmax(-1) + 2.0 * MODEL.softmax(-1)
    torch.testing.assert_close(found.log_softmax(-1), (wanted / 4).log(), atol=1e-5, rtol=1e-5)


def test_streams_leave_out_what_the_base_finds_implausible() -> None:
    found = streams(alpha=0.2)
    kept = OWN.softmax(-1) >= 0.2 * OWN.softmax(-1).amax(-1, keepdim=True)
    assert torch.equal(found > -torch.inf, kept)
    torch.testing.assert_close(found[kept], (1.5 * OWN + 0.5 * FIRST / 2 - 0.25 * MODEL)[kept])

"""What is kept of a step's rows until their tokens are drawn, and what is said of them then."""

from typing import Any

import pytest
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput

from whipstaff.server.engine.explanations import attach
from whipstaff.server.engine.worker.logits.explain import ExplainedToken, Snapshot


def test_early_layers_are_said_of_the_rows_that_ask() -> None:
    """Of three rows that read early layers, the second asks; what others read is not kept."""
    base, early = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).split(1)
    base, early = base[0], torch.cat([early[0], early[0].flip(1)])
    snapshot = Snapshot([ExplainedToken("asks", 1, 2)], base)
    snapshot.note_early([0, 1, 2], [[4], [0, 2], [0, 2, 4]], early)
    kept = early.clone()
    early.zero_()  # the buffer is somebody else's in the next step
    (said,) = snapshot.drawn(torch.tensor([0, 3, 5])).to_json().values()
    assert list(said["streams"]) == ["layer 0", "layer 2"]
    for layer, logits in zip(("layer 0", "layer 2"), kept[1:3], strict=True):
        log_p, one = logits.log_softmax(0), said["streams"][layer]
        assert one["logprob"] == pytest.approx(log_p[3].item(), abs=1e-6)
        assert one["rank"] == 1 + int((log_p > log_p[3]).sum())
        assert [token["id"] for token in one["top"]] == log_p.topk(2).indices.tolist()


def test_what_a_token_is_worth_is_said_of_the_one_that_is_drawn() -> None:
    """Of three rows the first does not ask, and the last gets a token that nobody judged."""
    snapshot = Snapshot([ExplainedToken("asks", 1, 0), ExplainedToken("odd", 2, 0)], torch.zeros(3, 9))
    tokens = torch.tensor([[1, 2], [3, 4], [5, 6]])
    snapshot.note_judged([0, 1, 2], {"classifier": (tokens, torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]))})
    said = snapshot.drawn(torch.tensor([1, 4, 7])).to_json()
    assert said["asks"]["facts"] == {"classifier": pytest.approx(0.4)} and said["odd"]["facts"] == {}


def test_other_distributions_are_said_of_the_rows_that_ask() -> None:
    """Of four rows the first is the unsteered sequence of the third, the second its own, and the last asks nothing; the
    second and third also ask what they are drawn from."""
    base = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    final, drawn = base.flip(1).contiguous(), base.masked_fill(base < base.topk(4).values[:, -1:], -torch.inf)
    asking = [ExplainedToken("own", 1, 7, 1, True), ExplainedToken("other", 2, 7, 0, True), ExplainedToken("no", 3, 7)]
    snapshot = Snapshot(asking, base)
    snapshot.note_final(final)
    snapshot.note_drawn(drawn)
    tokens = base.argmax(1)
    left = drawn.clone()
    drawn.zero_()
    said = snapshot.drawn(tokens).to_json()
    assert said["no"].keys() == {"id", "kl", "base", "final", "streams", "facts"}
    for name, row, plain in (("own", 1, 1), ("other", 2, 0)):
        log_p, unsteered, token = base[plain].log_softmax(0), said[name]["unsteered"], int(tokens[row])
        assert unsteered["logprob"] == pytest.approx(log_p[token].item(), abs=1e-6)
        assert unsteered["rank"] == 1 + int((log_p > log_p[token]).sum())
        log_f = final[row].log_softmax(0)
        assert unsteered["kl"] == pytest.approx((log_f.exp() * (log_f - log_p)).sum().item(), abs=1e-5)
        one = said[name]["drawn"]
        assert one["rank"] == 1 and [token["id"] for token in one["top"]] == left[row].topk(4).indices.tolist()
        assert one["logprob"] == pytest.approx(left[row].log_softmax(0)[token].item(), abs=1e-6)
    assert said["own"]["unsteered"]["kl"] == pytest.approx(said["own"]["kl"])


class Told:
    """What is said of a step."""

    def __init__(self, **said: dict[str, Any]) -> None:
        self.said = said

    def to_json(self) -> dict[str, dict[str, Any]]:
        return self.said


@pytest.mark.parametrize("cls", [AsyncGPUModelRunnerOutput, AsyncOutput])
def test_an_output_still_on_its_way_carries_them(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either model runner's asynchronous scheduling, whose classes have an abstract base."""
    ready = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    monkeypatch.setattr(cls, "get_output", lambda self: ready)
    output: Any = object.__new__(cls)
    told = [Told(a={"id": 3}), Told(a={"readings": 1}, b={"readings": 2})]
    assert attach(output, told) is output and isinstance(output, AsyncModelRunnerOutput)
    assert output.get_output() is ready
    assert ready.whipstaff_explanations == {"a": {"id": 3, "readings": 1}, "b": {"readings": 2}}

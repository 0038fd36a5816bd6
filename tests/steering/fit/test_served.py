"""A server as what fits read from: what it is asked, and what it may not answer."""

import base64
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import SHAPE, Planted
from safetensors.torch import save
from transformers import AutoTokenizer

from whipstaff.server import demo
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import fitting, served
from whipstaff.steering.fit.options import Options
from whipstaff.steering.fit.served import ServedModel
from whipstaff.steering.fit.source import Asked
from whipstaff.steering.method import HookPoint

POINTS = [HookPoint("resid_post", 1), HookPoint("attn_head", 0), HookPoint("resid_post", 3)]


class Answering:
    """A server whose model is `Planted`; what it was asked, and one word of its answers changed."""

    def __init__(self, **changed: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(demo.MODELS / "demo")
        self.source, self.changed = Planted(self.tokenizer, -1, {}), changed
        self.bodies: list[Any] = []

    def __call__(self, method: str, path: str, body: Any) -> Any:
        if path == "/tokenize":
            return {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False)}
        self.bodies.append(body)
        captured = [{"safetensors": base64.b64encode(save(self._file(ids, body))).decode()} for ids in body["prompt"]]
        return {"whipstaff": {"steering": [], "decoding": [], "captured": captured} | self.changed}

    def _file(self, ids: list[int], body: Any) -> dict[str, torch.Tensor]:
        found = {}
        for number, entry in enumerate(body["capture"]):
            places = [p for start, end in entry["where"]["prompt"] for p in range(len(ids))[start:end]]
            asked = Asked(tuple(ids), tuple(places), entry["reduce"] == "mean")
            found[f"{number}.positions"] = torch.tensor(places)
            for layer in entry["layers"]:
                (rows,) = self.source.read([asked], [point := HookPoint(entry["site"], layer)])
                shape = (SHAPE.num_heads, SHAPE.head_dim) if point.site == "attn_head" else (-1,)
                made = rows[point].unflatten(1, shape)
                found[f"{number}.{entry['site']}.{layer}"] = made[0] if asked.is_mean else made.contiguous()
        return found

    def model(self, **said: Any) -> ServedModel:
        return ServedModel(self, "planted", self.tokenizer, SHAPE, **said)


def texts(num: int) -> list[Asked]:
    """Of several lengths, read at the end, in the middle, in two places, or as a mean."""
    found = []
    for index in range(num):
        ids = tuple(range(3, 10 + index % 7))
        one = len(ids) - 1
        found.append((Asked(ids, (one,)), Asked(ids, (1, 2, 4)), Asked(ids, (2, 3), True))[index % 3])
    return found


def test_rows_come_in_order_whatever_was_asked_together() -> None:
    server, asked = Answering(), texts(100)
    found = list(server.model(batch_size=3, parallel=2).read(asked, POINTS))
    for one, rows in zip(server.source.read(asked, POINTS), found, strict=True):
        assert rows.keys() == one.keys() and all(torch.equal(rows[point], one[point]) for point in POINTS)
    assert max(len(body["prompt"]) for body in server.bodies) == 3
    assert all(body["max_tokens"] == 1 and len(body["capture"]) == 2 for body in server.bodies)


def test_no_more_is_asked_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes one text at a time has at most two windows waiting; large rows go one by one."""
    server = Answering()
    monkeypatch.setattr(served, "MOST_BYTES", 1)
    rows = server.model(batch_size=8, parallel=2).read(texts(400), POINTS)
    next(rows)
    assert sum(len(body["prompt"]) for body in server.bodies) <= 2 * 2 * 4
    assert {len(body["prompt"]) for body in server.bodies} == {1}
    rows.close()  # type: ignore[attr-defined]  # a generator's


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"steering": [{}]}, "steers what this key"),
        ({"captured": [{"problem": "no room"}]}, "no room"),
        ({"captured": [{"safetensors": base64.b64encode(save({"0.positions": torch.tensor([9])})).decode()}]}, "other"),
    ],
)
def test_what_is_not_the_plain_model_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(SteeringError, match=reason):
        list(Answering(**changed).model().read(texts(1), POINTS))


def test_another_tokenizer_is_noticed() -> None:
    server = Answering()
    with pytest.raises(SteeringError, match="not the tokenizer") as error:
        ServedModel(lambda *_: {"tokens": [1]}, "planted", server.tokenizer, SHAPE)
    assert error.value.param == "tokenizer"


@pytest.mark.parametrize(
    ("method", "said"), [("lofit", {}), ("task_vector", {}), ("add_direction", {"marks": "I"}), ("function_vector", {})]
)
def test_what_a_server_cannot_give_is_said_before_data_is_read(method: str, said: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=r"a model on this machine is needed; here: caa, .*probe") as error:
        fitting.prepared(method, Answering().model(), [Path("no.jsonl")], Options(**said), Path("nowhere"))
    assert error.value.param == "method"

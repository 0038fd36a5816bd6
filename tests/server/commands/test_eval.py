"""`whipstaff eval`: what a server answers is scored, compared, kept, and chosen by. The server here is a stand-in whose
log-probabilities follow from what is asked of it."""

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from whipstaff.server.commands import eval as eval_cli
from whipstaff.server.commands.eval_flags import parse
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, read, write

SHAPE = ModelShape(architecture="Toy", hidden_size=4, num_layers=3, num_heads=2, head_dim=2)


class StandIn:
    """Wrong answers have -1 a token, right ones -3 + |scale| as far as they are edited; neutral text costs |scale|."""

    def __init__(self, gain: float = 1.0, stops_after: int | None = None) -> None:
        self.gain, self.stops_after, self.asked = gain, stops_after, []  # type: ignore[var-annotated]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "toy"}]})
        if request.url.path == "/v1/steering/vectors":
            return httpx.Response(200, json={"data": [{"id": "mine", "digest": "d"}]})
        body = json.loads(request.content)
        self.asked.append(body)
        if self.stops_after is not None and len(self.asked) > self.stops_after:
            raise KeyboardInterrupt
        if body.get("steering", {}).get("scale", 0) > 50:
            error = {"message": "too strong", "param": "steering.scale"}
            return httpx.Response(400, json={"error": error})
        return httpx.Response(200, json={"choices": [self._answer(body)]})

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        entry = body.get("steering", {})
        strength = self.gain * abs(entry.get("scale", 0.0))
        if not body.get("echo"):
            right = body["prompt"].split()[1]
            return {"text": f" {right}" if strength >= 2 else " nothing"}
        words = body["prompt"].split(" ")
        tokens = [word if index == 0 else f" {word}" for index, word in enumerate(words)]
        edited = len(tokens)
        if isinstance(entry.get("where"), dict):
            edited = -entry["where"]["prompt"][0][0] - 1
        log_p = [-2.0] * (len(tokens) - 1)
        for index, word in enumerate(words[1:]):
            if word.startswith("right"):
                log_p[index] = -3.0 + strength * (len(words) - 1 - index <= edited)
            elif word.startswith("wrong"):
                log_p[index] = -1.0
        p = 0.6 - 0.05 * strength
        top = {"a": math.log(p), "b": math.log(1 - p - 0.1)}
        return {
            "logprobs": {
                "tokens": tokens,
                "token_logprobs": [None, *log_p],
                "top_logprobs": [None] + [top] * len(log_p),
            }
        }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"question": f"question {n}?", "right": [f"right{n} right"], "wrong": [f"wrong{n} wrong", "wrong one"]}
        for n in range(30)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def neutral(tmp_path: Path) -> Path:
    path = tmp_path / "neutral.jsonl"
    path.write_text("".join(json.dumps({"text": f"some plain text {n}"}) + "\n" for n in range(4)))
    return path


def run(server: StandIn, data: Path, *words: object) -> int:
    flags = [str(data), "--vector", "mine", "--parallel", "1", "-o", str(data.parent / "out"), *map(str, words)]
    return eval_cli.run(parse(flags), httpx.MockTransport(server))


def summary(data: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((data.parent / "out" / "summary.json").read_text())
    return found


def test_a_sweep_finds_the_dose_and_its_cost(data: Path, neutral: Path, capsys: Any) -> None:
    server = StandIn()
    assert run(server, data, "--scales", "0:4:1", "--neutral", neutral) == 0
    found = summary(data)
    effect = {line["scale"]: line["means"]["mc1"] for line in found["cells"]}
    assert effect == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1}  # -6 + 2 scale against -2
    cost = [line["kl"] for line in found["cells"]]
    assert cost[0] == 0 and cost == sorted(cost) and cost[-1] > 0.05
    steered = [body for body in server.asked if "steering" in body and isinstance(body["steering"].get("where"), dict)]
    assert {body["steering"]["where"]["prompt"][0][0] for body in steered} == {-3}  # from the row before two tokens on
    said = capsys.readouterr().out
    assert (
        "scale 3" in said
        and "+1.000" in said
        and "noise" not in said.split("wrote")[0].split("warning")[0].split("scale 3")[1]
    )
    with Image.open(data.parent / "out" / "dose.png") as picture:
        assert picture.size[0] > 300


def test_what_is_noise_is_called_noise(data: Path, capsys: Any) -> None:
    assert run(StandIn(gain=0.0), data, "--scales", "1,2") == 0
    said = capsys.readouterr().out
    assert "noise" in said and "did not reach what was scored" in said


def test_an_evaluation_that_was_cut_off_goes_on(data: Path, capsys: Any) -> None:
    assert run(StandIn(stops_after=300), data, "--scales", "3,4") == 130
    assert run(StandIn(), data, "--scales", "3,4") == 2
    assert "--resume" in capsys.readouterr().err
    rest = StandIn()
    assert run(rest, data, "--scales", "3,4", "--resume") == 0
    resumed, num_asked = summary(data), len(rest.asked)
    whole = StandIn()
    assert run(whole, data, "--scales", "3,4", "--force") == 0
    assert summary(data) == resumed and num_asked < len(whole.asked)
    assert run(StandIn(), data, "--scales", "3,4", "--resume", "--form", "{prompt} {response}") == 2
    assert "other flags" in capsys.readouterr().err


def test_the_dose_that_keeps_to_the_cost_is_written_into_the_file(data: Path, neutral: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.safetensors"
    write(target, Header(method="caa", model=SHAPE), {"resid_post.1.add": torch.ones(4)})
    words = ("--scales", "1,3,4,6", "--neutral", neutral, "--choose", target)
    assert run(StandIn(), data, *words) == 0
    assert read(target).header.scale == 3 and summary(data)["chosen"]["scale"] == 3
    assert torch.equal(next(iter(read(target).tensors.values()))["add"], torch.ones(4))
    assert run(StandIn(), data, *words, "--force", "--max-kl", "0.0001") == 0
    assert summary(data)["chosen"]["scale"] == 0 and read(target).header.scale == 3


def test_generated_answers_are_scored(tmp_path: Path) -> None:
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps({"input": f"in{n}", "output": f"in{n}"}) + "\n" for n in range(25)))
    assert run(StandIn(), path, "--scales", "1,2", "--match", "^ in") == 0
    by_scale = {line["scale"]: line["means"] for line in summary(path)["cells"]}
    assert [by_scale[scale]["exact_match"] for scale in (0, 1, 2)] == [0, 0, 1] and by_scale[2]["match"] == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--vector", "other"), "has no 'other'"),
        (("--metric", "bleu"), "'bleu' is none of"),
        (("--scales", "99"), "steering.scale: too strong"),
        (("--form", "Q: {prompt}"), "--form"),
        (("--choose", "x.safetensors"), "--neutral"),
    ],
)
def test_what_is_wrong_is_named(words: tuple[str, ...], reason: str, data: Path, capsys: Any) -> None:
    assert run(StandIn(), data, *words) == 2
    assert reason in capsys.readouterr().err

"""How tests ask a server over HTTP, and how they read what it answers."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

PROMPT = "def main("
PAIR = {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}
PUSH = {"vector": "push", "scale": 2}
BOTH = {"steering": [PUSH], "decoding": [PAIR]}
MOOD = {  # a `response_format`
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"mood": {"enum": ["calm", "angry"]}, "sure": {"type": "boolean"}},
            "required": ["mood", "sure"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
TOLERANCE = 1e-3  # log-probabilities, two float32 implementations
Post = Callable[..., httpx.Response]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def post_json(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    """Post what Python calls JSON: NaN, infinities and lone surrogates included."""
    return http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


def ok(response: httpx.Response) -> Any:
    """The JSON of an answer that is no refusal."""
    assert response.status_code in (200, 201), response.text
    return response.json()


def tokens(answer: httpx.Response | dict[str, Any], choice: int = 0) -> list[int]:
    """The ids of a choice's tokens."""
    said = ok(answer) if isinstance(answer, httpx.Response) else answer
    found: list[int] = said["choices"][choice]["token_ids"]
    return found


def texts(response: httpx.Response) -> list[str]:
    return [c["text"] if "text" in c else c["message"]["content"] for c in ok(response)["choices"]]


def assert_refused(response: httpx.Response, status: int, param: str | None) -> None:
    """API.md's error: this status, at this path, in exactly this shape."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, status), error
    assert error["message"] and error["type"]


def data_events(response: httpx.Response) -> list[str]:
    """What a stream's events hold."""
    assert response.status_code == 200, response.text
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]


def streamed_text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    pieces = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(piece["text"] if "text" in piece else piece["delta"].get("content") or "" for piece in pieces)


def metrics(http: httpx.Client) -> Samples:
    """Every sample by its name and labels."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def poll(http: httpx.Client, is_so: Callable[[Samples], bool], seconds: float = 60.0) -> Samples:
    """Look at the metrics until they are so: the server asks its worker now and then."""
    deadline = time.monotonic() + seconds
    while not is_so(now := metrics(http)):
        assert time.monotonic() < deadline, {
            key: value for key, value in now.items() if re.search("num_requests|slots|_running|_living", key[0])
        }
        time.sleep(0.02)
    return now

"""What a server says once it takes requests is true, and the request that it proposes works."""

import json
import shlex
from dataclasses import replace
from itertools import pairwise

import httpx
import pytest
from serving import Server

from whipstaff.server.api.greeting import Place, greeting
from whipstaff.server.registry.capabilities import Capabilities

PLACE = Place("http://localhost:8000", "tiny", has_key=True)


def proposed(line: str) -> tuple[str, dict[str, str], dict[str, object]]:
    """The address, headers and body of a line that begins with curl."""
    words = shlex.split(line.partition("try  ")[2])
    assert words[:2] == ["curl", "-s"]
    headers = dict(word.split(": ", 1) for flag, word in pairwise(words) if flag == "-H")
    return words[2], headers, json.loads(words[words.index("-d") + 1])


def test_it_proposes_what_the_server_has(caps: Capabilities, nothing: Capabilities) -> None:
    where, what, request = greeting(PLACE, caps, has_chat=True)
    assert "http://localhost:8000" in where and "'tiny'" in where
    assert f" {len(caps.registry.names)} vectors" in what
    url, headers, body = proposed(request)
    assert url == "http://localhost:8000/v1/chat/completions"
    assert headers["Authorization"] == "Bearer $VLLM_API_KEY" and '"Authorization' in request  # the shell fills it in
    assert body["messages"] and isinstance(body["steering"], dict) and body["steering"]["vector"] in caps.registry.names
    _, what, request = greeting(Place("http://localhost:8000", "tiny", False, 2), nothing, has_chat=False)
    url, headers, body = proposed(request)
    assert url.endswith("/v1/completions") and headers.keys() == {"Content-Type"}
    assert " 0 vectors" in what and "prompt" in body and "steering" not in body
    slow, *others = greeting(replace(PLACE, uncompiled="there is no compiler"), caps, has_chat=True)
    assert slow.startswith("whipstaff: there is no compiler: ") and others == greeting(PLACE, caps, has_chat=True)


@pytest.mark.engine
def test_the_demos_first_words_work(demo_server: Server) -> None:
    said = demo_server.said().splitlines()
    start = next(index for index, line in enumerate(said) if line.startswith("whipstaff: listening on "))
    where, what, request = said[start : start + 3]
    assert demo_server.url in where and "'demo'" in where
    with httpx.Client(base_url=demo_server.url, timeout=120) as http:
        methods = http.get("/v1/steering/methods").json()["data"]
        vectors = http.get("/v1/steering/vectors").json()["data"]
        num_available = sum(method["available"] for method in methods)
        assert f"{num_available} of {len(methods)} methods" in what
        assert f" {sum(vector['fits'] for vector in vectors)} vectors" in what
        url, headers, body = proposed(request)
        answer = http.post(url, headers=headers, json=body)
        assert answer.status_code == 200 and answer.json()["whipstaff"]["steering"], answer.text
        assert http.get("/ready").status_code == http.get("/health").status_code == 200
    assert not [line for line in said if "Route: " in line]

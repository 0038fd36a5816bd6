"""Keys at the door, around an application that is a stand-in."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from whipstaff.server import metrics
from whipstaff.server.access.audit import Audit
from whipstaff.server.access.keys import HOLDER, Keyring, digest_of
from whipstaff.server.access.ledger import Ledger
from whipstaff.server.api.access import GENERATING, Access
from whipstaff.server.api.generate import answer_refusal
from whipstaff.server.errors import BadRequest, WhipstaffError

KEYS = {
    "keys": [
        {"id": "team", "sha256": [digest_of("team-key")], "policy": "free"},
        {"id": "root", "sha256": [digest_of("root-key")], "role": "admin"},
    ],
    "policies": {"free": {"per_minute": {"requests": 4}, "concurrent": 2}},
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def client(tmp_path: Path, log: Path) -> Iterator[TestClient]:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(KEYS))
    path.chmod(0o600)
    app = FastAPI()
    app.add_exception_handler(WhipstaffError, answer_refusal)

    @app.api_route("/{rest:path}", methods=["GET", "POST", "PATCH", "DELETE"])
    async def answer(rest: str, raw: Request) -> dict[str, Any]:
        if b"bad" in await raw.body():
            raise BadRequest("secret words", "steering[0].vector")
        return {"holder": (holder := HOLDER.get()) and holder.id}

    wrapped = metrics.Refusals(Access(app, Keyring(path, Ledger.of_one()), Audit(log)))
    with TestClient(wrapped) as client:
        yield client


def said(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def ask(client: TestClient, path: str, key: str = "", method: str = "POST", **more: Any) -> Any:
    return client.request(method, path, headers={"Authorization": f"Bearer {key}"} if key else {}, **more)


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping", "/", "/playground/page.js"])
def test_everybody_may_ask_how_it_is(client: TestClient, path: str) -> None:
    assert ask(client, path, method="GET").status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/metrics/x", "/tokenize", "/invocations", "/load", "/docs", *GENERATING]
)
@pytest.mark.parametrize("key", ["", "guess", "team-key "[:-2]])
def test_nothing_else_is_open(client: TestClient, log: Path, path: str, key: str) -> None:
    for method in ("GET", "POST"):
        answer = ask(client, path, key, method)
        assert answer.status_code == 401 and answer.json()["error"]["type"] == "AuthenticationError"
    assert "guess" not in log.read_text() and said(log)[-1]["reason"] == "unauthorized"


def test_a_users_key_opens_what_its_policy_holds_for(client: TestClient) -> None:
    for path in GENERATING:  # though it has no more requests in this minute than some of them take
        assert ask(client, path, "team-key").status_code in (200, 429), path
    for path, method in (
        *(
            ("/invocations", "POST"),
            ("/v1/responses/resp_1/cancel", "POST"),
            ("/v1/messages/count_tokens", "POST"),
            ("/collective_rpc", "POST"),
        ),
        *(("/v1/steering/vectors", "POST"), ("/v1/steering/vectors/x", "DELETE"), ("/v1/load_lora_adapter", "POST")),
        *(("/metrics", "GET"), ("/server_info", "GET"), ("/v1x", "GET")),
    ):
        assert ask(client, path, "team-key", method).status_code == 403, path
        assert ask(client, path, "root-key", method).json() == {"holder": "root"}
    assert ask(client, "/v1/models", "team-key", "GET").status_code == 200


def test_the_answer_says_what_is_left_and_when_to_come_back(client: TestClient, log: Path) -> None:
    path, before = GENERATING[0], metrics.REFUSALS.labels("rate_requests")._value.get()
    left = [ask(client, path, "team-key").headers["x-ratelimit-remaining-requests"] for _ in range(4)]
    assert left == ["3", "2", "1", "0"]
    refused = ask(client, path, "team-key")
    assert refused.status_code == 429 and refused.json()["error"]["type"] == "RateLimitError"
    assert refused.headers["retry-after"] == "15" and refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert "requests of this minute" in refused.json()["error"]["message"]
    assert metrics.REFUSALS.labels("rate_requests")._value.get() == before + 1
    assert "x-ratelimit-limit-requests" not in ask(client, path, "root-key").headers
    assert [one["reason"] for one in said(log)] == ["rate_requests"]


def test_the_log_says_who_and_where_and_nothing_that_was_said(client: TestClient, log: Path) -> None:
    ask(client, GENERATING[0], "team-key", content=b"bad prompt")
    ask(client, "/v1/steering/vectors", "root-key", content=b"tensor")
    refusal, change = said(log)
    assert refusal["event"] == "refusal" and change["event"] == "change"
    assert (refusal["key"], refusal["role"], refusal["policy"]) == ("team", "user", "free")
    assert (refusal["status"], refusal["reason"], refusal["param"]) == (400, "bad_value", "steering[0].vector")
    assert (change["key"], change["role"], change["status"]) == ("root", "admin", 200)
    for secret in ("bad prompt", "secret", "tensor", "team-key", digest_of("team-key")):
        assert secret not in log.read_text()


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_every_change_is_logged_whatever_its_verb(client: TestClient, log: Path, method: str) -> None:
    ask(client, "/v1/steering/vectors/x", "root-key", "GET")
    ask(client, "/v1/steering/vectors/x", "root-key", method)
    (change,) = said(log)
    assert (change["event"], change["method"], change["key"]) == ("change", method, "root")
    assert ask(client, "/v1/steering/vectors/x", "team-key", method).status_code == 403


def test_what_runs_is_counted_until_it_ended_however_it_did(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "keys.json"
        path.write_text(json.dumps(KEYS))
        path.chmod(0o600)
        go, failing = asyncio.Event(), False

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await go.wait()
            if failing:
                raise ConnectionResetError
            await send({"type": "http.response.start", "status": 200, "headers": []})

        ring = Keyring(path, Ledger.of_one())
        access, statuses = Access(app, ring, Audit(None)), list[int]()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        def one() -> "asyncio.Task[None]":
            headers = [(b"authorization", b"Bearer team-key")]
            scope = {"type": "http", "method": "POST", "path": GENERATING[0], "headers": headers}
            return asyncio.create_task(access(scope, None, send))

        running = [one(), one()]
        await asyncio.sleep(0.01)
        await one()
        assert statuses == [429]
        running[0].cancel()
        await asyncio.wait(running[:1])
        failing = True
        running.append(one())
        go.set()
        await asyncio.wait(running)
        holder = ring.find("team-key")
        assert holder is not None and holder.meter.ledger.memory[holder.meter.row + 1] == 0

    asyncio.run(run())

"""A server with a file of keys: what each may do, how much of it, and that nobody brings it down."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import PUSH, assert_refused, data_events, metrics, ok
from malformed import malformed
from serving import MODEL, Server, serving
from soak import SOAK

from whipstaff.server.access.keys import PAUSE, digest_of

pytestmark = pytest.mark.engine

ASK: dict[str, Any] = {"model": MODEL, "prompt": "def main(", "max_tokens": 8, "temperature": 0}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 8}
NUM_BODIES, NUM_EXAMPLES, PHASES = (10_000, 200, "coverage,fuzzing") if SOAK else (500, 10, "fuzzing")
NUM_FLOOD = 300
NUM_FILES = 2  # --max-downloads
PATIENCE = 60.0  # seconds
GONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranked": {"best_of": 4, "temperature": 1},
    "beams": {"num_beams": 4, "temperature": None},
    "response": {"input": "Why?", "max_output_tokens": 400},
    "stream": {"input": "Why?", "max_output_tokens": 400, "stream": True},
}
POLICIES: dict[str, Any] = {
    "narrow": {"methods": ["caa", "typical_p"], "vectors": ["push"], "presets": ["quiet"], "max_tokens": 20, "n": 2},
    "forced": {"forced_preset": "quiet", "vectors": []},
    "metered": {"per_minute": {"requests": 100, "tokens": 2000, "cost": 3000}},
    "small": {"per_minute": {"tokens": 100}},
    "counted": {"per_minute": {"tokens": 60, "cost": 60}, "burst": 60},
    **{f"gone-{name}": {"per_minute": {"tokens": 240, "cost": 240}, "burst": 60} for name in GONE},
    "single": {"concurrent": 1},
    "mild": {"max_dose": 1e-6},
}


def write(path: Path, **more: list[str]) -> None:
    """The file of keys: one of each policy, one without, an administrator's; and the keys of "turning"."""
    keys = [{"id": name, "sha256": [digest_of(f"{name}-key")], "policy": name} for name in POLICIES]
    keys += [{"id": "all", "sha256": [digest_of("all-key")]}]
    keys += [{"id": "root", "sha256": [digest_of("root-key")], "role": "admin"}]
    keys += [{"id": name, "sha256": list(map(digest_of, said))} for name, said in more.items()]
    path.with_suffix(".new").write_text(json.dumps({"keys": keys, "policies": POLICIES}))
    path.with_suffix(".new").chmod(0o600)
    os.replace(path.with_suffix(".new"), path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    preset = {"default": {"steering": PUSH, "max_tokens": 5}}
    (folder / "quiet.json").write_text(json.dumps(preset))
    (folder / "loud.json").write_text(json.dumps(preset))
    write(folder / "keys.json")
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    presets = ("--presets", str(root / "quiet.json"), "--presets", str(root / "loud.json"))
    own = ("--keys", str(root / "keys.json"), "--audit-log", str(root / "audit.jsonl"), "--registry", str(root / "r"))
    reads = ("--lookahead", "--attention-rows", "--hidden-states", "1")
    files = ("--max-downloads", str(NUM_FILES), "--download-seconds", "3600")
    with serving(root / "served", *presets, *own, *reads, *files, has_key=False) as running:
        yield running


def as_(server: Server, key: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=120)


def complete(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/completions", json=ASK | fields)


def is_alive(server: Server) -> bool:
    with as_(server, "all-key") as http:
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        return bool(ok(complete(http, steering=PUSH))["choices"][0]["text"])


def test_without_a_key_nothing_is_told(server: Server) -> None:
    for key in ("guess", "narrow-ke"):
        with as_(server, key) as http:
            for path in ("/v1/models", "/metrics", "/version", "/load", "/openapi.json", "/v1/steering/vectors"):
                assert http.get(path).status_code == 401
            for path in ("/v1/completions", "/invocations", "/tokenize", "/v1/steering/vectors", "/no/such"):
                assert_refused(http.post(path, json=ASK), 401, None)
    answer = httpx.options(f"{server.url}/v1/completions", headers={"Origin": "http://evil", **PREFLIGHT})
    assert "access-control-allow-origin" not in answer.headers


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def test_a_policy_is_all_that_its_key_sees(server: Server) -> None:
    with as_(server, "narrow-key") as http:
        assert [one["id"] for one in ok(http.get("/v1/steering/vectors"))["data"]] == ["push"]
        assert [one["id"] for one in ok(http.get("/v1/steering/presets"))["data"]] == ["quiet"]
        models = [one["id"] for one in ok(http.get("/v1/models"))["data"]]
        assert models == [MODEL, f"{MODEL}@quiet"]
        assert ok(complete(http, steering=PUSH))["whipstaff"]["steering"]
        assert ok(complete(http, model=f"{MODEL}@quiet", max_tokens=None))["usage"]["completion_tokens"] <= 20
        assert_refused(complete(http, steering={"vector": "iti"}), 404, "steering.vector")
        assert_refused(complete(http, model=f"{MODEL}@loud"), 404, "model")
        assert_refused(complete(http, decoding=[{"method": "dola"}]), 403, "decoding[0].method")
        assert_refused(complete(http, dola_layers="low"), 403, "dola_layers")
        assert_refused(complete(http, vllm_xargs={"dola_layers": "low"}), 403, "vllm_xargs.dola_layers")
        assert_refused(complete(http, n=3, temperature=1), 403, "n")
        assert_refused(complete(http, max_tokens=21), 403, "max_tokens")
        assert_refused(http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 21}), 403, "max_tokens")
        refused = http.post("/v1/messages", json=CHAT | {"max_tokens": 21})
        assert refused.status_code == 403 and refused.json()["error"]["message"].startswith("max_tokens: ")
        said = ok(http.post("/v1/chat/completions", json=CHAT | {"max_tokens": None, "ignore_eos": True}))
        assert said["usage"]["completion_tokens"] == 20  # who does not say gets what is allowed
        asked = {"model": MODEL, "input": "Why?", "ignore_eos": True}
        assert ok(http.post("/v1/responses", json=asked))["usage"]["output_tokens"] == 20
        for field, status, fields in (
            ("max_output_tokens", 403, {"max_output_tokens": 21}),
            ("steering.vector", 404, {"steering": {"vector": "iti"}}),
            ("previous_response_id", 404, {"previous_response_id": "resp_1"}),
        ):
            assert_refused(http.post("/v1/responses", json=asked | fields), status, field)
        for path, method in (
            ("/invocations", "POST"),
            ("/v1/responses/resp_1/cancel", "POST"),
            ("/v1/steering/vectors/x", "DELETE"),
        ):
            assert_refused(http.request(method, path), 403, None)
    with as_(server, "mild-key") as http:
        assert_refused(complete(http, steering=PUSH), 400, "steering.scale")


DOWNLOAD: dict[str, Any] = {"capture": {"layers": [1]}, "capture_format": "download"}


def test_what_was_read_is_its_keys_and_an_administrators(server: Server, root: Path) -> None:
    with as_(server, "all-key") as http, as_(server, "mild-key") as other, as_(server, "root-key") as admin:
        answers = [ok(complete(http, **DOWNLOAD, max_tokens=3 + index)) for index in range(NUM_FILES)]
        urls = [answer["whipstaff"]["download"]["url"] for answer in answers]
        full = complete(other, **DOWNLOAD)
        assert_refused(full, 429, None)
        assert int(full.headers["retry-after"]) > 60 and "capture_format" in full.json()["error"]["message"]
        for method in ("GET", "DELETE"):
            assert_refused(other.request(method, urls[0]), 403, "id")
        assert http.get(urls[0]).content == admin.get(urls[0]).content != http.get(urls[1]).content
        ok(http.delete(urls[0]))
        ok(admin.delete(urls[1]))
        assert_refused(other.get(urls[0]), 404, "id")
        ok(other.delete(ok(complete(other, **DOWNLOAD))["whipstaff"]["download"]["url"]))
    said = [json.loads(line) for line in (root / "audit.jsonl").read_text().splitlines()]
    told = [(one["key"], one.get("object"), one["status"]) for one in said if one.get("method") == "DELETE"]
    names = [url.rpartition("/")[2] for url in urls]
    assert ("all", names[0], 200) in told and ("root", names[1], 200) in told
    assert any(one["key"] == "mild" and one["status"] == 403 and one.get("method") == "GET" for one in said)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_leaves_no_room_taken(server: Server, stream: bool) -> None:
    with as_(server, "root-key") as http:
        for _ in range(NUM_FILES + 1):
            with server.held(), pytest.raises(httpx.ReadTimeout):
                body = ASK | DOWNLOAD | {"stream": stream, "max_tokens": 400, "ignore_eos": True}
                with http.stream("POST", "/v1/completions", json=body, timeout=2) as answer:
                    answer.read()
        deadline = time.monotonic() + PATIENCE
        while (answer := complete(http, **DOWNLOAD)).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ok(http.delete(ok(answer)["whipstaff"]["download"]["url"]))


def test_a_forced_preset_holds_by_whatever_name(server: Server) -> None:
    with as_(server, "forced-key") as http:
        for model in (MODEL, f"{MODEL}@quiet"):
            said = ok(complete(http, model=model))
            assert said["whipstaff"]["steering"][0]["vector"] == "push", said
        assert_refused(complete(http, model=f"{MODEL}@loud"), 403, "model")
        assert_refused(complete(http, steering={"vector": "iti"}), 404, "steering.vector")
        plan = ok(http.post("/v1/steering/validate", json={"model": MODEL}))["plan"]
        assert plan["steering"][0]["vector"] == "push"


@pytest.mark.parametrize("stream", [False, True])
def test_units_are_taken_and_what_is_not_used_comes_back(server: Server, stream: bool) -> None:
    def left(answer: httpx.Response) -> tuple[int, int]:
        return tuple(int(answer.headers[f"x-ratelimit-remaining-{kind}"]) for kind in ("tokens", "cost"))  # type: ignore[return-value]

    with as_(server, "metered-key") as http:
        usage = ok(complete(http, max_tokens=1))["usage"]
        deadline = time.monotonic() + PATIENCE
        while left(http.get("/v1/models")) != (2000, 3000):  # what was used before is back
            assert time.monotonic() < deadline + 60
            time.sleep(0.5)
        answer = complete(http, max_tokens=400, stream=stream, stop=["e", "a", "\n"])
        assert answer.status_code == 200
        tokens, cost = left(answer)  # at the start of the answer: all that it may come to
        assert abs(tokens - (2000 - usage["prompt_tokens"] - 400)) <= 20 and abs(cost - tokens - 1000) <= 40
        while (after := left(http.get("/v1/models")))[0] <= tokens + 100:  # it ended long before
            assert time.monotonic() < deadline + 60, (tokens, after)
            time.sleep(0.1)
    if stream:
        return  # the other key's units are used up
    with as_(server, "small-key") as http:
        refused = complete(http, max_tokens=200)
        assert_refused(refused, 400, "max_tokens")
        ok(complete(http, max_tokens=60, ignore_eos=True))
        late = complete(http, max_tokens=60, ignore_eos=True)
        if late.status_code != 200:  # on a slow machine they have come back
            assert_refused(late, 429, None)
            assert int(late.headers["retry-after"]) >= 1 and "tokens" in late.json()["error"]["message"]


COUNTED: dict[str, dict[str, Any]] = {
    "plain": {"n": 2, "temperature": 1},
    "guided": {"decoding": {"method": "cfg", "guidance_scale": 2.0, "negative_prompt": [5, 6, 7]}},
    "beams": {"num_beams": 4, "n": 2, "temperature": None},
    "tries": {"decoding": {"method": "opera", "beams": 2, "candidates": 3, "switch_length": 2}, "temperature": None},
    "cut by a text": {"num_beams": 3, "stop": ["e", "a", "\n"], "temperature": None},
    "ranked": {"best_of": 4, "n": 2, "temperature": 1},
    "looks ahead": {"penalty_alpha": 0.6, "top_k": 4},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", COUNTED)
def test_a_key_is_charged_what_the_engine_counted(server: Server, name: str, stream: bool) -> None:
    """Prompts, and what `usage` says was computed for the tokens of answers; where it says nothing, these."""
    with as_(server, "counted-key") as http:
        started, before = time.monotonic(), left(http)
        fields = COUNTED[name] | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
        answer = complete(http, max_tokens=40, **fields)
        assert answer.status_code == 200, answer.text
        usage = json.loads(data_events(answer)[-2])["usage"] if stream else answer.json()["usage"]
        computed = (usage.get("completion_tokens_details") or {}).get("computed_tokens", usage["completion_tokens"])
        cost = usage["prompt_tokens"] + computed + (name == "guided") * 3  # tokens of a second prompt
        assert computed > usage["completion_tokens"] > 0 or name == "plain"
        wanted = usage["prompt_tokens"] + usage["completion_tokens"], cost
        poll_left(http, before, started, 1, lambda used: near(used, wanted))


@pytest.mark.parametrize("name", GONE)
def test_who_goes_away_is_charged_what_was_generated(server: Server, name: str) -> None:
    """An answer that is not streamed says nothing before its end."""
    fields, key = GONE[name], f"gone-{name}-key"
    own: dict[str, Any] = {} if "input" in fields else {"prompt": "def main(", "max_tokens": 400}
    path = "/v1/completions" if own else "/v1/responses"
    body = json.dumps({"model": MODEL, "temperature": 0, "ignore_eos": True} | own | fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    url, width = httpx.URL(server.url), fields.get("best_of", fields.get("num_beams", 1))
    series = "vllm:generation_tokens_total", (("engine", "0"), ("model_name", MODEL))
    with as_(server, key) as http, as_(server, "root-key") as root:
        for _ in range(8):  # on a busy machine the answer may be there before its client has gone away
            started, before, at_first = time.monotonic(), left(http), metrics(root).get(series, 0)
            with server.held() as go_on, socket.create_connection((url.host, url.port or 80)) as sock:
                sock.sendall(head.encode() + body)
                while (num := metrics(root).get(series, 0) - at_first) < 20:
                    assert time.monotonic() < started + PATIENCE
                    go_on()
                    time.sleep(0.05)
            cost = num if "best_of" in fields else num * width  # of beams, vLLM counts the one that settles
            tokens = num / width if "best_of" in fields else num
            used = poll_left(http, before, started, 4, partial(is_between, (tokens, cost), (420, 420 * width)))
            if used[1] < 380 * width:
                return
    raise AssertionError("no client ever went away in time")


def is_between(least: tuple[float, float], most: tuple[float, float], used: tuple[float, float]) -> bool:
    return least[0] <= used[0] <= most[0] and least[1] <= used[1] <= most[1]


def near(used: tuple[float, float], wanted: tuple[float, float]) -> bool:
    return max(abs(used[0] - wanted[0]), abs(used[1] - wanted[1])) <= 3


def left(http: httpx.Client) -> tuple[int, int]:
    """Tokens and cost."""
    headers = http.get("/v1/models").headers
    return int(headers["x-ratelimit-remaining-tokens"]), int(headers["x-ratelimit-remaining-cost"])


def poll_left(
    http: httpx.Client,
    before: tuple[int, int],
    started: float,
    rate: float,
    is_right: Callable[[tuple[float, float]], bool],
) -> tuple[float, float]:
    """Wait until what was used, beside the units that come back every second, is what it should be."""
    deadline = time.monotonic() + PATIENCE
    while True:
        now, back = left(http), rate * (time.monotonic() - started)
        used = before[0] - now[0] + back, before[1] - now[1] + back
        if is_right(used):
            return used
        assert time.monotonic() < deadline, used
        time.sleep(0.1)


def beside(head: bytes, url: httpx.URL, http: httpx.Client) -> httpx.Response:
    """What is answered while a request runs whose body does not come."""
    with socket.create_connection((url.host, url.port or 80)) as sock:
        sock.sendall(head)
        return complete(http)


def test_one_at_a_time_is_one_and_who_goes_away_leaves_room(server: Server) -> None:
    """A request runs from its head on: one whose body is still to come runs as long as the test wants."""
    url = httpx.URL(server.url)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer single-key\r\nContent-Length: 9\r\n\r\n"
    body = ASK | {"stream": True, "max_tokens": 400, "ignore_eos": True}
    with as_(server, "single-key") as http:
        ok(complete(http))
        deadline = time.monotonic() + PATIENCE
        while (refused := beside(head.encode(), url, http)).status_code != 429:  # its head came second, and was refused
            assert time.monotonic() < deadline
        assert refused.headers["retry-after"] == "1" and "as many as may" in refused.json()["error"]["message"]
        for _ in range(3):  # and who goes away leaves room, in the middle of a body or of an answer
            deadline = time.monotonic() + PATIENCE
            while complete(http).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            with as_(server, "single-key") as other, other.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                next(answer.iter_lines())


def test_a_flood_is_refused_and_others_are_served(server: Server) -> None:
    counts: Counter[int] = Counter()
    stop = threading.Event()

    def flood() -> None:
        with as_(server, "single-key") as http:
            while not stop.is_set():
                counts[complete(http, max_tokens=4).status_code] += 1

    with ThreadPoolExecutor() as pool, as_(server, "all-key") as http:
        flooding = [pool.submit(flood) for _ in range(8)]
        for _ in range(10):
            ok(complete(http))
        deadline = time.monotonic() + PATIENCE
        while sum(counts.values()) < NUM_FLOOD and time.monotonic() < deadline:
            time.sleep(0.1)
        stop.set()
        for one in flooding:
            one.result()
    assert counts.keys() <= {200, 429} and counts[429] and counts[200], counts


def test_keys_turn_under_load(server: Server, root: Path) -> None:
    """There is always a valid one, and who uses the newest that was announced is never refused."""
    write(root / "keys.json", turning=["turn-0"])
    wait_for(server, "turn-0", 200)
    current, statuses, stop = ["turn-0"], Counter[int](), threading.Event()

    def use() -> None:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while not stop.is_set():
                headers = {"Authorization": f"Bearer {current[0]}"}
                statuses[http.post("/v1/completions", json=ASK | {"max_tokens": 2}, headers=headers).status_code] += 1

    with ThreadPoolExecutor() as pool:
        using = [pool.submit(use) for _ in range(4)]
        for number in range(1, 4):
            write(root / "keys.json", turning=[f"turn-{number - 1}", f"turn-{number}"])
            if number == 2:
                server.process.send_signal(signal.SIGHUP)
            wait_for(server, f"turn-{number}", 200)
            current[0] = f"turn-{number}"
            time.sleep(0.5)  # for what was sent with the one before
            write(root / "keys.json", turning=[f"turn-{number}"])
            wait_for(server, f"turn-{number - 1}", 401)
        (root / "keys.json").write_text("{")
        time.sleep(2 * PAUSE)
        stop.set()
        for one in using:
            one.result()
    assert statuses.keys() == {200} and statuses[200] > 10, statuses
    write(root / "keys.json")
    wait_for(server, "turn-3", 401)


def wait_for(server: Server, key: str, status: int) -> None:
    deadline = time.monotonic() + PATIENCE
    with as_(server, key) as http:
        while http.get("/v1/models").status_code != status:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_audit_log_says_who_changed_what_and_no_word_that_was_said(server: Server, root: Path) -> None:
    with as_(server, "root-key") as http:
        ok(http.post("/v1/steering/presets", json={"name": "new", "default": {"temperature": 0.5, "max_tokens": 3}}))
        ok(http.delete("/v1/steering/presets/new"))
    with as_(server, "all-key") as http:
        complete(http, prompt="a secret prompt", steering={"vector": "none"})
    said = [json.loads(line) for line in (root / "audit.jsonl").read_text().splitlines()]
    changes = [(one["key"], one["method"], one["route"], one["status"]) for one in said if one["event"] == "change"]
    assert ("root", "POST", "/v1/steering/presets", 201) in changes
    assert ("root", "DELETE", "/v1/steering/presets/{name}", 200) in changes
    last = said[-1]
    assert (last["key"], last["reason"], last["param"]) == ("all", "unknown_name", "steering.vector")
    text = (root / "audit.jsonl").read_text() + server.said()
    assert not [word for word in ("secret prompt", "-key", digest_of("all-key"), digest_of("root-key")) if word in text]
    with as_(server, "root-key") as http:
        assert metrics(http)["whipstaff_refusals_total", (("reason", "concurrency"),)] > 0


# ---- what no client should send


def is_json(text: str) -> bool:
    """Whether every parser reads it: Python's own takes NaN, too."""
    try:
        json.loads(text, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return False
    return True


def test_malformed_bodies_never_find_a_fault_of_the_servers(server: Server) -> None:
    statuses: Counter[int] = Counter()
    clients = threading.local()

    def send(number: int) -> None:
        if not hasattr(clients, "http"):
            clients.http = as_(server, "all-key")
        sent = malformed(number)
        answer = clients.http.post(sent.path, content=sent.content, headers=sent.headers)
        statuses[answer.status_code] += 1
        told = number, sent, answer.text
        assert answer.status_code < 500, told
        if answer.status_code >= 400:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}, told
            assert answer.json()["error"]["param"] or names_no_field(answer.json()["error"]["message"]), told
        events = data_events(answer) if "event-stream" in answer.headers["content-type"] else [answer.text]
        assert all(is_json(event) for event in events if event != "[DONE]"), told

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(send, number) for number in range(NUM_BODIES)]:
            done.result()
    assert statuses[400] > NUM_BODIES / 4 and statuses[200] > NUM_BODIES / 20, statuses
    assert is_alive(server)


def names_no_field(message: str) -> bool:
    """Whether what is wrong is the whole body, or the name of a field that is no text."""
    return any(part in message for part in WHOLE)


WHOLE = (
    *("is no UTF-8", "nested more than", "half of a surrogate pair", "JSON decode error", "Unsupported Media Type"),
    *("no such field", "Input should be a valid dictionary"),
)


def test_every_answer_is_one_that_the_description_of_the_api_has(server: Server, tmp_path: Path) -> None:
    """Schemathesis sends what the description allows, what it forbids, and what other methods and media types would
    be; no answer is an error of the server's or lacks in the description."""
    description = tmp_path / "openapi.json"  # schemathesis would wait ten seconds for it, whatever it is told
    with as_(server, "root-key") as http:
        description.write_bytes(http.get("/openapi.json").content)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(description), "--url", server.url),
        *("--header", "Authorization: Bearer root-key", "--include-path-regex", f"^({'|'.join(DESCRIBED)})$"),
        *("--checks", ",".join(CHECKS), "--phases", PHASES, "--max-examples", str(NUM_EXAMPLES)),
        *("--seed", "1", "--workers", "1", "--no-color", "--request-timeout", "120", "--suppress-health-check", "all"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=3600)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert is_alive(server)


DESCRIBED = ("/v1/steering.*", "/v1/chat/completions", "/v1/completions", "/v1/models/.*", "/ready")
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


def test_clients_that_are_slow_or_leave_do_not_keep_others_waiting(server: Server) -> None:
    url, socks = httpx.URL(server.url), []
    long = json.dumps(ASK | {"stream": True, "max_tokens": 400, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer all-key\r\n"
    head += "Content-Type: application/json\r\n"
    whole = head.encode() + f"Content-Length: {len(long)}\r\n\r\n".encode() + long
    for number in range(60):
        sock = socket.create_connection((url.host, url.port or 80))
        sock.sendall(whole[: [0, 20, len(head) + 20, len(whole) - 5, len(whole), len(whole)][number % 6]])
        if number % 6 == 5:
            sock.close()  # in the middle of the answer, or before it
        else:
            socks.append(sock)
    assert is_alive(server)
    for sock in socks:
        sock.close()
    deadline = time.monotonic() + PATIENCE
    with as_(server, "root-key") as http:
        while metrics(http)["vllm:num_requests_running", (("engine", "0"), ("model_name", MODEL))]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert is_alive(server)

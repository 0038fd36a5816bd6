"""`whipstaff bench`: who gets which fields, what is counted, and what an answer that is none is called."""

import json
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import warm
from serving import API_KEY, MODEL, Server, environment, whipstaff

from whipstaff.server import demo
from whipstaff.server.commands import bench
from whipstaff.server.commands import main as cli
from whipstaff.server.commands.bench import Mix, Share, complaints, summary, table
from whipstaff.server.engine.bench import Answer

PATIENCE = 600  # seconds
SMALL = ("--input-len", "12", "--output-len", "5", "--tokenizer", str(demo.MODELS / "demo"))


def run(url: str, *words: str, **variables: str) -> "subprocess.CompletedProcess[bytes]":
    command = whipstaff("bench", "--base-url", url, *words, forks=True)
    return warm.run(command, timeout=PATIENCE, env=environment() | variables, has_vllm=True)


# ---- who is asked what


def mix(**shares: float) -> Mix:
    return Mix({name: Share(share=share, extra={"kind": name}) for name, share in shares.items()})


def test_shares_are_met_to_the_request() -> None:
    assert Counter(mix(a=0.6, b=0.3, c=0.1).assigned(100, 0)) == {"a": 60, "b": 30, "c": 10}
    assert Counter(mix(a=2, b=1).assigned(10, 0)) == {"a": 7, "b": 3}
    assert Counter(mix(a=1, b=1, c=1).assigned(1, 0)) == {"a": 1}


def test_the_seed_says_the_order() -> None:
    one = mix(a=1, b=1)
    assert one.assigned(40, 3) == one.assigned(40, 3) != one.assigned(40, 4)
    assert one.assigned(40, 3) != sorted(one.assigned(40, 3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {share: 0}", "a.share: Input should be greater than 0"),
        ("a: {share: .inf}", "a.share: Input should be a finite number"),
        ("a: {shares: 1}", "a.share: Field required"),
        ("a: {share: 1, extras: {}}", "a.extras: Extra inputs are not permitted"),
        ("a: {share: 1, extra: {stream: false}}", "a.extra: stream is not said here"),
        ("a: {share: 1, extra: {model: other}}", "a.extra: model is not said here: it has its own field"),
        ("{}", "Dictionary should have at least 1 item"),
        ("a: [", "is no YAML: while parsing a flow node"),
        ("", "Input should be a valid dictionary"),
    ],
)
def test_a_bad_mix_names_its_field(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"mix\.yaml") as error:
        Mix.read(tmp_path / "mix.yaml")
    assert said in str(error.value)


def test_a_mix_may_be_json(tmp_path: Path) -> None:
    (tmp_path / "mix.json").write_text('{"terse": {"share": 0.2, "model": "demo@terse", "extra": {"top_k": 3}}}')
    assert Mix.read(tmp_path / "mix.json").root["terse"].overrides == {"model": "demo@terse", "top_k": 3}


def test_only_the_demo_is_asked_for_what_the_demo_has() -> None:
    assert len(bench.usual_mix("demo").root) > 4
    assert [one.overrides for one in bench.usual_mix("other").root.values()] == [{}]


# ---- what is counted


def answer(ttft: float, *itls: float, error: str = "") -> Answer:
    return Answer(error, 0.0, ttft, list(itls), ttft + sum(itls), 1 + len(itls))


def test_percentiles_are_of_whole_answers_alone() -> None:
    found = summary([answer(0.1, 0.01, 0.03), answer(0.3, 0.02), answer(9.0, error="broke"), answer(0, error="broke")])
    assert (found.requests, found.errors, found.tokens) == (4, {"broke": 2}, 5)
    assert found.times["ttft"]["p50"] == pytest.approx(200)
    assert found.times["itl"]["p50"] == pytest.approx(20)
    assert found.times["e2e"]["p99"] == pytest.approx(0.99 * 320 + 0.01 * 140)


def test_what_came_at_once_is_beside_nothing() -> None:
    """A client that is kept from reading finds several tokens in one go."""
    assert summary([answer(0.1, 0.01)]).of(summary([answer(0.1, 0.0)])).keys() == {"ttft", "e2e"}


def test_methods_stand_beside_plain_requests() -> None:
    found = {
        "plain": summary([answer(0.1, 0.01)]),
        "slow": summary([answer(0.2, 0.02)]),
        "whole": summary([answer(0.5)]),
        "none": summary([answer(0, error="404: no such vector")]),
    }
    lines = table(found, seconds=2.0).splitlines()
    assert len({len(line) for line in lines[2:4]}) == 1
    assert lines[3].split() == ["slow", "1", "0", *["200.0"] * 3, *["20.0"] * 3, *["220.0"] * 3, "1.0", "2.00x"]
    assert lines[4].split()[3:9] == [*["500.0"] * 3, *["-"] * 3]  # one token has no distance
    assert lines[5].split() == ["none", "1", "1", *["-"] * 9, "0.0"]
    assert list(complaints(found)) == ["none: 1 of 1 failed: 404: no such vector"]


# ---- wrong calls


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mix", "/nowhere/mix.yaml"], "No such file or directory: '/nowhere/mix.yaml'"),
        (["--json", "/nowhere/found.json"], "/nowhere: no such folder"),
        (["--png", "found.png"], "--png needs matplotlib, which is not installed: pip install"),
    ],
)
def test_what_would_fail_after_the_load_fails_before(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "--base-url", "http://127.0.0.1:1", *words])
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and last.startswith("whipstaff: ") and said in last


def test_flags_that_follow_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    args = bench.parse(["--base-url", "http://there/v1/", "--backend", "openai-chat"])
    assert (args.base_url, args.endpoint) == ("http://there", "/v1/chat/completions")
    assert args.header == ["Authorization=Bearer secret"] and args.max_concurrency == bench.LANES
    args = bench.parse(["--request-rate", "3", "--header", "authorization=Bearer mine"])
    assert args.header == ["authorization=Bearer mine"]
    assert args.max_concurrency is None  # an open loop: who waits at the client would not be seen


# ---- against any server


class Toy(BaseHTTPRequestHandler):
    """OpenAI's API, of three tokens; `kind` says what goes wrong."""

    asked: ClassVar[list[tuple[str, dict[str, Any], str]]]

    def do_GET(self) -> None:
        is_known = self.path == "/v1/models"
        self._head(200 if is_known else 404)
        self.wfile.write(json.dumps({"data": [{"id": "toy", "root": str(demo.MODELS / "demo")}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("completions"):  # such as vLLM's /tokenize
            self._head(404)
            return
        self.asked.append((self.path, body, self.headers.get("Authorization", "")))
        kind = body.get("kind", "")
        if kind == "refused":
            self._head(422)
            self.wfile.write(json.dumps({"error": {"message": "no such kind", "code": 422}}).encode())
            return
        self._head(200)
        for event in self._events("chat" in self.path, kind):
            self.wfile.write(b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n")
            self.wfile.flush()

    def _events(self, is_chat: bool, kind: str) -> Iterator[dict[str, Any] | bytes]:
        def choice(text: str, reason: str | None = None, **delta: str) -> dict[str, Any]:
            said = {"delta": {"content": text, **delta}} if is_chat else {"text": text}
            return {"choices": [{"index": 0, "finish_reason": reason, **said}]}

        if is_chat:
            yield choice("", role="assistant")
        yield choice("a")
        if kind == "broken":
            return
        if kind == "failed":
            yield {"error": {"message": "the server is shutting down", "code": 503}}
            return
        yield choice("")  # half of a character
        yield choice("b")
        yield choice("", "abort" if kind == "aborted" else "stop")
        yield {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens": 12}}
        yield b"[DONE]"

    def _head(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def toy() -> Iterator[str]:
    Toy.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Toy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


KINDS = ("plain", "refused", "failed", "broken", "aborted")
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.engine
@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_every_kind_is_sent_and_only_whole_answers_count(toy: str, backend: str, tmp_path: Path) -> None:
    shares = {name: {"share": 4 if name == "plain" else 1, "extra": {"kind": name}} for name in KINDS}
    (tmp_path / "mix.json").write_text(json.dumps(shares))
    words = ["--mix", str(tmp_path / "mix.json"), "--json", str(tmp_path / "found.json"), "--num-prompts", "16"]
    done = run(f"{toy}/v1", *words, *SMALL, "--backend", backend, OPENAI_API_KEY="secret")
    assert done.returncode == 1, done.stderr.decode()
    kinds = Counter(body["kind"] for _, body, _ in Toy.asked)
    assert kinds == {"plain": 8 + 1, "refused": 2 + 1, "failed": 2 + 1, "broken": 2 + 1, "aborted": 2 + 1}  # warmed up
    assert {path for path, _, _ in Toy.asked} == {
        "/v1/chat/completions" if backend == "openai-chat" else "/v1/completions"
    }
    assert all(key == "Bearer secret" for _, _, key in Toy.asked)
    assert all(body["model"] == "toy" and body["stream"] and body["temperature"] == 0 for _, body, _ in Toy.asked)
    found = json.loads((tmp_path / "found.json").read_text())
    assert "secret" not in (tmp_path / "found.json").read_text()
    assert {name: one["errors"] for name, one in found["methods"].items()} == {
        "plain": {},
        "refused": {"422: no such kind": 2},
        "failed": {"the server is shutting down": 2},
        "broken": {"the answer broke off: it has no finish_reason": 2},
        "aborted": {"the answer broke off: its finish_reason is 'abort'": 2},
    }
    good = [one for one in found["requests"] if one["method"] == "plain"]
    assert [(len(one["itls"]), one["tokens"]) for one in good] == [(2, 3)] * 8  # neither the role nor the end
    assert all(one["e2e"] + 1e-6 > one["ttft"] + sum(one["itls"]) > 0 for one in good)
    assert b"refused: 2 of 2 failed: 422: no such kind" in done.stderr
    assert b"16/16" in done.stderr and done.stdout.startswith(b" ")  # vLLM's bar, and our table alone


@pytest.mark.engine
def test_where_nobody_answers_it_says_so(tmp_path: Path) -> None:
    done = run("http://127.0.0.1:9", *SMALL)
    assert done.returncode == 1
    assert b"Failed to fetch models from server at http://127.0.0.1:9/v1/models" in done.stderr.splitlines()[-1]


# ---- against this one


def times(found: Mapping[str, Any], name: str) -> list[float]:
    return [found["methods"][name][f"{each}_ms"][f"p{p}"] for each in bench.TIMES for p in bench.PERCENTILES]


@pytest.mark.engine
def test_the_demo_is_measured_without_a_word(demo_server: Server, tmp_path: Path) -> None:
    words = ["--num-prompts", "33", "--json", str(tmp_path / "found.json"), "--png", str(tmp_path / "found.png")]
    done = run(demo_server.url, *words)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["methods"]) == list(Mix.read(demo.MIX).root)
    assert sum(one["requests"] for one in found["methods"].values()) == 33 == len(found["requests"])
    for name, one in found["methods"].items():
        assert one["tokens"] == 32 * one["requests"], name
        assert all(time >= 0 for time in times(found, name)), name  # two tokens may be read at once
    beside_itself = found["methods"]["plain"]["of_plain"]  # without "itl" where most tokens are read at once
    assert beside_itself == {"ttft": 1, "e2e": 1} | ({"itl": 1} if "itl" in beside_itself else {})
    assert (tmp_path / "found.png").stat().st_size > 10_000


@pytest.mark.engine
def test_a_search_has_no_time_between_tokens_and_a_mistake_is_the_methods_own(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        "plain: {share: 2}\n"
        "beams: {share: 1, extra: {decoding: {method: beam_search, num_beams: 2}}}\n"
        "absent: {share: 1, extra: {steering: {vector: absent}}}\n"
    )
    words = ["--mix", str(tmp_path / "mix.yaml"), "--json", str(tmp_path / "found.json"), "--num-prompts", "8"]
    tokenizer = ["--tokenizer", server.models["base"], "--input-len", "12", "--output-len", "5"]
    done = run(server.url, *words, *tokenizer, "--request-rate", "20", OPENAI_API_KEY=API_KEY)
    assert done.returncode == 1, done.stderr.decode()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["model"] == MODEL and found["load"]["request_rate"] == 20
    assert {name: sum(one["errors"].values()) for name, one in found["methods"].items()} == {
        "plain": 0, "beams": 0, "absent": 2,
    }  # fmt: skip
    (said,) = found["methods"]["absent"]["errors"]
    assert said.startswith("404: there is no vector 'absent'")

"""The registry while it runs, over HTTP and two API servers: what is uploaded steers, what is bad leaves no trace, what
is replaced is not mixed up, what is deleted is forgotten, and a crash leaves the old state or the new one."""

import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from asking import assert_refused, metrics, ok, post_json, tokens
from reference import steered
from safetensors.torch import save
from serving import API_KEY, HEADS, HIDDEN, MODEL, SHAPE, Server, serving
from soak import SOAK
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from whipstaff.server.commands import vectors as vectors_cli
from whipstaff.server.engine.frontend.counters import PAUSE_UNSEEN as COUNTERS_PAUSE
from whipstaff.steering.vector_file import Header, packed, parse

from ...steering.test_importers import gguf  # type: ignore[import-not-found] # mypy has tests/ for the top

pytestmark = pytest.mark.engine

ADMIN_KEY = "a key for admins"
LIMIT = 1 << 20  # --max-upload-bytes
BEARER, HEADER = {"Authorization": f"Bearer {ADMIN_KEY}"}, {"X-Whipstaff-Admin-Key": ADMIN_KEY}
NUM_TOKENS, PATIENCE = 8, 30
NUM_CALLS, NUM_CLIENTS = 1000 if SOAK else 304, 8
URIAL = "# Query:\n{prompt}\n\n# Answer:\n"
FILE_PRESET: dict[str, Any] = {"default": {"steering": {"vector": "push", "scale": 2}, "max_tokens": 5}}


def flags(root: Path) -> list[str]:
    return [
        *("--registry", str(root / "registry"), "--admin-key", ADMIN_KEY, "--max-upload-bytes", str(LIMIT)),
        *("--presets", str(root / "presets"), "--api-server-count", "2"),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    (folder / "presets").mkdir()
    (folder / "presets" / "pushy.json").write_text(json.dumps(FILE_PRESET))
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with serving(root, *flags(root)) as running:
        yield running


@pytest.fixture(scope="module")
def clients(server: Server) -> Iterator[list[httpx.Client]]:
    """A client of each API server, on a connection that stays open."""
    with ExitStack() as stack:
        found: dict[int, httpx.Client] = {}
        for _ in range(20):
            client = stack.enter_context(server.client())
            found.setdefault(process_behind(client, server), client)
            if len(found) == 2:
                break
        assert len(found) == 2
        yield list(found.values())


def process_behind(client: httpx.Client, server: Server) -> int:
    """The process that a client's connection goes to."""
    with client.stream("GET", "/v1/models") as answer:
        _, port = answer.extensions["network_stream"].get_extra_info("client_addr")
        answer.read()
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if any(found.raddr and found.raddr.port == port for found in process.net_connections("tcp")):
            return process.pid
    raise AssertionError("no process has that connection")


def test_what_was_read_is_fetched_from_any_process(clients: list[httpx.Client], server: Server) -> None:
    first, second = clients
    body = {"model": MODEL, "prompt": "def main(", "max_tokens": 4, "capture": {"layers": [1]}}
    said = ok(first.post("/v1/completions", json=body | {"capture_format": "download"}))["whipstaff"]["download"]
    assert len(second.get(said["url"]).content) == said["bytes"]
    by_admin = httpx.get(f"{server.url}{said['url']}", headers=BEARER)
    assert by_admin.status_code == 200 and len(by_admin.content) == said["bytes"]
    assert ok(second.delete(said["url"]))["deleted"]
    for client in clients:
        assert_refused(client.get(said["url"]), 404, "id")


class Reference:
    """What steering by an uploaded vector should come to, in plain transformers."""

    def __init__(self, server: Server) -> None:
        self.model = LlamaForCausalLM.from_pretrained(server.models["base"], dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(server.models["base"])

    def greedy(self, prompt: list[int], add: Tensor, layer: int = 1, scale: float = 1.0) -> list[int]:
        edit = steered.Edit("resid_post", layer, scale, None, add, lambda position, length: position >= length - 1)
        return steered.greedy(self.model, prompt, NUM_TOKENS, [edit])


@pytest.fixture(scope="module")
def reference(server: Server) -> Reference:
    return Reference(server)


def direction(number: int) -> Tensor:
    return 2.0 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1000 + number))


def vector_file(add: Tensor, layer: int = 1, **said: Any) -> bytes:
    return packed(Header(method="caa", model=SHAPE, **said), {f"resid_post.{layer}.add": add})


def put(client: httpx.Client, name: str, data: bytes, headers: Any = BEARER, **params: Any) -> httpx.Response:
    return client.post("/v1/steering/vectors", params={"name": name, **params}, content=data, headers=headers)


def remove(client: httpx.Client, name: str) -> httpx.Response:
    return client.delete(f"/v1/steering/vectors/{name}", headers=BEARER)


def put_preset(client: httpx.Client, name: str, **body: Any) -> httpx.Response:
    return client.post("/v1/steering/presets", json={"name": name, **body}, headers=BEARER)


def complete(client: httpx.Client, prompt: Any, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
    return post_json(client, "/v1/completions", body | {"ignore_eos": True} | fields)


def chat(client: httpx.Client, content: str = "Why?", **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    return post_json(client, "/v1/chat/completions", body | fields)


@contextmanager
def nothing_left(clients: list[httpx.Client]) -> Iterator[None]:
    """Afterwards the workers hold the vectors that the registry names and no others, and no slot is taken. (What they
    hold before may be more: an aborted request lives until Python collects it.)"""
    yield
    deadline = time.monotonic() + PATIENCE
    named = {one["digest"] for one in ok(clients[0].get("/v1/steering/vectors"))["data"] if one["fits"]}
    while (now := metrics(clients[0]))["whipstaff_vectors_held", ()] != len(named) or now["whipstaff_slots_in_use", ()]:
        assert time.monotonic() < deadline, (named, {k: v for k, v in now.items() if k[0].startswith("whipstaff_v")})
        time.sleep(0.1)


def listing(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted((root / "registry").rglob("*")) if path.is_file()}


# ---- vectors


def test_an_uploaded_vector_steers_as_its_numbers_say(clients: list[httpx.Client], reference: Reference) -> None:
    prompt, data = [9, 8, 7, 6, 5], vector_file(direction(0), description="one")
    with nothing_left(clients):
        said = ok(put(clients[0], "fresh", data))
        assert (said["digest"], said["replaced"], said["fits"]) == (parse(data).digest, None, True)
        assert said["read_only"] is False
        for client in clients:  # at once, whichever API server was told
            assert ok(client.get("/v1/steering/vectors/fresh"))["description"] == "one"
            answer = complete(client, prompt, steering={"vector": "fresh"})
            assert tokens(answer) == reference.greedy(prompt, direction(0))
            assert answer.json()["whipstaff"]["steering"][0]["digest"] == said["digest"]
        again = put(clients[1], "fresh", data)
        assert again.status_code == 200 and again.json()["replaced"] == said["digest"]
        assert ok(remove(clients[1], "fresh")) == {"id": "fresh", "object": "steering.vector", "deleted": True}
        for client in clients:
            assert_refused(complete(client, prompt, steering={"vector": "fresh"}), 404, "steering.vector")
            assert_refused(client.get("/v1/steering/vectors/fresh"), 404, None)
        assert_refused(remove(clients[0], "fresh"), 404, None)


def test_foreign_files_become_vectors_over_http(clients: list[httpx.Client], reference: Reference) -> None:
    prompt = [30, 31, 32, 33]
    control = gguf(("direction.1", direction(1)))
    tensor = Path(os.environ.get("TMPDIR", "/tmp")) / f"happy-{os.getpid()}.pt"
    torch.save(direction(1), tensor)
    with nothing_left(clients):
        said = ok(put(clients[0], "control", control))
        assert (said["method"], said["provenance"]["format"]) == ("control_vector", "repeng")
        said = ok(put(clients[1], "happy", tensor.read_bytes(), filename="happy.pt", layer=1, scale=1.0))
        assert said["provenance"]["format"] == "easysteer" and said["layers"] == [1]
        tensor.unlink()
        for client, name in zip(clients, ("control", "happy"), strict=True):
            entry = {"vector": name, "where": "each_last"}
            assert tokens(complete(client, prompt, steering=entry)) == reference.greedy(prompt, direction(1))
        for name in ("control", "happy"):
            ok(remove(clients[0], name))


def test_a_replaced_vector_finds_no_kv_of_the_old_one(clients: list[httpx.Client], reference: Reference) -> None:
    prompt = list(range(40, 140))  # three blocks of KV
    with nothing_left(clients):
        for number in (2, 3, 2):
            ok(put(clients[number % 2], "turn", vector_file(direction(number), where="all")))
            edit = steered.Edit("resid_post", 1, 1.0, None, direction(number), lambda position, length: True)
            wanted = steered.greedy(reference.model, prompt, NUM_TOKENS, [edit])
            for client in [*clients, *clients]:
                assert tokens(complete(client, prompt, steering={"vector": "turn"})) == wanted
        ok(remove(clients[0], "turn"))


def test_a_request_keeps_the_version_that_it_began_with(clients: list[httpx.Client], server: Server) -> None:
    fields = {"prompt": [5, 6, 7], "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    with nothing_left(clients):
        old = ok(put(clients[0], "kept", vector_file(direction(4))))["digest"]
        alone = ok(complete(clients[0], steering={"vector": "kept"}, **fields))["choices"][0]["text"]
        with server.client() as streaming:
            body = {"model": MODEL, "stream": True, "steering": {"vector": "kept"}, **fields}
            with streaming.stream("POST", "/v1/completions", json=body) as answer:
                lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
                chunks = [json.loads(next(lines)[6:])]
                new = ok(put(clients[1], "kept", vector_file(direction(5))))["digest"]
                ok(remove(clients[0], "kept"))
                chunks += [json.loads(line[6:]) for line in lines]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == alone
        assert chunks[-1]["whipstaff"]["steering"][0]["digest"] == old != new


def test_a_client_that_goes_away_lets_go_of_its_vector(clients: list[httpx.Client], server: Server) -> None:
    with nothing_left(clients):
        ok(put(clients[0], "left", vector_file(direction(6))))
        body = {"model": MODEL, "prompt": [5, 6], "max_tokens": 400, "ignore_eos": True, "stream": True}
        data = json.dumps(body | {"steering": {"vector": "left"}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        url = httpx.URL(server.url)
        connections = [socket.create_connection((url.host, url.port)) for _ in range(24)]  # more than run at once
        for connection in connections:
            connection.sendall(head.encode() + data)
        time.sleep(0.3)
        ok(remove(clients[1], "left"))
        for connection in connections:
            connection.close()


# ---- the keys


def test_a_renamed_vector_is_the_same_under_another_name(clients: list[httpx.Client]) -> None:
    """On both servers; a name that is taken, a bad one, one of a file and one that nobody has change nothing."""
    one, other = clients
    first = ok(put(one, "first", vector_file(direction(70))))
    ok(put(one, "second", vector_file(-2 * direction(70))))
    assert ok(other.get("/v1/steering/vectors/first"))["cosines"]["second"] == pytest.approx(-1)
    before = ok(complete(one, [5, 6, 7], steering={"vector": "first"}))
    for name, to, status, param in (
        ("first", "second", 409, "name"),
        ("first", "no/name", 400, "name"),
        ("first", "push", 409, "name"),
        ("push", "free", 409, "name"),
        ("nobody", "free", 404, None),
    ):
        answer = one.patch(f"/v1/steering/vectors/{name}", json={"name": to}, headers=BEARER)
        assert_refused(answer, status, param)
    assert (
        one.patch(
            "/v1/steering/vectors/first", json={"name": "free"}, headers=HEADER | {"X-Whipstaff-Admin-Key": ""}
        ).status_code
        == 401
    )
    renamed = ok(one.patch("/v1/steering/vectors/first", json={"name": "third"}, headers=BEARER))
    assert renamed["id"] == "third" and renamed["digest"] == first["digest"]
    for client in clients:
        assert_refused(complete(client, [5, 6, 7], steering={"vector": "first"}), 404, "steering.vector")
        assert tokens(ok(complete(client, [5, 6, 7], steering={"vector": "third"}))) == tokens(before)
    for name in ("second", "third"):
        ok(remove(one, name))


def test_only_the_admin_key_changes_anything(clients: list[httpx.Client], server: Server) -> None:
    data = vector_file(direction(7))
    with httpx.Client(base_url=server.url) as anybody:
        assert put(anybody, "x", data, {}).status_code == 401
        assert put(anybody, "x", data, HEADER).status_code == 401  # vLLM wants the user's key beside it
        for path in ("/v1/models", "/v1/steering/../models"):
            assert anybody.get(path, headers=BEARER).status_code == 401
        assert anybody.get("/v1/steering/vectors", headers=BEARER).status_code == 200
        assert ok(put(anybody, "x", data, BEARER))["id"] == "x"
        assert remove(anybody, "x").status_code == 200
    client = clients[0]
    user = {"Authorization": f"Bearer {API_KEY}"}
    for headers in (user, user | {"X-Whipstaff-Admin-Key": "a key"}, user | {"X-Whipstaff-Admin-Key": ""}):
        assert_refused(put(client, "x", data, headers), 401, None)
        assert_refused(client.delete("/v1/steering/vectors/x", headers=headers), 401, None)
        assert_refused(client.post("/v1/steering/presets", json={"name": "x"}, headers=headers), 401, None)
        assert_refused(client.delete("/v1/steering/presets/x", headers=headers), 401, None)
    assert ok(put(client, "x", data, user | HEADER))["id"] == "x"
    ok(remove(client, "x"))
    assert ADMIN_KEY not in server.said()


# ---- what is bad


def foreign(**arrays: Any) -> bytes:
    return save({name: torch.as_tensor(array) for name, array in arrays.items()})


def test_what_is_bad_is_refused_and_leaves_no_trace(clients: list[httpx.Client], root: Path) -> None:
    sound, client = vector_file(direction(8)), clients[0]
    header, elsewhere = (Header(method=method, model=SHAPE) for method in ("caa", "vector"))
    other = SHAPE.model_copy(update={"hidden_size": 64, "head_dim": 16})
    with_heads = SHAPE.model_copy(update={"num_kv_heads": HEADS})
    nan = direction(8).clone()
    nan[3] = float("nan")
    lying = bytearray(sound)
    lying[:8] = (1 << 40).to_bytes(8, "little")
    prefix = {f"attn_head.{at}.{part}": torch.ones(2, HEADS, 32) for at in range(3) for part in ("key", "value")}
    pickled = b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."
    with nothing_left(clients):
        before = listing(root)
        for name in ("../up", "a/b", "", ".hidden", "-x", "x" * 129, "nul\0", "a b", "é", "..", "%2e%2e"):
            assert_refused(put(client, name, sound), 400, "name")
        for data, status, param in (
            (b"", 400, "body"),
            (sound[:-100], 400, "body"),
            (bytes(lying), 400, "body"),
            (save({"resid_post.1.add": nan}, {"whipstaff": header.model_dump_json()}), 400, "body"),
            (save({"resid_post.1.add": nan.int()}, {"whipstaff": header.model_dump_json()}), 400, "body"),
            (packed(Header(method="caa", model=other), {"resid_post.0.add": torch.ones(64)}), 409, "name"),
            (packed(Header(method="prefix_kv", model=with_heads), prefix), 422, "name"),
            (packed(elsewhere, {"mlp_in.1.add": direction(8)}), 422, "name"),
            (foreign(whatever=[1.0, 2.0]), 400, "body"),
            (b"\x00" * (LIMIT + 1), 413, None),
        ):
            answer = put(client, "bad", data)
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["param"] in (param, "format"), answer.text
        for data, filename in ((pickled, "x.pt"), (pickled, "x.npy"), (b"\x93NUMPY" + pickled, "x.npy")):
            assert put(client, "bad", data, filename=filename).status_code == 400
        for params in ({"layer": "many"}, {"weights": "/etc/passwd"}, {"nose": "1"}, {"format": "angular"}):
            assert put(client, "bad", gguf(("direction.1", direction(8))), **params).status_code == 400
        assert_refused(put(client, "push", sound), 409, "name")
        assert_refused(remove(client, "push"), 409, "name")
        for name in ("%2e%2e%2fmanifest.json", "%2e%2e", "absent"):
            assert remove(client, name).status_code == 404
        assert listing(root) == before
    answer = put(client, "bad", packed(Header(method="caa", model=other), {"resid_post.0.add": torch.ones(64)}))
    assert "hidden 64" in answer.json()["error"]["message"] and "hidden 128" in answer.json()["error"]["message"]
    answer = put(client, "bad", packed(Header(method="prefix_kv", model=with_heads), prefix))
    assert "--steering-sites attention" in answer.json()["error"]["message"]
    answer = put(client, "bad", packed(elsewhere, {"mlp_in.1.add": direction(8)}))
    assert "--steering-sites mlp_in" in answer.json()["error"]["message"]


def test_a_full_disk_refuses_changes_and_loses_nothing(clients: list[httpx.Client], server: Server, root: Path) -> None:
    """A limit of the running process stands for the disk; it is met by the body, then by the manifest alone."""
    ok(put(clients[0], "kept", vector_file(direction(20))))
    before, process = listing(root), psutil.Process(process_behind(clients[0], server))
    large, text = vector_file(direction(21), description="x" * 4000), {"description": "y" * 4000}
    limit = process.rlimit(psutil.RLIMIT_FSIZE)
    for most in (100, len(json.dumps(text)) + 50):
        process.rlimit(psutil.RLIMIT_FSIZE, (most, limit[1]))
        try:
            for refused in (put(clients[0], "kept", large), put_preset(clients[0], "p", **text)):
                assert_refused(refused, 507, None)
        finally:
            process.rlimit(psutil.RLIMIT_FSIZE, limit)
        assert listing(root) == before
        assert ok(complete(clients[0], [9, 8, 7], steering={"vector": "kept"}))
    with nothing_left(clients):
        ok(put(clients[0], "kept", large))
        ok(remove(clients[0], "kept"))


def test_a_body_that_does_not_end_is_cut_off(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b"\0" * LIMIT

    with server.client() as client:
        try:
            answer = client.post("/v1/steering/vectors", params={"name": "x"}, content=endless(), headers=BEARER)
            assert answer.status_code == 413
        except httpx.TransportError:
            pass  # the server has answered and hung up


# ---- presets


def test_presets_are_models_on_both_servers(clients: list[httpx.Client], server: Server) -> None:
    rows = [{row["id"]: row for row in ok(client.get("/v1/models"))["data"]} for client in clients]
    assert all(each[f"{MODEL}@pushy"]["parent"] == MODEL for each in rows)
    plain, wanted = (
        ok(complete(clients[0], "def main(", max_tokens=5, **more))["choices"][0]["text"]
        for more in ({}, {"steering": {"vector": "push", "scale": 2}})
    )
    assert plain != wanted
    body = {"model": f"{MODEL}@pushy", "prompt": "def main(", "temperature": 0, "ignore_eos": True}
    for client in clients:
        answer = ok(post_json(client, "/v1/completions", body))
        assert (answer["choices"][0]["text"], answer["model"]) == (wanted, f"{MODEL}@pushy")
        assert answer["usage"]["completion_tokens"] == 5
        assert answer["whipstaff"]["preset"]["id"] == "pushy"
        assert answer["whipstaff"]["steering"][0]["vector"] == "push"
        off = ok(post_json(client, "/v1/completions", body | {"steering": [], "max_tokens": 5}))
        assert off["choices"][0]["text"] == plain
    official = openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0)
    assert f"{MODEL}@pushy" in [model.id for model in official.models.list()]
    chunks = list(
        official.completions.create(
            model=f"{MODEL}@pushy", prompt="def main(", temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == wanted
    assert {chunk.model for chunk in chunks} == {f"{MODEL}@pushy"}
    assert chunks[-1].model_extra["whipstaff"]["preset"]["id"] == "pushy"  # type: ignore[index]


def test_a_preset_speaks_before_the_user_does(clients: list[httpx.Client]) -> None:
    examples = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    body = {"default": {"system": "Be brief.", "examples": examples, "prompt": URIAL}, "forced": {"temperature": 0}}
    made = put_preset(clients[0], "urial", description="in-context alignment", **body)
    assert made.status_code == 201 and made.json()["description"] == "in-context alignment"
    asked = {"role": "user", "content": "Why?"}
    for first, given in (("Be brief.", []), ("Be long.", [{"role": "system", "content": "Be long."}])):
        by_hand = {"messages": [{"role": "system", "content": first}, *examples, asked]}
        by_preset = {"model": f"{MODEL}@urial", "messages": [*given, asked], "max_tokens": 8}
        whole = {"model": MODEL, **by_hand, "max_tokens": 8, "temperature": 0}
        wanted = ok(post_json(clients[0], "/v1/chat/completions", whole))
        for client in clients:
            answer = ok(post_json(client, "/v1/chat/completions", by_preset))
            assert answer["choices"][0]["message"] == wanted["choices"][0]["message"]
            assert answer["usage"] == wanted["usage"]
            assert answer["whipstaff"] == {
                "preset": {"id": "urial", "digest": made.json()["digest"]},
                "steering": [],
                "decoding": [],
                "warnings": [],
            }
    wanted = ok(complete(clients[0], URIAL.replace("{prompt}", "Why?")))["choices"][0]["token_ids"]
    body = {"model": f"{MODEL}@urial", "prompt": "Why?"} | {
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    assert tokens(post_json(clients[1], "/v1/completions", body)) == wanted
    both = ok(post_json(clients[1], "/v1/completions", body | {"prompt": ["Why?", "Why?"]}))
    assert [choice["token_ids"] for choice in both["choices"]] == [wanted, wanted]
    assert_refused(post_json(clients[0], "/v1/completions", body | {"prompt": [5, 6]}), 400, "prompt")
    assert_refused(post_json(clients[0], "/v1/completions", body | {"temperature": 0.5}), 400, "temperature")
    ok(clients[1].delete("/v1/steering/presets/urial", headers=BEARER))
    for client in clients:
        assert_refused(post_json(client, "/v1/completions", body), 404, "model")


def test_what_a_preset_forces_is_not_the_requests_to_say(clients: list[httpx.Client]) -> None:
    ok(put(clients[0], "goes", vector_file(direction(9))))
    body = {"forced": {"steering": [{"vector": "goes"}], "system": "Be brief.", "max_tokens": 4, "seed": 3}}
    ok(put_preset(clients[0], "strict", **body))
    model = {"model": f"{MODEL}@strict"}
    answer = post_json(clients[1], "/v1/chat/completions", {**model, "messages": [{"role": "user", "content": "x"}]})
    assert ok(answer)["usage"]["completion_tokens"] <= 4
    assert answer.json()["whipstaff"]["steering"][0]["vector"] == "goes"
    for fields, param in (
        ({"steering": {"vector": "push"}}, "steering"),
        ({"vllm_xargs": {"steering": '{"vector": "push"}'}}, "vllm_xargs.steering"),
        ({"max_tokens": 9}, "max_tokens"),
        ({"max_completion_tokens": 9}, "max_completion_tokens"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]}, "messages[0]"),
    ):
        assert_refused(chat(clients[0], **(model | {"max_tokens": None} | fields)), 400, param)
    assert_refused(complete(clients[0], "x", **model, max_tokens=None), 400, "model")  # it speaks in chats
    ok(remove(clients[1], "goes"))
    for client in clients:
        gone = chat(client, max_tokens=None, **model)
        assert_refused(gone, 404, "model")
        assert "'strict'" in gone.json()["error"]["message"] and "'goes'" in gone.json()["error"]["message"]
    ok(clients[0].delete("/v1/steering/presets/strict", headers=BEARER))


def test_a_preset_that_no_request_could_use_is_not_taken(clients: list[httpx.Client], root: Path) -> None:
    before = listing(root)
    for body, status, param in (
        ({"default": {"steering": {"vector": "absent"}}}, 404, "default.steering.vector"),
        ({"forced": {"steering": [{"vector": "misfit"}]}}, 409, "forced.steering[0].vector"),
        ({"default": {"decoding": {"method": "proxy_tuning", "expert": "x", "antiexpert": "anti"}}}, 404, None),
        ({"default": {"temperature": -1}}, 400, "default.temperature"),
        ({"default": {"temperature": "hot"}}, 400, "default.temperature"),
        ({"default": {"top_p": 3}, "forced": {"temperature": 0.5}}, 400, "default.top_p"),
        ({"default": {"nose": 1}}, 400, "default.nose"),
        ({"nose": 1}, 400, "nose"),
        ({"default": {"seed": 1}, "forced": {"seed": 1}}, 400, None),
        ({"default": {"prompt": "no room"}}, 400, "default.prompt"),
        ({"default": {"system": "word " * 600}}, 400, "default.system"),
        ({"default": {"examples": [{"role": "nobody", "content": "x"}]}}, 400, "default.examples[0].role"),
    ):
        answer = put_preset(clients[0], "bad", **body)
        assert answer.status_code == status, (body, answer.text)
        if param is not None:
            assert answer.json()["error"]["param"] == param, (body, answer.text)
    assert_refused(put_preset(clients[0], "../x"), 400, "name")
    assert_refused(put_preset(clients[0], "pushy"), 409, "name")
    assert_refused(clients[0].post("/v1/steering/presets", content=b"[", headers=BEARER), 400, None)
    assert_refused(clients[0].delete("/v1/steering/presets/pushy", headers=BEARER), 409, "name")
    assert_refused(complete(clients[0], "x", model=f"{MODEL}@absent"), 404, "model")
    assert complete(clients[0], "x", model="absent@pushy").status_code == 404
    assert listing(root) == before


def test_preset_files_are_read_again_when_they_change(clients: list[httpx.Client], root: Path, server: Server) -> None:
    def length() -> list[int]:
        answers = [
            post_json(client, "/v1/completions", {"model": f"{MODEL}@pushy", "prompt": "x"}) for client in clients
        ]
        return [ok(answer)["whipstaff"]["steering"][0]["scale"] for answer in answers]

    path = root / "presets" / "pushy.json"
    assert length() == [2, 2]
    path.write_text(json.dumps({"default": {"steering": {"vector": "push", "scale": 1.5}}}))
    assert length() == [1.5, 1.5]
    path.write_text('{"default": {"steering": {"vector": "absent"}}}')
    assert length() == [1.5, 1.5]  # and the log says why
    assert "pushy.json is not taken: there is no vector 'absent'" in server.said()
    (root / "presets" / "other.json").write_text('{"default": {"seed": 1}}')
    ids = [{row["id"] for row in ok(client.get("/v1/steering/presets"))["data"]} for client in clients]
    assert ids == [{"pushy", "other"}] * 2
    (root / "presets" / "other.json").unlink()
    path.write_text(json.dumps(FILE_PRESET))
    assert length() == [2, 2]


def test_metrics_are_those_of_both_servers(clients: list[httpx.Client]) -> None:
    def ask(client: httpx.Client) -> None:
        ok(post_json(client, "/v1/completions", {"model": f"{MODEL}@pushy", "prompt": "x", "ignore_eos": True}))

    key = ("whipstaff_preset_requests_total", (("preset", "pushy"),))
    ended = ("whipstaff_requests_total", (("method", "caa"), ("outcome", "length")))
    ask(clients[0])  # from here on its steering is in the tables
    time.sleep(2 * COUNTERS_PAUSE)
    before = [metrics(client) for client in clients]
    for client in clients:
        ask(client)
        ok(complete(client, "x", steering={"vector": "push", "scale": 0.321}))
    time.sleep(2 * COUNTERS_PAUSE)
    for client, then in zip(clients, before, strict=True):
        now = metrics(client)
        assert now[key] - then[key] == 2 and now[ended] - then[ended] == 4
        assert now["whipstaff_slots", ()] == 16 and now["whipstaff_vectors_loaded", ()] == 11
        assert now["whipstaff_selftest_ok", ()] == 1
        uploads = "whipstaff_table_uploads_total", ()
        assert now[uploads] - then[uploads] == 1  # the engine's, counted by one of them
        assert not [labels for (name, labels) in now if name.startswith("whipstaff_") and dict(labels).get("pid")]


def test_metrics_say_what_an_administrator_did(clients: list[httpx.Client]) -> None:
    def changes() -> dict[tuple[str, ...], float]:
        return {
            tuple(value for _, value in labels): number
            for (name, labels), number in metrics(clients[0]).items()
            if name == "whipstaff_registry_changes_total"
        }

    before = changes()
    assert put(clients[0], "counted", vector_file(direction(30))).status_code == 201
    assert put(clients[1], "counted", vector_file(direction(31))).status_code == 200
    assert put(clients[0], "counted", b"no file").status_code == 400
    assert remove(clients[0], "counted").status_code == 200
    assert remove(clients[1], "counted").status_code == 404
    assert put_preset(clients[0], "pushy").status_code == 409
    grown = {key: number - before.get(key, 0) for key, number in changes().items()}
    assert {key: number for key, number in grown.items() if number} == {
        ("add", "vector", "done"): 1,
        ("replace", "vector", "done"): 1,
        ("add", "vector", "refused"): 1,
        ("remove", "vector", "done"): 1,
        ("remove", "vector", "refused"): 1,
        ("add", "preset", "refused"): 1,
    }


# ---- the command line


def test_the_command_line_lists_adds_and_removes(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHIPSTAFF_URL", server.url)
    monkeypatch.setenv("WHIPSTAFF_ADMIN_KEY", ADMIN_KEY)
    (tmp_path / "calm.gguf").write_bytes(gguf(("direction.2", direction(10))))
    (tmp_path / "calm.safetensors").write_bytes(vector_file(direction(11)))
    digest = parse(vector_file(direction(11))).digest
    assert vectors_cli.main(["add", str(tmp_path / "calm.gguf"), "--scale", "3"]) == 0
    assert capsys.readouterr().out.startswith("calm: added, control_vector, sha256 ")
    assert vectors_cli.main(["add", str(tmp_path / "calm.safetensors")]) == 0
    assert capsys.readouterr().out == f"calm: replaced, caa, sha256 {digest}\n"
    assert vectors_cli.main(["add", str(tmp_path / "calm.safetensors"), "--api-key", API_KEY]) == 0
    assert "the same" in capsys.readouterr().out
    assert vectors_cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert ["calm", "caa", digest[:12], "1"] in [line.split() for line in shown.splitlines()]
    assert "misfit" in shown and "cannot be used" in shown
    assert vectors_cli.main(["remove", "calm"]) == 0
    assert vectors_cli.main(["remove", "calm"]) == 1
    assert "answers 404: there is no vector 'calm'" in capsys.readouterr().err
    assert vectors_cli.main(["add", str(tmp_path)]) == 1
    assert "`whipstaff vectors convert`" in capsys.readouterr().err
    assert vectors_cli.main(["list", "--url", "http://127.0.0.1:9"]) == 1
    monkeypatch.delenv("WHIPSTAFF_ADMIN_KEY")
    assert vectors_cli.main(["list"]) == 1
    assert "the user's key is --api-key" in capsys.readouterr().err


# ---- under load


def test_a_thousand_changes_and_uses_lose_and_mix_nothing(
    clients: list[httpx.Client], server: Server, reference: Reference
) -> None:
    prompts = [[7, 8, 9], list(range(50, 120)), list(range(50, 118))]
    files = [vector_file(direction(20 + number)) for number in range(5)]
    wanted = {
        (parse(data).digest, index): reference.greedy(prompt, direction(20 + number))
        for number, data in enumerate(files)
        for index, prompt in enumerate(prompts)
    }
    names, counts = ["one", "two", "three"], {"put": 0, "used": 0, "gone": 0, "left": 0, "removed": 0}
    lock = threading.Lock()

    def count(what: str) -> None:
        with lock:
            counts[what] += 1

    def act(client: httpx.Client, dice: random.Random) -> None:
        name, roll = dice.choice(names), dice.random()
        if roll < 0.2:
            ok(put(client, name, dice.choice(files)))
            count("put")
        elif roll < 0.3:
            assert remove(client, name).status_code in (200, 404)
            count("removed")
        elif roll < 0.4:
            body = {"model": MODEL, "prompt": prompts[1], "max_tokens": 64, "stream": True, "ignore_eos": True}
            with client.stream("POST", "/v1/completions", json=body | {"steering": {"vector": name}}) as answer:
                assert answer.status_code in (200, 404)
                for _ in zip(range(dice.randrange(4)), answer.iter_lines(), strict=False):
                    pass
            count("left")
        else:
            index = dice.randrange(len(prompts))
            answer = complete(client, prompts[index], steering={"vector": name})
            if answer.status_code == 404:
                count("gone")
                return
            digest = ok(answer)["whipstaff"]["steering"][0]["digest"]
            assert tokens(answer) == wanted[digest, index]
            count("used")

    def play(seed: int) -> None:
        dice = random.Random(seed)
        with server.client() as client:
            for _ in range(NUM_CALLS // NUM_CLIENTS):
                act(client, dice)

    with nothing_left(clients):
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            list(pool.map(play, range(NUM_CLIENTS)))
        for name in names:
            remove(clients[0], name)
    assert sum(counts.values()) == NUM_CALLS, counts
    assert counts["used"] > NUM_CALLS / 5 and counts["put"] > NUM_CALLS / 10, counts


def test_every_api_server_tells_of_a_fit_and_cancels_it(clients: list[httpx.Client], root: Path) -> None:
    """Whichever has it made; what comes of one is there for both at once."""
    pairs = [{"positive": f"good {a} {b} " * 9, "negative": f"bad {a} {b} " * 9} for a in range(60) for b in range(60)]
    body = {"method": "caa", "name": "shared", "data": pairs, "options": {"template": "none", "layers": "1"}}
    fits = "/v1/steering/fits"
    with nothing_left(clients):
        long = clients[0].post(fits, json=body, headers=BEARER).json()["id"]
        assert_refused(clients[1].post(fits, json=body, headers=BEARER), 409, "name")
        assert [one["id"] for one in ok(clients[1].get(fits, headers=BEARER))["data"]] == [long]
        assert ok(clients[1].delete(f"{fits}/{long}", headers=BEARER))["deleted"] is False
        deadline = time.monotonic() + 10 * PATIENCE
        while (said := ok(clients[1].get(f"{fits}/{long}", headers=BEARER)))["ended"] is None:
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        assert said["state"] == "cancelled"
        short = clients[1].post(fits, json=body | {"data": pairs[::90]}, headers=BEARER).json()["id"]
        while (said := ok(clients[0].get(f"{fits}/{short}", headers=BEARER)))["ended"] is None:
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        assert said["state"] == "done", said["error"]
        for client in clients:
            assert ok(client.get("/v1/steering/vectors/shared"))["digest"] == said["digest"]
        ok(remove(clients[0], "shared"))
        for number in (long, short):
            assert ok(clients[0].delete(f"{fits}/{number}", headers=BEARER))["deleted"] is True
    assert ok(clients[1].get(fits, headers=BEARER))["data"] == []
    assert [path.name for path in (root / "registry" / "fits").iterdir()] == ["lock"]


# ---- crashes; the last test, since it ends the server


def test_a_server_killed_in_an_upload_comes_back_as_it_was(
    server: Server, clients: list[httpx.Client], root: Path, reference: Reference
) -> None:
    prompt = [9, 8, 7]
    data = vector_file(direction(30))
    digest = ok(put(clients[0], "lasting", data))["digest"]
    ok(put_preset(clients[1], "lasting", default={"steering": {"vector": "lasting"}, "max_tokens": NUM_TOKENS}))
    before = listing(root)
    large = vector_file(direction(31), description="x" * 4000)
    head = f"POST /v1/steering/vectors?name=lasting HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
    head += f"Content-Length: {len(large)}\r\n\r\n"
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + large[: len(large) // 2])
        time.sleep(0.5)
        server.kill()
    assert listing(root) == before
    (root / "registry" / "objects" / ".half").write_bytes(b"half of a file")  # as a machine that stops leaves it
    with serving(root, *flags(root)[:-2]) as again, again.client() as client:
        assert ok(client.get("/v1/steering/vectors/lasting"))["digest"] == digest
        wanted = reference.greedy(prompt, direction(30))
        assert tokens(complete(client, prompt, steering={"vector": "lasting"})) == wanted
        assert tokens(complete(client, prompt, model=f"{MODEL}@lasting", max_tokens=None)) == wanted
        assert listing(root) == before
        with nothing_left([client]):  # what was there at the start goes, too
            assert ok(put(client, "lasting", large))["replaced"] == digest

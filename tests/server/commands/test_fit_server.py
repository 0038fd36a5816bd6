"""`whipstaff fit --server`: the file that a running server gives is the file that transformers gives."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any, ClassVar

import httpx
import pytest
import torch
from serving import Server

from whipstaff.server import demo
from whipstaff.server.commands import fit as fit_cli
from whipstaff.server.commands import fit_server
from whipstaff.server.demo.mood import contrast
from whipstaff.server.demo.world import build
from whipstaff.steering.algebra import numbers_of
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.source import Asked
from whipstaff.steering.method import HookPoint
from whipstaff.steering.vector_file import read

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world, draws = build(0), Random(4)
    rows = [contrast(world, draws) for _ in range(40)]
    path = tmp_path_factory.mktemp("data") / "moods.jsonl"
    path.write_text("".join(json.dumps({"positive": t["cheerful"], "negative": t["gloomy"]}) + "\n" for t in rows))
    return path


@pytest.fixture(scope="module")
def sizes(moods: Path) -> dict[int, float]:
    """Of the largest activation of a text, by layer: single precision has its errors beside that."""
    model = LocalModel.load(str(demo.MODELS / "demo"))
    ids = tuple(model.tokenizer.encode(json.loads(moods.read_text().splitlines()[0])["positive"]))
    points = [HookPoint("resid_post", layer) for layer in range(model.shape.num_layers)]
    (rows,) = model.read([Asked(ids, tuple(range(len(ids))))], points)
    return {point.layer: float(each.abs().max()) for point, each in rows.items()}


@pytest.mark.engine
@pytest.mark.parametrize("method", ["caa", "shift_vector"])
def test_a_server_gives_the_file_that_transformers_gives(
    demo_server: Server, moods: Path, tmp_path: Path, sizes: dict[int, float], method: str
) -> None:
    """Mean differences of all layers, of one token and of means over a text."""
    files = {}
    for name, where in (("server", ["--server", demo_server.url]), ("local", ["--model", "demo"])):
        files[name] = tmp_path / f"{name}.safetensors"
        words = [method, *where, "--data", str(moods), "--template", "none", "--layers", "all", "--json"]
        assert fit_cli.main([*words, "-o", str(files[name])]) == 0
    ours, theirs = (read(files[name]) for name in ("server", "local"))
    assert ours.header.model == theirs.header.model
    assert ours.header.provenance["read_from"] == "server" and "read_from" not in theirs.header.provenance
    found, expected = numbers_of(ours), numbers_of(theirs)
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        most = TOLERANCE * sizes[int(name.split(".")[1])]
        torch.testing.assert_close(found[name], numbers, rtol=0, atol=most)
        assert numbers.norm() > 100 * most


@pytest.mark.engine
def test_what_a_server_refuses_is_told(demo_server: Server, moods: Path, tmp_path: Path, capsys: Any) -> None:
    where = ["--server", demo_server.url, "--data", str(moods), "-o", str(tmp_path / "a.safetensors")]
    assert fit_cli.main(["lofit", *where]) == 2
    assert "--method: lofit takes gradients or weights" in capsys.readouterr().err
    assert fit_cli.main(["mote", *where]) == 2
    assert "--model: the model has no experts" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "--model: has to be said, or --server URL"),
        (("--model", "demo", "--server", "http://x"), "--model: say this or --server, not both"),
        (("--server", "http://x", "--dtype", "float32"), "--dtype: the server chose it"),
        (("--model", "demo", "--parallel", "3"), "--parallel: goes with --server"),
        (("--model", "demo", "--name", "mine"), "--name: goes with --server"),
        (("--server", "http://x", "--name", ".mine", "--admin-key", "k"), "--name: a name has"),
        (("--server", "http://x", "--name", "mine"), "--admin-key: --name changes the server's registry"),
    ],
)
def test_a_wrong_call_ends_before_anything_is_read(
    words: tuple[str, ...], reason: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WHIPSTAFF_ADMIN_KEY", raising=False)
    assert fit_cli.main(["caa", *words, "--data", "x.jsonl", "-o", "y.safetensors"]) == 2
    assert reason in capsys.readouterr().err


def test_a_server_without_room_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    answers = iter(
        [httpx.Response(429, headers={"retry-after": "7"}), httpx.Response(429), httpx.Response(200, json=[1])]
    )
    keys = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["authorization"])
        return next(answers)

    ask = fit_server.asking("http://x", "k", transport=httpx.MockTransport(answer))
    assert ask("GET", "/", None) == [1] and waits == [7, 1] and keys == ["Bearer k"] * 3


def test_a_refusal_names_the_field_and_a_dead_server_itself() -> None:
    refused = httpx.Response(422, json={"error": {"message": "not here", "param": "capture[0].layers[1]"}})
    ask = fit_server.asking("http://x", None, transport=httpx.MockTransport(lambda request: refused))
    with pytest.raises(SteeringError, match=r"answers 422: capture\[0\].layers\[1\]: not here"):
        ask("GET", "/", None)
    with pytest.raises(SteeringError, match=r"http://127\.0\.0\.1:9"):
        fit_server.asking("http://127.0.0.1:9", None)("GET", "/", None)


class Library(BaseHTTPRequestHandler):
    """What takes an upload, or refuses it."""

    seen: ClassVar[list[tuple[str, str | None, bytes]]] = []
    status = 201

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, self.headers["X-Whipstaff-Admin-Key"], data))
        added: dict[str, Any] = {"id": "mine", "replaced": None, "method": "caa", "digest": "d", "warnings": []}
        refused = {"error": {"message": "off", "param": None}}
        answer = json.dumps(added if self.status == 201 else refused).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("status", [201, 403])
def test_a_named_file_is_loaded_and_stays_where_that_fails(
    status: int, moods: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_cli, "served", lambda *_: LocalModel.load(str(demo.MODELS / "demo")))
    monkeypatch.setattr(Library, "seen", [])
    monkeypatch.setattr(Library, "status", status)
    target = tmp_path / "a.safetensors"
    with HTTPServer(("127.0.0.1", 0), Library) as library:
        thread = Thread(target=library.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        url = f"http://127.0.0.1:{library.server_port}"
        words = ["caa", "--server", url, "--data", str(moods), "--template", "none", "--layers", "2", "-o", str(target)]
        code = fit_cli.main([*words, "--name", "mine", "--admin-key", "secret", "--json"])
        library.shutdown()
        thread.join()
    ((path, key, data),) = Library.seen
    assert path.startswith("/v1/steering/vectors?name=mine") and key == "secret"
    assert data == target.read_bytes()
    said = capsys.readouterr()
    if status == 201:
        assert code == 0 and json.loads(said.out)["sha256"] == read(target).digest
    else:
        assert code == 2 and "is written, and was not loaded" in said.err and "off" in said.err

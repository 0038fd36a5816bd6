"""What `whipstaff fit` writes is uploaded to a server as it is, and steers there as it did where it was made."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from asking import PROMPT, Post, assert_refused, metrics, ok
from serving import API_KEY, Server, serving

from whipstaff.server.commands import eval as eval_cli
from whipstaff.server.commands import fit as fit_cli
from whipstaff.steering.algebra import numbers_of
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.render import Template
from whipstaff.steering.fit.scoring import Likelihoods, multiple_choice
from whipstaff.steering.fit.source import Asked, Entry
from whipstaff.steering.fit.training import answer_log_p
from whipstaff.steering.method import HookPoint
from whipstaff.steering.vector_file import read
from whipstaff.steering.where import Where

pytestmark = pytest.mark.engine
ADMIN_KEY = "a key for admins"
ADMIN = {"X-Whipstaff-Admin-Key": ADMIN_KEY}
WORDS = ("law", "river", "house", "morning", "window", "bread", "stone", "road")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that takes uploads."""
    folder = tmp_path_factory.mktemp("fitted")
    flags = ("--registry", str(folder / "registry"), "--admin-key", ADMIN_KEY, "--audit-log", str(folder / "audit"))
    with serving(folder, *flags) as running:
        yield running


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("method", "flags", "row"),
    [
        ("caa", ("--layers", "1"), {"positive": "good {}", "negative": "bad {}"}),
        ("loreft", ("--layers", "1", "--steps", "4", "--rank", "2"), {"prompt": "say {}", "response": " good good"}),
    ],
)
def test_a_fitted_file_steers_as_it_did_where_it_was_made(
    method: str,
    flags: tuple[str, ...],
    row: dict[str, str],
    server: Server,
    http: httpx.Client,
    complete: Post,
    tmp_path: Path,
) -> None:
    rows = [{key: text.format(f"{a} {b}") for key, text in row.items()} for a in WORDS for b in WORDS]
    target, folder = tmp_path / "mine.safetensors", server.models["base"]
    data = written(tmp_path / "data.jsonl", rows)
    words = (method, "--model", folder, "--data", data, "-o", target, "--template", "none", *flags)
    assert fit_cli.main(list(map(str, words))) == 0
    uploaded = http.post("/v1/steering/vectors", params={"name": "mine"}, content=target.read_bytes(), headers=ADMIN)
    assert uploaded.is_success, uploaded.text
    model, vector = LocalModel.load(folder), read(target)
    ids = tuple(model.tokenizer(PROMPT)["input_ids"])
    found = {}
    for scale in (0.0, 3.0):
        answer = ok(complete(steering={"vector": "mine", "scale": scale}, max_tokens=1, logprobs=0))
        (choice,) = answer["choices"]
        (token,) = choice["token_ids"]
        entry = Entry(method, vector.tensors, {"scale": scale}, vector.header.where)
        (log_p,) = model.predict([ids], [entry])
        assert token == int(log_p.argmax())
        assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(float(log_p[token]), abs=1e-3)
        found[scale] = log_p
    assert (found[3.0] - found[0.0]).abs().max() > 1e-2
    assert http.delete("/v1/steering/vectors/mine", headers=ADMIN).is_success


def test_a_fitted_soft_prompt_stands_before_a_prompt_as_it_did_where_it_was_made(
    server: Server, http: httpx.Client, complete: Post, tmp_path: Path
) -> None:
    rows = [{"prompt": f"say {a} {b}", "response": " good good"} for a in WORDS for b in WORDS]
    target, folder = tmp_path / "mine.safetensors", server.models["base"]
    data = written(tmp_path / "data.jsonl", rows)
    words = ("soft_prompt", "--model", folder, "--data", data, "-o", target, "--template", "none", "--rows", "3")
    assert fit_cli.main(list(map(str, (*words, "--steps", "4")))) == 0
    uploaded = http.post("/v1/steering/vectors", params={"name": "rows"}, content=target.read_bytes(), headers=ADMIN)
    assert uploaded.is_success, uploaded.text
    model, learned = LocalModel.load(folder), read(target).shared_parts["rows"]
    ids = tuple(model.tokenizer(PROMPT)["input_ids"])
    found = []
    for steering, entries in (([], []), ([{"vector": "rows"}], [Entry("soft_prompt", {}, {}, rows=learned)])):
        (choice,) = ok(complete(steering=steering, max_tokens=1, logprobs=0))["choices"]
        (token,) = choice["token_ids"]
        (log_p,) = model.predict([ids], entries)
        assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(float(log_p[token]), abs=1e-3)
        found.append(log_p)
    assert (found[1] - found[0]).abs().max() > 1e-2
    assert http.delete("/v1/steering/vectors/rows", headers=ADMIN).is_success


def test_answers_are_scored_as_they_would_be_generated(server: Server, http: httpx.Client, tmp_path: Path) -> None:
    folder, target = server.models["base"], tmp_path / "scored.safetensors"
    pairs = [{"positive": f"good {a} {b}", "negative": f"bad {a} {b}"} for a in WORDS for b in WORDS]
    data = written(tmp_path / "pairs.jsonl", pairs)
    words = ("caa", "--model", folder, "--data", data, "-o", target, "--template", "none", "--layers", "1")
    assert fit_cli.main(list(map(str, words))) == 0
    params = {"name": "scored"}
    assert http.post("/v1/steering/vectors", params=params, content=target.read_bytes(), headers=ADMIN).is_success
    rows: list[dict[str, Any]] = [
        {"question": f"Why {word}?", "right": ["good law"], "wrong": ["a bad river", "no"]} for word in WORDS[:4]
    ]
    asked = written(tmp_path / "questions.jsonl", rows)
    neutral = written(tmp_path / "neutral.jsonl", [{"text": "a river and a road"}])
    flags = ("--vector", "scored", "--scales", "4", "--neutral", neutral, "-o", tmp_path / "out")
    assert eval_cli.main(list(map(str, (asked, *flags, "--url", server.url, "--api-key", API_KEY)))) == 0
    plain, steered = map(json.loads, (tmp_path / "out" / "cells.jsonl").read_text().splitlines()[1:])
    model, vector = LocalModel.load(folder), read(target)
    template = Template(model.tokenizer, "Q: {prompt}\nA: {response}")
    for row, before, after in zip(rows, plain["rows"], steered["rows"], strict=True):
        for scale, said in ((0.0, before), (4.0, after)):
            sums = []
            for answer in (*row["right"], *row["wrong"]):
                text = template.render(row["question"], answer)
                num = len(text.response)
                entry = Entry("caa", vector.tensors, {"scale": scale}, Where(prompt=[(-(num + 1), None)]))
                lengths = [len(text.ids)]
                with model.edited([entry], lengths):  # the whole text is the prompt, as it was asked
                    (log_p,) = answer_log_p(model, [(text.ids, text.num_prompt)], ())
                sums.append(float(log_p.detach().sum()))
            wanted = multiple_choice(Likelihoods(tuple(sums), (8, 11, 2), (0,), 0))
            assert said == pytest.approx(wanted, abs=2e-3)
    assert plain["rows"] != steered["rows"]
    assert http.delete("/v1/steering/vectors/scored", headers=ADMIN).is_success


# ---- fitted by the server itself

FITS = "/v1/steering/fits"
PAIRS = [{"positive": f"good {a} {b}", "negative": f"bad {a} {b}"} for a in WORDS for b in WORDS]
PATIENCE = 300  # seconds that a loaded machine may take for a fit
TOLERANCE = 1e-5  # of the largest activation


def asked(name: str, method: str = "caa", data: Any = PAIRS, **more: Any) -> dict[str, Any]:
    options = {"template": "none"} | more.pop("options", {})
    return {"method": method, "name": name, "data": data, "options": options} | more


def start(http: httpx.Client, body: Any) -> httpx.Response:
    return http.post(FITS, json=body, headers=ADMIN)


def show(http: httpx.Client, number: str) -> dict[str, Any]:
    found: dict[str, Any] = ok(http.get(f"{FITS}/{number}", headers=ADMIN))
    return found


def ended(http: httpx.Client, number: str) -> dict[str, Any]:
    """What is known of a job once nobody works on it."""
    deadline = time.monotonic() + PATIENCE
    while (record := show(http, number))["ended"] is None:
        assert time.monotonic() < deadline, record
        time.sleep(0.1)
    return record


def fitted(http: httpx.Client, body: Any) -> dict[str, Any]:
    answer = start(http, body)
    assert answer.status_code == 202, answer.text
    record = answer.json()
    assert record["state"] == "queued" and answer.headers["location"] == f"{FITS}/{record['id']}"
    return ended(http, record["id"])


def nothing_is_left(server: Server, http: httpx.Client, folder: Path) -> None:
    """Neither activations in the workers, nor a job's files, nor a slot."""
    deadline = time.monotonic() + PATIENCE
    while True:
        now = metrics(http)
        found = [
            now[name, ()] for name in ("whipstaff_captures_held", "whipstaff_slots_in_use", "whipstaff_fits_running")
        ]
        files = [path.name for path in (folder / "registry" / "fits").iterdir() if path.suffix not in (".json", "")]
        if not any(found) and not files:
            return
        assert time.monotonic() < deadline, (found, files)
        time.sleep(0.2)


@pytest.fixture(scope="module")
def folder(server: Server) -> Path:
    return server.log.parent


@pytest.mark.parametrize("method", ["caa", "shift_vector", "repe"])
def test_a_job_makes_the_file_that_transformers_makes(
    method: str, server: Server, http: httpx.Client, complete: Post, folder: Path, tmp_path: Path
) -> None:
    """From pairs to a steered answer in one request each, and the numbers are those of `whipstaff fit --model`."""
    record = fitted(http, asked("made", method, options={"layers": "0-2"}, description="ours"))
    assert record["state"] == "done", record
    assert record["rows"] == {"train": 45, "dev": 9, "test": 10} and record["error"] is None
    local, data = tmp_path / "local.safetensors", written(tmp_path / "data.jsonl", PAIRS)
    words = (
        method,
        "--model",
        server.models["base"],
        "--data",
        data,
        "-o",
        local,
        "--template",
        "none",
        "--layers",
        "0-2",
    )
    assert fit_cli.main(list(map(str, words))) == 0
    model, theirs = LocalModel.load(server.models["base"]), read(local)
    ours = read(folder / "registry" / "objects" / f"{record['digest']}.safetensors")
    ids = [tuple(model.tokenizer(text)["input_ids"]) for row in PAIRS[:8] for text in row.values()]
    for layer in range(3):
        point = HookPoint("resid_post", layer)
        rows = [each[point] for each in model.read([Asked(one, tuple(range(len(one)))) for one in ids], [point])]
        most, name = TOLERANCE * max(float(each.abs().max()) for each in rows), f"resid_post.{layer}.add"
        found, expected = (numbers_of(file)[name] for file in (ours, theirs))
        assert expected.norm() > 100 * most
        torch.testing.assert_close(found, expected, rtol=0, atol=most)
    assert numbers_of(ours).keys() == numbers_of(theirs).keys()
    provenance = record["provenance"]
    assert provenance == ours.header.provenance and ours.header.description == "ours"
    assert provenance["data"]["sha256"] == theirs.header.provenance["data"]["sha256"]
    assert provenance["read_from"] == "server" and provenance["fit"] == record["id"]
    said = record["evaluation"]
    assert provenance["held_out"] == said and (said["rows"], said["groups"]) == (10, 10)
    for name in ("auc", "ahead"):
        low, high = said[name]["interval"]
        assert 0 <= low <= said[name]["value"] <= high <= 1
    assert said["ahead"]["value"] == 1 and said["ahead"]["interval"][0] < 0.8  # ten rows are not many
    steered = ok(complete(steering={"vector": "made", "scale": 20}))
    assert steered["whipstaff"]["steering"][0]["digest"] == record["digest"]
    assert steered["choices"][0]["text"] != ok(complete())["choices"][0]["text"]
    nothing_is_left(server, http, folder)
    assert ok(http.delete(f"{FITS}/{record['id']}", headers=ADMIN))["deleted"] is True
    assert_refused(http.get(f"{FITS}/{record['id']}", headers=ADMIN), 404, "id")
    assert http.delete("/v1/steering/vectors/made", headers=ADMIN).is_success


QUESTIONS = [
    {"question": f"Why {a}?", "right": [f"good {b}"], "wrong": [f"a bad {b}", "no"]} for a in WORDS for b in WORDS
]
LABELLED = [
    {"text": f"{word} {a} {b}", "label": int(word == "good")} for a in WORDS for b in WORDS for word in ("good", "bad")
]


@pytest.mark.parametrize(
    ("method", "data", "more", "measured"),
    [
        ("iti", QUESTIONS, {"template": "Q: {prompt} A: {response}"}, "ahead"),
        ("probe", LABELLED, {}, "accuracy"),
        ("directional_ablation", LABELLED, {}, "accuracy"),
        ("actadd", PAIRS[:1], {}, "problem"),
    ],
)
def test_every_kind_of_data_is_evaluated_on_rows_that_it_was_not_made_from(
    method: str, data: Any, more: dict[str, Any], measured: str, http: httpx.Client
) -> None:
    record = fitted(http, asked("made", method, data, options=more))
    assert record["state"] == "done", record["error"]
    assert measured in record["evaluation"], record["evaluation"]
    if measured != "problem":
        assert record["evaluation"][measured]["value"] > 0.7
    assert http.delete("/v1/steering/vectors/made", headers=ADMIN).is_success


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in asked("bad").items() if name != field}


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ([], 400, None, "object"),
        (without("name"), 400, "name", "required"),
        (asked("../up"), 400, "name", "letters"),
        (asked("push"), 409, "name", "started"),
        (asked("bad", "caaa"), 400, "method", "caa, "),
        (asked("bad", "lofit"), 400, "method", "on this machine"),
        (asked("bad", "angular"), 422, "method", "--steering-sites mlp_in"),
        (asked("bad", "mote"), 400, "method", "no experts"),
        (asked("bad", data=[]), 400, "data", "at least 1"),
        (asked("bad", data=[*PAIRS, {"positive": "a"}]), 400, "data[64].negative", "required"),
        (asked("bad", data=[*PAIRS, 7]), 400, "data[64]", "int"),
        (asked("bad", data=[*PAIRS, {**PAIRS[0], "neagtive": "a"}]), 400, "data[64].neagtive", "unknown key"),
        (asked("bad", data=[*PAIRS, {**PAIRS[0], "positive": ""}]), 400, "data[64].positive", "1 character"),
        (asked("bad", data=[*PAIRS, {**PAIRS[0], "split": "test", "negative": "a " * 2000}]), 400, "data[64]", "511"),
        (
            asked("bad", data=[*PAIRS, {"positive": "a", "negative": "b"}], options={"read": "-2"}),
            400,
            "data[64]",
            "-2",
        ),
        (asked("bad", options={"layers": "9"}), 400, "options.layers", "0 to 2"),
        (asked("bad", options={"leyers": "1"}), 400, "options.leyers", "layers"),
        (asked("bad", options={"rank": 2}), 400, "options.rank", "does not take"),
        (asked("bad", options={"seed": -1}), 400, "options.seed", "greater"),
        (asked("bad", options={"template": "Q"}), 400, "options.template", "form"),
        (asked("bad", split=[0, 0.5, 0.5]), 400, "split", "learn"),
        (asked("bad", split=[1, 2, -1]), 400, "split[1]", "less than"),
        (asked("bad", where="there"), 400, "where", "none of"),
        (asked("bad", "add_direction", LABELLED, options={"marks": "I"}), 400, "method", "--marks"),
        (asked("bad", "probe", LABELLED, neutral=[{"text": "a"}, {}]), 400, "neutral[1].text", "required"),
        (asked("bad", data=PAIRS[:1] * 3, split=[0.5, 0.5, 0]), 400, "data", "training split"),
        (asked("bad", colour="red"), 400, "colour", "unknown key"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_scheduled(
    body: Any, status: int, param: str | None, said: str, http: httpx.Client
) -> None:
    before = ok(http.get(FITS, headers=ADMIN))
    answer = start(http, body)
    assert_refused(answer, status, param)
    assert said in answer.json()["error"]["message"], answer.text
    assert ok(http.get(FITS, headers=ADMIN)) == before


def test_strangers_start_and_see_nothing(http: httpx.Client) -> None:
    for headers in ({}, {"X-Whipstaff-Admin-Key": "wrong"}):
        assert_refused(http.post(FITS, json=asked("bad"), headers=headers), 401, None)
        for method, path in (("GET", ""), ("GET", "/fit-0"), ("DELETE", "/fit-0"), ("POST", "/fit-0/rollback")):
            assert_refused(http.request(method, FITS + path, headers=headers), 401, None)
    for path in ("/fit-0", "/..%2Fmanifest", "/fit-0123456789ab"):
        assert http.get(FITS + path, headers=ADMIN).status_code == 404


LONG = [{"positive": "good " + f"{a} {b} " * 30, "negative": "bad " + f"{a} {b} " * 30} for a in WORDS for b in WORDS]


def test_jobs_are_cancelled_and_leave_nothing(server: Server, http: httpx.Client, folder: Path) -> None:
    """One at work, and those that wait; more than so many are refused, and of one name there is one."""
    manifest = (folder / "registry" / "manifest.json").read_bytes()
    long = [{**row, "group": str(index)} for index, row in enumerate(LONG * 30)]
    started = [ok_started(http, asked(f"long{index}", data=long)) for index in range(4)]
    assert_refused(start(http, asked("more")), 429, None)
    assert_refused(start(http, asked("long0")), 409, "name")
    at_work = started[0]["id"]
    deadline = time.monotonic() + PATIENCE
    while not (progress := show(http, at_work)["progress"]) or not progress["done"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (progress["what"], progress["of"]) == (
        "reading",
        2 * sum(started[0]["rows"][name] for name in ("train", "dev")),
    )
    assert metrics(http)["whipstaff_fits_running", ()] == 1
    for record in started:
        found = ok(http.delete(f"{FITS}/{record['id']}", headers=ADMIN))
        assert found["deleted"] is False and found["state"] in ("cancelling", "cancelled")
    for record in started:
        assert ended(http, record["id"])["state"] == "cancelled"
    nothing_is_left(server, http, folder)
    assert (folder / "registry" / "manifest.json").read_bytes() == manifest
    events = [json.loads(line) for line in (folder / "audit").read_text().splitlines()]
    of_first = [event for event in events if at_work in (event.get("fit"), event.get("object"))]
    assert [event["event"] for event in of_first] == ["change", "fit"]
    assert (of_first[1]["outcome"], of_first[1]["object"], of_first[1]["method"]) == ("cancelled", "long0", "caa")
    assert metrics(http)["whipstaff_fits_total", (("method", "caa"), ("outcome", "cancelled"))] >= 4


def ok_started(http: httpx.Client, body: Any) -> dict[str, Any]:
    answer = start(http, body)
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_job_that_fails_says_why_and_leaves_nothing(server: Server, http: httpx.Client, folder: Path) -> None:
    """No room for a vector: the registry's folder takes no file."""
    objects = folder / "registry" / "objects"
    kept = objects.with_name("kept")
    objects.rename(kept)
    objects.write_text("no folder")
    try:
        record = fitted(http, asked("unkept"))
    finally:
        objects.unlink()
        kept.rename(objects)
    assert record["state"] == "failed" and record["error"]["message"] and record["digest"] is None
    assert_refused(http.get("/v1/steering/vectors/unkept"), 404, None)
    nothing_is_left(server, http, folder)


def test_traffic_goes_on_beside_a_fit(http: httpx.Client, server: Server, complete: Post) -> None:
    """Answers are what they are without it, and they come while it runs."""
    plain = ok(complete())["choices"][0]["text"]
    long = [{**row, "group": str(index)} for index, row in enumerate(LONG * 30)]
    number = ok_started(http, asked("beside", data=long))["id"]
    deadline = time.monotonic() + PATIENCE
    while not (progress := show(http, number)["progress"]) or not progress["done"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(3):
        assert ok(complete())["choices"][0]["text"] == plain
    assert show(http, number)["state"] == "running"
    http.delete(f"{FITS}/{number}", headers=ADMIN)
    assert ended(http, number)["state"] == "cancelled"


def test_a_vector_is_promoted_and_rolled_back(http: httpx.Client, complete: Post, server: Server) -> None:
    first, second = (fitted(http, asked("mood", options={"layers": layer})) for layer in ("1", "2"))
    assert (second["replaced"], first["replaced"]) == (first["digest"], None)

    def promote(record: dict[str, Any], **body: Any) -> httpx.Response:
        return http.post(f"{FITS}/{record['id']}/promote", json=body, headers=ADMIN)

    def roll_back(record: dict[str, Any]) -> httpx.Response:
        return http.post(f"{FITS}/{record['id']}/rollback", headers=ADMIN)

    def preset() -> Any:
        answer = http.get("/v1/steering/presets/cheer")
        return None if answer.status_code == 404 else ok(answer)

    assert_refused(promote(first, preset="cheer"), 409, None)  # another vector has its name now
    assert_refused(promote(second, preset="../cheer"), 400, "preset")
    assert_refused(promote(second, preset="cheer", entry={"vector": "push"}), 400, "entry.vector")
    assert_refused(promote(second, preset="cheer", entry={"scale": "a lot"}), 400, "entry.scale")
    assert_refused(promote(second, preset="cheer", entry={"strenth": 1}), 400, "entry.strenth")
    assert_refused(promote(second), 400, "preset")
    assert_refused(roll_back(second), 409, None)
    assert preset() is None and show(http, second["id"])["promoted"] is None
    entry = {"vector": "mood", "scale": 20}
    record = ok(promote(second, preset="cheer", entry={"scale": 20}))
    assert record["promoted"]["before"] is None and preset()["default"]["steering"] == [entry]
    steered = ok(complete(model="tiny@cheer"))
    assert steered["whipstaff"]["steering"][0]["digest"] == second["digest"]
    assert_refused(promote(second, preset="cheer"), 409, "preset")
    assert ok(roll_back(second))["promoted"] is None and preset() is None
    mine = {"description": "mine", "default": {"temperature": 0.5, "steering": {"vector": "push"}}}
    assert http.post("/v1/steering/presets", json={"name": "cheer", **mine}, headers=ADMIN).is_success
    ok(promote(second, preset="cheer", entry={"scale": 20}))
    assert (preset()["description"], preset()["default"]) == ("mine", {"temperature": 0.5, "steering": [entry]})
    third = fitted(http, asked("third", options={"layers": "1"}))
    ok(promote(third, preset="cheer"))
    assert_refused(roll_back(second), 409, None)  # another was promoted since
    ok(roll_back(third))
    assert preset()["default"]["steering"] == [entry]
    ok(roll_back(second))
    assert {name: preset()[name] for name in mine} == mine
    assert http.delete("/v1/steering/presets/cheer", headers=ADMIN).is_success
    for name in ("mood", "third"):
        assert http.delete(f"/v1/steering/vectors/{name}", headers=ADMIN).is_success

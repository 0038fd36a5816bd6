"""What `whipstaff fit` writes is uploaded to a server as it is, and steers there as it did where it was made."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import PROMPT, Post, ok
from serving import API_KEY, Server, serving

from whipstaff.server.commands import eval as eval_cli
from whipstaff.server.commands import fit as fit_cli
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.render import Template
from whipstaff.steering.fit.scoring import Likelihoods, multiple_choice
from whipstaff.steering.fit.source import Entry
from whipstaff.steering.fit.training import answer_log_p
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
    with serving(folder, "--registry", str(folder / "registry"), "--admin-key", ADMIN_KEY) as running:
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
